"""The `Store` contract in memory: for tests, for one-off tuning, and as the contract's plainest reading."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from tilecast.cache_store.decision_rows import displaces, settled
from tilecast.cache_store.measurement_rows import storable
from tilecast.environment import Environment
from tilecast.errors import CacheError
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertGemm


class MemoryStore:
    """A `tilecast.store.Store` that lives and dies with the process."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.RLock()
        self._environments: dict[str, Environment] = {}
        self._measurements: dict[str, Measurement] = {}
        self._decisions: dict[tuple[str, str, str, str, int], Decision] = {}
        self._closed = False

    def add_environment(self, environment: Environment) -> str:
        """Keep an environment (once) and return its digest."""
        with self._lock:
            self._check_open()
            self._environments.setdefault(environment.digest, environment)
        return environment.digest

    def environments(self) -> list[Environment]:
        """Return all environments, ordered by digest."""
        with self._lock:
            self._check_open()
            return [self._environments[key] for key in sorted(self._environments)]

    def add_measurements(self, measurements: list[Measurement]) -> int:
        """Keep measurements and return how many were new. Raises CacheError."""
        kept = [storable(measurement) for measurement in measurements]
        with self._lock:
            self._check_environments({measurement.environment for measurement in kept})
            before = len(self._measurements)
            for measurement in kept:
                self._measurements.setdefault(measurement.key, measurement)
            return len(self._measurements) - before

    def measurements(
        self,
        *,
        environment: str | None = None,
        gemm: ExpertGemm | None = None,
        tokens: int | None = None,
        routing: str | None = None,
        run: int | None = None,
    ) -> list[Measurement]:
        """Return the measurements that match all given filters, in the order they were added."""
        with self._lock:
            self._check_open()
            return [
                m
                for m in self._measurements.values()
                if environment in (None, m.environment)
                and gemm in (None, m.gemm)
                and tokens in (None, m.tokens)
                and routing in (None, m.routing)
                and run in (None, m.run)
            ]

    def put_decisions(self, decisions: list[Decision]) -> None:
        """Keep decisions, displacing what they overlap. Raises CacheError."""
        kept = settled(decisions)
        with self._lock:
            self._check_environments({decision.environment for decision in kept})
            for new in kept:
                displaced = [key for key, old in self._decisions.items() if displaces(new, old)]
                for key in displaced:
                    del self._decisions[key]
                self._decisions[new.sort_key] = new

    def table(self, *, environment: str | None = None, policy: str | None = None) -> TuningTable:
        """Return the decisions that match all given filters, with their environments, as one table."""
        with self._lock:
            self._check_open()
            found = [
                d
                for d in self._decisions.values()
                if environment in (None, d.environment) and policy in (None, d.policy)
            ]
            places = {d.environment for d in found}
            return TuningTable(tuple(self._environments[key] for key in places), tuple(found))

    def close(self) -> None:
        """Forget everything; using the store afterwards raises CacheError."""
        with self._lock:
            self._closed = True
            self._environments.clear()
            self._measurements.clear()
            self._decisions.clear()

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the store in memory is closed; open another one")

    def _check_environments(self, digests: set[str]) -> None:
        self._check_open()
        for digest in sorted(digests - set(self._environments)):
            raise CacheError(f"the store in memory has no environment {digest[:12]}; add the environment first")
