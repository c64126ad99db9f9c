"""From a table's decisions to entries: what runs each layer at each token count, validated once.

Everything here happens before serving: `Runtime` looks entries up in what `index_table` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilecast.cache_store.match import Alike, side_by_side
from tilecast.environment import Environment
from tilecast.errors import ConfigError, CoverageError
from tilecast.evidence import Decision, TuningTable
from tilecast.kernels.spec import PLAIN, Kernel, Registry, numerics_class
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig, tokens_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What runs a layer for some token counts. `bucket` is None and `reason` says why on a miss.

    Both configs take the intermediate's rows in the same order.
    """

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
class Series:
    """One layer's buckets: bucket i covers (aboves[i], edges[i]] and runs entries[i]."""

    edges: tuple[int, ...]
    aboves: tuple[int, ...]
    entries: tuple[Entry, ...]


def usable_environments(table: TuningTable, here: Environment, *, optional: bool = False) -> list[Environment]:
    """Return the environments whose decisions hold here, closest first.

    Raises CoverageError if the table has decisions and none holds here; with `optional` only if some were made
    on this kind of device.
    """
    used = {d.environment for d in table.decisions}
    candidates = sorted(
        (e for e in table.environments if e.digest in used), key=lambda e: (len(here.compare(e)), e.digest)
    )
    usable = [e for e in candidates if here.accepts(e)]
    foreign = optional and all(e.device_kind != here.device_kind for e in candidates)
    if candidates and not usable and not foreign:
        hard = [[m for m in here.compare(e) if m.hard] for e in candidates]
        fields = "; ".join(str(m) for m in min(hard, key=len))
        raise CoverageError(f"the table was tuned for another device or toolchain: {fields}; tune it here")
    return usable


def index_table(
    table: TuningTable,
    usable: list[Environment],
    *,
    environment: Environment,
    registry: Registry,
    policy: str,
    routing: str,
) -> dict[ExpertLayer, Series]:
    """Return every layer's entries from the decisions made in the `usable` environments, the closest first.

    Raises ConfigError, naming the entry, for a config that cannot run here, an up and a down config that do not
    go together, and buckets of a layer that differ in what all must share.
    """
    order = {e.digest: place for place, e in enumerate(usable)}
    decisions = [d for d in table.decisions if d.environment in order]
    indexer = _Indexer(environment, registry, policy)
    for decision in decisions:
        indexer.validate(decision)
    layers: dict[ExpertLayer, dict[int, list[Decision]]] = {}
    for decision in decisions:
        if (decision.policy, decision.routing) == (policy, routing):
            layers.setdefault(decision.layer, {}).setdefault(order[decision.environment], []).append(decision)
    return {layer: indexer.series(indexer.closest(layer, places)) for layer, places in layers.items()}


def alike_under(registry: Registry, environment: Environment, policy: str) -> Alike:
    """Return the predicate by which decisions of one layer may run side by side, for `match`."""
    return _Indexer(environment, registry, policy).alike


class _Indexer:
    def __init__(self, environment: Environment, registry: Registry, policy: str) -> None:
        self._environment = environment
        self._registry = registry
        self._policy = policy

    def validate(self, decision: Decision) -> None:
        orders = []
        for gemm in decision.layer.gemms:
            config = decision.choice(gemm.name).config
            reason = self._registry.invalid(gemm, config, self._environment)
            if reason is not None:
                raise ConfigError(f"{_entry_name(decision, gemm)}: {reason}; tune this entry again")
            orders.append(self._registry[config.kernel].order(gemm, config))
        if orders[0] != orders[1]:
            raise ConfigError(
                f"{_entry_name(decision, decision.layer.down)}: it reads the intermediate's rows in {orders[1]} order, "
                f"but up writes them in {orders[0]} order; tune this entry again"
            )

    def closest(self, layer: ExpertLayer, places: dict[int, list[Decision]]) -> list[Decision]:
        """Return the decisions of the closest environment, and of the others what fills its gaps and fits it."""
        groups = [places[place] for place in sorted(places)]
        for gemm in layer.gemms:
            self._check_uniform(gemm, groups[0])
        return side_by_side(groups, self.alike)

    def alike(self, decision: Decision, other: Decision) -> bool:
        return all(self._kind(gemm, decision) == self._kind(gemm, other) for gemm in decision.layer.gemms)

    def series(self, decisions: list[Decision]) -> Series:
        entries = tuple(entry_of(self._registry, d.up.config, d.down.config, bucket=d.bucket) for d in decisions)
        return Series(tuple(d.bucket.tokens for d in decisions), tuple(d.bucket.above for d in decisions), entries)

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
        kernel = self._registry[config.kernel]
        classes = numerics_class(kernel, gemm, config, self._environment) if self._policy == "reproducible" else ""
        return _stored_as(kernel, gemm, config), classes


def entry_of(
    registry: Registry, up: TileConfig, down: TileConfig, *, bucket: Bucket | None = None, reason: str = ""
) -> Entry:
    """Return the entry that runs two configs, each by the kernel that it names."""
    return Entry(
        up_kernel=registry[up.kernel], up=up, down_kernel=registry[down.kernel], down=down, bucket=bucket, reason=reason
    )


def default_pair(
    registry: Registry, environment: Environment, layer: ExpertLayer, tokens: int, like: Entry | None = None
) -> tuple[TileConfig, TileConfig]:
    """Return the default up and down configs; with `like`, of its weight layouts and numerics classes.

    A default may be another kernel's than the one that is asked. Where the two defaults take the intermediate
    in different orders, one of them gives way to the first config of its layout and class that goes with the
    other. Raises DeviceError if no kernel runs the layer, ConfigError if no two configs go together.
    """
    up_kernel = registry.default_kernel(layer.up, environment) if like is None else like.up_kernel
    down_kernel = registry.default_kernel(layer.down, environment) if like is None else like.down_kernel
    up = up_kernel.default(layer.up, tokens, environment, like=None if like is None else like.up)
    down = down_kernel.default(layer.down, tokens, environment, like=None if like is None else like.down)
    written, read = registry[up.kernel].order(layer.up, up), registry[down.kernel].order(layer.down, down)
    if written == read:
        return up, down
    if (other := _with_order(registry, environment, layer.down, tokens, down, written)) is not None:
        return up, other
    if (other := _with_order(registry, environment, layer.up, tokens, up, read)) is not None:
        return other, down
    raise ConfigError(
        f"the defaults of {layer.label} at {tokens_text(tokens)} do not go together: {up.label} writes the "
        f"intermediate in {written} order, {down.label} reads it in {read} order; tune this layer"
    )


def _with_order(
    registry: Registry, environment: Environment, gemm: ExpertGemm, tokens: int, config: TileConfig, order: str
) -> TileConfig | None:
    own = registry[config.kernel]
    wanted = _stored_as(own, gemm, config), numerics_class(own, gemm, config, environment)
    kernels = [k for k in registry if k.device_kind == environment.device_kind and not k.rejects(gemm, environment)]
    for kernel in sorted(kernels, key=lambda k: k is not own):
        for other in kernel.space(gemm, tokens, environment):
            if kernel.order(gemm, other) != order or registry.invalid(gemm, other, environment) is not None:
                continue
            if (_stored_as(kernel, gemm, other), numerics_class(kernel, gemm, other, environment)) == wanted:
                return other
    return None


def _stored_as(kernel: Kernel, gemm: ExpertGemm, config: TileConfig) -> str:
    """Return the layout of the weights; only the plain one is common to kernels, others' names are each kernel's."""
    layout = kernel.layout(gemm, config)
    return layout if layout == PLAIN else f"{kernel.name} {layout}"


def _entry_name(decision: Decision, gemm: ExpertGemm) -> str:
    bucket = decision.bucket
    covered = tokens_text(1) if bucket.tokens == 1 else f"{spans([bucket])} tokens"
    return f"entry {decision.layer.label}, {covered}, {decision.policy}, {gemm.name}"


def routing_of(table: TuningTable, policy: str, environments: frozenset[str]) -> str:
    """Return the routing profile that a table's decisions of a policy, made in some environments, are for.

    A table is tuned for one; without decisions, and where several tables were merged and one is for uniform routing,
    it is that. Raises CoverageError for several others.
    """
    found = {d.routing for d in table.decisions if d.policy == policy and d.environment in environments}
    if not found or "uniform" in found:
        return "uniform"
    if len(found) > 1:
        names = ", ".join(sorted(found))
        raise CoverageError(f"the table is tuned for several routing profiles: {names}; set TM_GEMM_ROUTING to one")
    return found.pop()


def spans(buckets: Iterable[Bucket]) -> str:
    """Return buckets as text, such as `1, 2–16, 17–64`; `no` for none."""
    parts = [str(b.tokens) if b.tokens == b.above + 1 else f"{b.above + 1}–{b.tokens}" for b in buckets]
    return ", ".join(parts) or "no"
