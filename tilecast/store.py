"""The contract of a store of measurements and decisions, and the types it speaks in.

`tilecast.cache_store` implements it on SQL and in memory; the tuner and the engine see nothing but this.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from tilecast.environment import Environment
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertGemm


class Store(Protocol):
    """Keeps environments, measurements and decisions.

    Contract, the same for every implementation:

    - Every method is one transaction: done wholly or not at all, and durable when it returns (as far as
      the implementation is durable). A process killed at any instant leaves a store that opens.
    - Adding a measurement whose natural key (`Measurement.key`) is present changes nothing: the first stays.
    - Putting a decision whose natural key is present replaces it, and one whose bucket overlaps others of
      the same environment, layer, policy and routing removes those, so that `table` always makes a table.
      Decisions put in one call must not overlap each other; otherwise CacheError.
    - A decision or measurement needs its environment to be present; otherwise CacheError.
    - Returned objects are frozen; lists are fresh and ordered as each method says.
    - One instance may be used from several threads; several processes may use one SQL store.
    - Failures of the backend surface as CacheError with one line that names the store.
    """

    def add_environment(self, environment: Environment) -> str:
        """Keep an environment (once) and return its digest."""
        ...

    def environments(self) -> list[Environment]:
        """Return all environments, ordered by digest."""
        ...

    def add_measurements(self, measurements: list[Measurement]) -> int:
        """Keep measurements and return how many were new."""
        ...

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
        ...

    def put_decisions(self, decisions: list[Decision]) -> None:
        """Keep decisions; one with the same natural key replaces the present one."""
        ...

    def table(self, *, environment: str | None = None, policy: str | None = None) -> TuningTable:
        """Return the decisions that match all given filters, with their environments, as one table."""
        ...

    def close(self) -> None:
        """Release files and connections; using the store afterwards raises CacheError."""
        ...

    def __enter__(self) -> Self:
        """Return the store itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        ...
