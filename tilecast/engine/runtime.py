"""The table in use: a frozen in-memory index of decisions, looked up once per call of a layer.

A `Runtime` is built from a `TuningTable` once; it never changes afterwards. `lookup` is a dictionary access and
a bisection: no tensors, no SQL, no lock, no I/O. What the table lacks runs with the kernel's default config,
is logged once per key with its reason, and counted.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tilecast.environment import Environment, cpu_environment
from tilecast.errors import ConfigError, CoverageError
from tilecast.evidence import POLICIES, Decision, TuningTable
from tilecast.kernels.spec import PLAIN, Kernel, Registry, numerics_class
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig, check_int, check_name, tokens_text
from tilecast.settings import Settings

logger = logging.getLogger(__name__)

MISS_MODES = ("default", "error", "tune")
"""What a miss does. `tune` tunes at start-up what is missing then; a later miss acts as `default`."""

MAX_MISSES = 1 << 16
"""How many distinct misses are remembered, so that a long-lived process cannot grow without bound."""

BITLESS_FIELDS = frozenset({"threads", "system", "llc_bytes"})
"""Soft fields of an environment that no numerics class depends on: they change times only."""

ANCHOR_TOKENS = 1
"""The token count whose default config sets the weight layout and numerics class of an undecided layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What runs a layer for some token counts. `bucket` is None and `reason` says why on a miss."""

    up_kernel: Kernel
    up: TileConfig
    down_kernel: Kernel
    down: TileConfig
    bucket: Bucket | None = None
    reason: str = ""

    @property
    def hit(self) -> bool:
        """Whether a decision of the table covers this."""
        return self.bucket is not None


@dataclass(frozen=True, slots=True)
class Miss:
    """A (layer, tokens) that the table did not cover, how often it was asked for, and why it missed."""

    layer: ExpertLayer
    tokens: int
    count: int
    reason: str


@dataclass(slots=True)
class _Missed:
    entry: Entry
    count: int = 0


@dataclass(frozen=True, slots=True)
class _Series:
    """One layer's buckets: bucket i covers (aboves[i], edges[i]] and runs entries[i]."""

    edges: tuple[int, ...]
    aboves: tuple[int, ...]
    entries: tuple[Entry, ...]


class Runtime:
    """A frozen index over one table, for one environment, policy and routing profile."""

    def __init__(
        self,
        table: TuningTable,
        *,
        environment: Environment,
        registry: Registry,
        policy: str = "reproducible",
        routing: str = "uniform",
        miss: str = "default",
        warn_miss: bool = False,
    ) -> None:
        """Validate `table` and index it.

        Raises ConfigError for a config that cannot run here (the message names the entry), CoverageError when
        the table holds decisions but only for other devices or toolchains, InputError for an unknown policy
        or miss mode.
        """
        check_name("policy", policy, POLICIES)
        check_name("miss mode", miss, MISS_MODES)
        self.table = table
        self.environment = environment
        self.registry = registry
        self.policy = policy
        self.routing = routing
        self.plain_entries: dict[int, tuple[Entry, Entry]] = {}
        """Where the functional form keeps, by an entry's id, the entry and the configs it runs on plain weights."""
        self._miss_mode = miss
        self._fails_on_miss = miss == "error"
        self._warns_on_miss = warn_miss
        self._missed: dict[tuple[ExpertLayer, int], _Missed] = {}
        self._forgotten_misses = 0
        self._anchors: dict[ExpertLayer, Entry] = {}
        usable = _usable_environments(table, environment)
        self.differences = environment.compare(usable[0]) if usable else ()
        """The soft fields in which the closest environment of the table differs from this one."""
        order = {e.digest: place for place, e in enumerate(usable)}
        decisions = [d for d in table.decisions if d.environment in order]
        for decision in decisions:
            self._validate(decision)
        self._index = self._build_index(decisions, order)

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
            kernels = [self.registry.default_kernel(gemm, self.environment) for gemm in layer.gemms]
            configs = [
                kernel.default(gemm, ANCHOR_TOKENS, self.environment)
                for kernel, gemm in zip(kernels, layer.gemms, strict=True)
            ]
            found = Entry(up_kernel=kernels[0], up=configs[0], down_kernel=kernels[1], down=configs[1])
            self._anchors[layer] = found
        return found

    def with_policy(self, policy: str) -> Runtime:
        """Return a runtime over the same table for another policy. Raises as the constructor does."""
        if policy == self.policy:
            return self
        return Runtime(
            self.table,
            environment=self.environment,
            registry=self.registry,
            policy=policy,
            routing=self.routing,
            miss=self._miss_mode,
            warn_miss=self._warns_on_miss,
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

    def _first_miss(self, layer: ExpertLayer, tokens: int) -> _Missed:
        check_int("tokens", tokens, 1)
        anchor = self.anchor(layer)
        # `like` keeps the layout the weights are stored in, and the class that the other buckets have.
        entry = replace(
            anchor,
            up=anchor.up_kernel.default(layer.up, tokens, self.environment, like=anchor.up),
            down=anchor.down_kernel.default(layer.down, tokens, self.environment, like=anchor.down),
            bucket=None,
            reason=self._reason(layer, tokens),
        )
        missed = _Missed(entry)
        if len(self._missed) < MAX_MISSES:
            self._missed[layer, tokens] = missed
            if self._warns_on_miss:
                logger.warning("cache miss, the default config runs: %s", entry.reason)
        else:
            self._forgotten_misses += 1
        return missed

    def _reason(self, layer: ExpertLayer, tokens: int) -> str:
        if not self.table.decisions:
            return f"no table is in use, so nothing is decided for {layer.label} at {tokens_text(tokens)}"
        covered = self.buckets(layer)
        if covered:
            return f"no decision for {layer.label} covers {tokens_text(tokens)}; covered: {spans(covered)}"
        others = {(d.policy, d.routing) for d in self.table.decisions if d.layer == layer}
        if others:
            seen = ", ".join(sorted(f"{policy}/{routing}" for policy, routing in others))
            return f"{layer.label} is decided for {seen} only, asked for {self.policy}/{self.routing}"
        labels = sorted({d.layer.label for d in self.table.decisions})
        more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
        return f"the table has no decision for {layer.label}; it has: {'; '.join(labels[:4])}{more}"

    def _validate(self, decision: Decision) -> None:
        for gemm in decision.layer.gemms:
            reason = self.registry.invalid(gemm, decision.choice(gemm.name).config, self.environment)
            if reason is not None:
                raise ConfigError(f"{_entry_name(decision, gemm)}: {reason}; tune this entry again")

    def _build_index(self, decisions: list[Decision], order: dict[str, int]) -> dict[ExpertLayer, _Series]:
        wanted = [d for d in decisions if (d.policy, d.routing) == (self.policy, self.routing)]
        layers: dict[ExpertLayer, dict[int, list[Decision]]] = {}
        for decision in wanted:
            layers.setdefault(decision.layer, {}).setdefault(order[decision.environment], []).append(decision)
        return {layer: self._series(layer, self._closest(layer, places)) for layer, places in layers.items()}

    def _closest(self, layer: ExpertLayer, places: dict[int, list[Decision]]) -> list[Decision]:
        """Return the decisions of the closest environment, and of the others what fills its gaps and fits it."""
        first, *others = (places[place] for place in sorted(places))
        for gemm in layer.gemms:
            self._check_uniform(gemm, first)
        chosen = list(first)
        for decision in (d for group in others for d in group):
            new = decision.bucket
            covered = any(new.above < c.bucket.tokens and c.bucket.above < new.tokens for c in chosen)
            if not covered and all(self._kind(g, decision) == self._kind(g, first[0]) for g in layer.gemms):
                chosen.append(decision)
        return sorted(chosen, key=lambda d: d.bucket.tokens)

    def _series(self, layer: ExpertLayer, decisions: list[Decision]) -> _Series:
        entries = tuple(
            Entry(
                up_kernel=self.registry[d.up.config.kernel],
                up=d.up.config,
                down_kernel=self.registry[d.down.config.kernel],
                down=d.down.config,
                bucket=d.bucket,
            )
            for d in decisions
        )
        return _Series(tuple(d.bucket.tokens for d in decisions), tuple(d.bucket.above for d in decisions), entries)

    def _check_uniform(self, gemm: ExpertGemm, decisions: list[Decision]) -> None:
        wanted = self._kind(gemm, decisions[0])
        for decision in decisions:
            now = self._kind(gemm, decision)
            if now != wanted:
                what = "weight layout" if now[0] != wanted[0] else "numerics class"
                raise ConfigError(
                    f"{_entry_name(decision, gemm)}: its {what} differs from that of the layer's smaller buckets, "
                    f"expected one for all; tune this layer again"
                )

    def _kind(self, gemm: ExpertGemm, decision: Decision) -> tuple[str, str]:
        """Return what all buckets share: the layout, as weights are stored once, and under `reproducible` the class."""
        config = decision.choice(gemm.name).config
        kernel = self.registry[config.kernel]
        classes = numerics_class(kernel, gemm, config, self.environment) if self.policy == "reproducible" else ""
        layout = kernel.layout(gemm, config)
        # Only the plain layout is common to kernels; others' names mean something within one kernel.
        return layout if layout == PLAIN else f"{kernel.name} {layout}", classes


def _entry_name(decision: Decision, gemm: ExpertGemm) -> str:
    bucket = decision.bucket
    covered = tokens_text(1) if bucket.tokens == 1 else f"{spans([bucket])} tokens"
    return f"entry {decision.layer.label}, {covered}, {decision.policy}, {gemm.name}"


def spans(buckets: Iterable[Bucket]) -> str:
    """Return buckets as text, such as `1, 2–16, 17–64`; `no` for none."""
    parts = [str(b.tokens) if b.tokens == b.above + 1 else f"{b.above + 1}–{b.tokens}" for b in buckets]
    return ", ".join(parts) or "no"


def _usable_environments(table: TuningTable, here: Environment) -> list[Environment]:
    """Return the environments whose decisions hold here, closest first."""
    used = {d.environment for d in table.decisions}
    candidates = sorted(
        (e for e in table.environments if e.digest in used), key=lambda e: (len(here.compare(e)), e.digest)
    )
    usable = [e for e in candidates if here.accepts(e)]
    if candidates and not usable:
        hard = [[m for m in here.compare(e) if m.hard] for e in candidates]
        fields = "; ".join(str(m) for m in min(hard, key=len))
        raise CoverageError(f"the table was tuned for another device or toolchain: {fields}; tune it here")
    return usable


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


_current: Runtime | None = None


def current() -> Runtime:
    """Return the runtime in use; the first call builds it from the environment variables.

    In one process, `TM_GEMM_IMPORT` is read here. With several ranks, all of them agree on rank 0's table
    first, so every rank must come here. Raises what reading and validating a table raise, and AgreementError.
    """
    if _current is not None:
        return _current
    # Imported here: the agreement builds on this module.
    from tilecast.engine.agreement import startup

    return startup(())


def use_table(
    table: TuningTable | None,
    *,
    policy: str | None = None,
    miss: str | None = None,
    warn_miss: bool | None = None,
    environment: Environment | None = None,
    registry: Registry | None = None,
    settings: Settings | None = None,
) -> Runtime:
    """Make `table` (None: an empty one) the table in use of this process and return its runtime.

    What is not given comes from `settings`, by default from the environment variables. Layers that were
    prepared before keep the runtime that they were prepared with. Raises what `Runtime` raises.
    """
    chosen = settings or Settings.from_environment()
    made = Runtime(
        table or TuningTable(),
        environment=environment or cpu_environment(),
        registry=registry or default_registry(),
        policy=policy or chosen.policy,
        miss=miss or chosen.miss,
        warn_miss=chosen.warn_cache_miss if warn_miss is None else warn_miss,
    )
    made.log_differences()
    return use_runtime(made)


def use_runtime(runtime: Runtime) -> Runtime:
    """Make a runtime the one in use and return it."""
    global _current
    _current = runtime
    return runtime


def forget_table() -> None:
    """Drop the runtime in use; the next `current()` builds one from the environment variables again."""
    global _current
    _current = None


def default_registry() -> Registry:
    """Return the process's registry of kernels."""
    # Imported here, so that reading a table does not compile kernels.
    from tilecast.kernels import registry

    return registry


def lookup(layer: ExpertLayer, tokens: int) -> Entry:
    """Return what runs `layer` for `tokens` by the table in use. Raises what `Runtime.lookup` raises."""
    return (_current or current()).lookup(layer, tokens)


def misses() -> tuple[Miss, ...]:
    """Return the misses of the table in use, most frequent first."""
    return () if _current is None else _current.misses()
