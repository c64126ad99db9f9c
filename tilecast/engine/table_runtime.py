"""A frozen in-memory index of decisions, looked up once per call of a layer.

A `Runtime` is built from a `TuningTable` once; it never changes afterwards. `lookup` is a dictionary access and
a bisection: no tensors, no SQL, no lock, no I/O. What the table lacks runs with the kernel's default config,
is logged once per key with its reason, and counted.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilecast.engine.table_index import (
    Entry,
    default_pair,
    entry_of,
    index_table,
    routing_of,
    spans,
    usable_environments,
)
from tilecast.environment import Environment
from tilecast.errors import CoverageError
from tilecast.evidence import POLICIES, TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertLayer, check_int, check_name, tokens_text

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MISS_MODES = ("default", "error", "tune")
"""What a miss does. `tune` tunes at start-up what is missing then; a later miss acts as `default`."""

MAX_MISSES = 1 << 16
"""How many distinct misses are remembered, so that a long-lived process cannot grow without bound."""

BITLESS_FIELDS = frozenset({"threads", "system", "llc_bytes"})
"""Soft fields of an environment that no numerics class depends on: they change times only."""

ANCHOR_TOKENS = 1
"""The token count whose default config sets the weight layout and numerics class of an undecided layer."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A (layer, tokens) that the table did not cover, how often it was asked for, and why it missed."""

    layer: ExpertLayer
    tokens: int
    count: int
    reason: str


@dataclass(slots=True)
class Missed:
    """What runs a (layer, tokens) that the table does not cover, and how often it was asked for."""

    entry: Entry
    count: int = 0


class Runtime:
    """A frozen index over one table, for one environment, policy and routing profile."""

    def __init__(
        self,
        table: TuningTable,
        *,
        environment: Environment,
        registry: Registry,
        policy: str = "reproducible",
        routing: str | None = None,
        miss: str = "default",
        warn_miss: bool = False,
        optional: bool = False,
    ) -> None:
        """Validate `table` and index it. `routing` is a profile's name, by default the one the table is tuned for.

        Raises ConfigError for a config that cannot run here (the message names the entry), CoverageError when
        the table holds decisions but only for other devices or toolchains, InputError for an unknown policy
        or miss mode. With `optional` a table for other kinds of device alone is no error: every lookup misses.
        """
        check_name("policy", policy, POLICIES)
        check_name("miss mode", miss, MISS_MODES)
        self.table = table
        self.environment = environment
        self.registry = registry
        self.policy = policy
        self.plain_entries: dict[int, tuple[Entry, Entry]] = {}
        """Where the functional form keeps, by an entry's id, the entry and the configs it runs on plain weights."""
        self.devices: set[torch.device] = set()
        """Where the engine keeps the devices that it knows this runtime to be for."""
        self._miss_mode = miss
        self._routing_given = routing
        self._fails_on_miss = miss == "error"
        self._warns_on_miss = warn_miss
        self._missed: dict[tuple[ExpertLayer, int], Missed] = {}
        self._forgotten_misses = 0
        self._anchors: dict[ExpertLayer, Entry] = {}
        usable = usable_environments(table, environment, optional=optional)
        self.differences = environment.compare(usable[0]) if usable else ()
        """The soft fields in which the closest environment of the table differs from this one."""
        self._usable = frozenset(e.digest for e in usable)
        self.routing = routing_of(table, policy, self._usable) if routing is None else routing
        self._index = index_table(
            table, usable, environment=environment, registry=registry, policy=policy, routing=self.routing
        )

    def lookup(self, layer: ExpertLayer, tokens: int) -> Entry:
        """Return what runs `layer` for `tokens` (at least 1).

        Raises CoverageError on a miss if the miss mode is `error`, DeviceError if no kernel runs the layer.
        """
        series = self._index.get(layer)
        if series is not None:
            position = bisect_left(series.edges, tokens)
            if position < len(series.edges) and tokens > series.aboves[position]:
                return series.entries[position]
        return self._miss(layer, tokens)

    def missed(self, layer: ExpertLayer, tokens: int) -> Missed | None:
        """Return what counts the misses of (layer, tokens), None where none is remembered. Counts nothing."""
        return self._missed.get((layer, tokens))

    def covers(self, layer: ExpertLayer, tokens: int) -> bool:
        """Whether a decision covers (layer, tokens). Counts no miss."""
        return any(tokens in bucket for bucket in self.buckets(layer))

    def buckets(self, layer: ExpertLayer) -> tuple[Bucket, ...]:
        """Return the decided buckets of a layer, ascending; empty without decisions."""
        series = self._index.get(layer)
        return () if series is None else tuple(e.bucket for e in series.entries if e.bucket is not None)

    def anchor(self, layer: ExpertLayer) -> Entry:
        """Return the entry whose weight layout, and under `reproducible` numerics class, the whole layer has."""
        series = self._index.get(layer)
        if series is not None:
            return series.entries[0]
        found = self._anchors.get(layer)
        if found is None:
            pair = default_pair(self.registry, self.environment, layer, ANCHOR_TOKENS)
            found = entry_of(self.registry, *pair)
            self._anchors[layer] = found
        return found

    def with_policy(self, policy: str) -> Runtime:
        """Return a runtime over the same table for another policy. Raises as the constructor does."""
        return self if policy == self.policy else self._over(self.environment, policy)

    def with_environment(self, environment: Environment) -> Runtime:
        """Return a runtime over the same table for a device of another kind, which the table may lack wholly.

        Raises as the constructor does.
        """
        return self._over(environment, self.policy)

    def _over(self, environment: Environment, policy: str) -> Runtime:
        return Runtime(
            self.table,
            environment=environment,
            registry=self.registry,
            policy=policy,
            routing=self._routing_given,
            miss=self._miss_mode,
            warn_miss=self._warns_on_miss,
            optional=True,
        )

    def misses(self) -> tuple[Miss, ...]:
        """Return what was asked for and not covered, most frequent first."""
        found = [Miss(layer, tokens, m.count, m.entry.reason) for (layer, tokens), m in self._missed.items()]
        return tuple(sorted(found, key=lambda m: (-m.count, m.layer.digest, m.tokens)))

    def log_differences(self) -> None:
        """Log in one line where the table was tuned, if not quite here; nothing if no field differs."""
        if not self.differences:
            return
        fields = ", ".join(f"{m.field} {m.there!r} (here {m.here!r})" for m in self.differences)
        harmless = self.policy == "reproducible" and {m.field for m in self.differences} <= BITLESS_FIELDS
        effect = "times may differ, bits do not" if harmless else "tune it here to be sure of times and bits"
        logger.warning("the table was tuned with %s: %s", fields, effect)

    @property
    def miss_count(self) -> int:
        """How many lookups missed, those too many to be remembered one by one included."""
        return sum(m.count for m in self._missed.values()) + self._forgotten_misses

    def _miss(self, layer: ExpertLayer, tokens: int) -> Entry:
        missed = self._missed.get((layer, tokens))
        if missed is None:
            missed = self._first_miss(layer, tokens)
        missed.count += 1
        if self._fails_on_miss:
            raise CoverageError(f"{missed.entry.reason}; tune it (tilecast tune) or set TM_GEMM_MISS=default")
        return missed.entry

    def _first_miss(self, layer: ExpertLayer, tokens: int) -> Missed:
        check_int("tokens", tokens, 1)
        # `like` keeps the layout the weights are stored in, and the class that the other buckets have.
        pair = default_pair(self.registry, self.environment, layer, tokens, like=self.anchor(layer))
        entry = entry_of(self.registry, *pair, reason=self.reason(layer, tokens))
        missed = Missed(entry)
        if len(self._missed) < MAX_MISSES:
            self._missed[layer, tokens] = missed
            if self._warns_on_miss:
                logger.warning("cache miss, the default config runs: %s", entry.reason)
        else:
            self._forgotten_misses += 1
        return missed

    def reason(self, layer: ExpertLayer, tokens: int) -> str:
        """Return why no decision is for (layer, tokens), which the table does not cover. Counts no miss."""
        if not self.table.decisions:
            return f"no table is in use, so nothing is decided for {layer.label} at {tokens_text(tokens)}"
        covered = self.buckets(layer)
        if covered:
            return f"no decision for {layer.label} covers {tokens_text(tokens)}; covered: {spans(covered)}"
        elsewhere = [d for d in self.table.decisions if d.layer == layer]
        others = {(d.policy, d.routing) for d in elsewhere if d.environment in self._usable}
        if elsewhere and not others:
            return f"{layer.label} is decided for other devices only, not for {self.environment.device}"
        if others:
            seen = ", ".join(sorted(f"{policy}/{routing}" for policy, routing in others))
            return f"{layer.label} is decided for {seen} only, asked for {self.policy}/{self.routing}"
        labels = sorted({d.layer.label for d in self.table.decisions})
        more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
        return f"the table has no decision for {layer.label}; it has: {'; '.join(labels[:4])}{more}"


def missing_buckets(runtime: Runtime, layer: ExpertLayer, tokens: Iterable[int]) -> tuple[Bucket, ...]:
    """Return the buckets that must be added so that the table covers every one of `tokens` for `layer`."""
    found = []
    decided = runtime.buckets(layer)
    above = 0
    for edge in sorted(set(tokens)):
        if not any(edge in bucket for bucket in decided):
            below = max([above, *(b.tokens for b in decided if b.tokens < edge)])
            found.append(Bucket(above=below, tokens=edge))
        above = edge
    return tuple(found)
