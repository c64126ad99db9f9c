"""Tuning by all ranks together: each measures, rank 0 decides on everybody's measurements, all adopt.

All ranks tune the same plan (the union of their layers). What any of them has measured before or measures now
is merged, so all go through the same steps.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tilecast.autotune.calibrate import Calibration, calibration_for
from tilecast.autotune.classes import ClassVerifier
from tilecast.autotune.plan import Plan
from tilecast.autotune.ranks import slow_ranks
from tilecast.autotune.routing_profiles import RoutingProfile, as_profile
from tilecast.autotune.search import strategy_for
from tilecast.autotune.tools import Tools, device_tools
from tilecast.autotune.tuner import EFFORT, MIN_BUDGET_S, Hints, broken_classes, decide, latest_run, measure_plan
from tilecast.autotune.warm import warm_hints
from tilecast.cache_store.interop.peers import PeerFolder
from tilecast.cache_store.memory import MemoryStore
from tilecast.canonical import Json, canonical_json
from tilecast.engine.agreement import agree_on_environment, agree_on_table, gather_layers
from tilecast.engine.anchored import anchored_registry
from tilecast.engine.group import Group
from tilecast.engine.runtime import default_registry
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment
from tilecast.errors import AgreementError, UsageError
from tilecast.evidence import Measurement, TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, GemmName, TileConfig
from tilecast.settings import Settings
from tilecast.store import Store

if TYPE_CHECKING:
    from tilecast.autotune.measure import Measurer
    from tilecast.autotune.race import Progress

logger = logging.getLogger(__name__)

SHARES = ("replicate", "split")
"""Whether every rank measures every config, or ranks share out those of the first rounds."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How thoroughly, and for what workload, ranks tune; equal on all of them.

    effort: `quick`, `standard`, `exhaustive`, or a strategy's name. seed: of what is drawn at random. weights: how
    often layers are called with how many tokens, None if nothing is known. share: one of `SHARES`.
    """

    effort: str = EFFORT
    seed: int = 0
    weights: Mapping[int, float] | None = None
    share: str = "replicate"

    def __post_init__(self) -> None:
        """Validate; raises UsageError."""
        strategy_for(self.effort)
        if self.share not in SHARES:
            raise UsageError(f"share is {self.share!r}, expected one of {', '.join(SHARES)}")


def tune_together(
    plan: Plan,
    store: Store | None,
    group: Group,
    *,
    registry: Registry | None = None,
    measurer: Measurer | None = None,
    search: Search | None = None,
    budget_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    fresh: bool = False,
) -> TuningTable:
    """Tune `plan` on all ranks and return the table that all of them then have.

    Ranks may come with different layers (uneven shards): all measure all of them. Buckets, policy and routing
    must be equal. `store` is rank 0's and keeps every rank's measurements and the decisions; None keeps them
    for this call only. `measurer` is by default this process's device, held for the time of the tuning, and then the
    cost model ranks what it measures. `progress` is called on every rank. Errors of any rank, its death included,
    are raised on all ranks with one message.
    """
    kernels = registry or default_registry()
    search = search or Search()
    with group.guard(), ExitStack() as stack:
        agreed = _agree_on_plan(plan, group)
        tools = _Given(measurer) if measurer is not None else stack.enter_context(_tools(agreed, kernels, group))
        own = store if store is not None and group.rank == 0 else MemoryStore()
        hints = _outside_hints(agreed, own, group) if tools.ranker is not None else None
        deadline = None if budget_s is None else time.monotonic() + budget_s
        while True:
            left = None if deadline is None else max(MIN_BUDGET_S, deadline - time.monotonic())
            measure_plan(
                agreed,
                own,
                kernels,
                measurer=tools.measurer,
                strategy=search.effort,
                ranker=tools.ranker,
                watch=tools.watch,
                ahead=tools.ahead,
                hints=hints,
                split=search.share == "split",
                seed=search.seed,
                weights=search.weights,
                budget_s=left,
                progress=_Watch(group, progress),
                peers=GroupPeers(group),
                fresh=fresh,
            )
            decided, settled = None, True
            if group.rank == 0:
                before = broken_classes(agreed, own)
                verifier = _WatchingVerifier(group, agreed.environment, kernels)
                decided = decide(agreed, own, kernels, verifier=verifier, weights=search.weights)
                settled = broken_classes(agreed, own) == before
            # Configs that failed the class check may have driven others out of the race: those run on without.
            if group.broadcast("settled", b"yes" if settled else b"no") == b"yes":
                break
            fresh = False
        table = agree_on_table(group, decided)
        if group.rank == 0:
            own.put_decisions(list(table.decisions))
            for slow in slow_ranks(latest_run(agreed, own)):
                logger.warning("%s", slow)
    return table


@dataclass(frozen=True)
class _Given:
    """A measurer that came with the call, and nothing else."""

    measurer: Measurer
    ranker: None = None
    watch: None = None
    ahead: None = None


def _tools(plan: Plan, registry: Registry, group: Group) -> AbstractContextManager[Tools]:
    """Return this rank's tools. All rank by rank 0's calibration, as they must take the same steps."""
    settings = Settings.from_environment()

    def calibrate() -> Calibration:
        payload = None
        if group.rank == 0:
            found = calibration_for(plan.environment, registry, folder=settings.cache_dir)
            payload = canonical_json(found.to_json()).encode("ascii")
        return Calibration.from_json(json.loads(group.broadcast("calibration", payload)))

    return device_tools(plan, registry, calibrate=calibrate, ranks=group.world_size, sandbox=settings.sandbox)


def _outside_hints(plan: Plan, store: Store, group: Group) -> Hints:
    """Return what rank 0 knows from elsewhere: its store's other decisions, and imported files of other engines."""
    payload = b""
    if group.rank == 0:
        table = store.table()
        made = {environment.digest: environment for environment in table.environments}
        decided = [
            (made[d.environment], d) for d in table.decisions
            if d.environment != plan.environment.digest or d.layer not in plan.layers
        ]  # fmt: skip
        folder = PeerFolder(Settings.from_environment().cache_dir / "peers")
        found: list[Json] = []
        for gemm, bucket in plan.tasks:
            warm = warm_hints(decided, gemm, bucket.tokens, plan.environment)
            peers = folder.hints_for(gemm, bucket.tokens, plan.environment)
            found.append([config.to_json() for config in dict.fromkeys([*warm, *peers])])
        payload = canonical_json(found).encode("ascii")
    lists = json.loads(group.broadcast("hints", payload))
    known = {
        (gemm, bucket.tokens): tuple(TileConfig.from_json(config) for config in configs)
        for (gemm, bucket), configs in zip(plan.tasks, lists, strict=True)
    }
    return lambda gemm, tokens: known[gemm, tokens]


def tune_missing(
    runtime: Runtime,
    missing: Mapping[ExpertLayer, tuple[Bucket, ...]],
    store: Store | None,
    group: Group,
    *,
    profile: RoutingProfile | None = None,
    measurer: Measurer | None = None,
    search: Search | None = None,
    budget_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    fresh: bool = False,
) -> TuningTable:
    """Tune the buckets that `runtime`'s table lacks and return it with them added, the same on all ranks.

    `missing` must be equal on all ranks. New decisions of a layer that has some read the weight layout, and
    under `reproducible` are of the numerics class, that those have. `profile` is the runtime's
    routing profile, needed where that is a histogram. `budget_s` is shared by the plans that
    this takes, one per distinct set of missing buckets. Raises as `tune_together` does.
    """
    table = runtime.table
    plans = _plans(runtime, missing, as_profile(runtime.routing) if profile is None else profile)
    tasks = sum(len(plan.tasks) for plan, _ in plans) or 1
    for plan, registry in plans:
        share = None if budget_s is None else budget_s * len(plan.tasks) / tasks
        added = tune_together(
            plan, store, group, registry=registry, measurer=measurer, search=search, budget_s=share, progress=progress,
            fresh=fresh,
        )  # fmt: skip
        table = table.merged(added)
    return table


class GroupPeers:
    """The tuner's view of the other ranks: their measurements, merged once per round, and whether to stop."""

    def __init__(self, group: Group) -> None:
        """Merge over `group`."""
        self.rank = group.rank
        self.world_size = group.world_size
        self._group = group

    def merge(self, measurements: Sequence[Measurement], stop: bool) -> tuple[list[Measurement], bool]:
        """Return all ranks' measurements, in rank order, and whether any rank wants to stop."""
        payload = canonical_json({"stop": stop, "measurements": [_to_json(m) for m in measurements]})
        everyone = [json.loads(seen) for seen in self._group.gather("measurements", payload.encode("ascii"))]
        merged = [_from_json(value) for theirs in everyone for value in theirs["measurements"]]
        return merged, any(theirs["stop"] for theirs in everyone)


class _Watch:
    """Progress that also looks whether another rank has failed, so that none measures on for minutes."""

    def __init__(self, group: Group, progress: Callable[[Progress], None] | None) -> None:
        self._group = group
        self._progress = progress

    def __call__(self, event: Progress) -> None:
        self._group.check()
        if self._progress is not None:
            self._progress(event)


class _WatchingVerifier(ClassVerifier):
    """The class check, which takes minutes on large layers, looking between configs whether another rank failed."""

    def __init__(self, group: Group, environment: Environment, registry: Registry) -> None:
        super().__init__(environment, registry)
        self._group = group

    def verify(self, gemm: ExpertGemm, config: TileConfig, bucket: Bucket) -> str | None:
        self._group.check()
        return super().verify(gemm, config, bucket)


def _agree_on_plan(plan: Plan, group: Group) -> Plan:
    environment = agree_on_environment(group, plan.environment)
    own: Json = {
        "buckets": [[b.above, b.tokens] for b in plan.buckets], "policy": plan.policy, "routing": plan.routing,
    }  # fmt: skip
    found = group.gather("plan", canonical_json(own).encode("ascii"))
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise AgreementError(
                f"rank {rank} is to tune {theirs.decode('ascii')[:200]}, rank 0 {found[0].decode('ascii')[:200]}; "
                f"start all with the same options"
            )
    layers = dict.fromkeys(layer for theirs in gather_layers(group, plan.layers) for layer in theirs)
    return replace(plan, environment=environment, layers=tuple(layers))


# Staying with the layout and class of what is decided already ------------------------------------------------


def _plans(
    runtime: Runtime, missing: Mapping[ExpertLayer, tuple[Bucket, ...]], profile: RoutingProfile
) -> list[tuple[Plan, Registry]]:
    """Return the plans that cover `missing`: undecided layers together, every decided one for itself."""
    groups: dict[tuple[tuple[Bucket, ...], ExpertLayer | None], list[ExpertLayer]] = {}
    for layer, lacking in missing.items():
        if lacking:
            groups.setdefault((lacking, layer if runtime.buckets(layer) else None), []).append(layer)
    found = []
    for (lacking, decided), layers in groups.items():
        plan = Plan(
            environment=runtime.environment, layers=tuple(layers), buckets=lacking,
            policy=runtime.policy, routing=runtime.routing, profile=profile,
        )  # fmt: skip
        found.append((plan, runtime.registry if decided is None else anchored_registry(runtime, decided)))
    return found


# Measurements between ranks ----------------------------------------------------------------------------------


def _to_json(measurement: Measurement) -> dict[str, Json]:
    plain = ("environment", "tokens", "status", "routing", "numerics", "error_ratio", "rank", "world_size")
    rest = ("run", "round", "detail", "measured_at")
    return {
        "layer": measurement.gemm.layer.to_json(),
        "gemm": measurement.gemm.name,
        "config": measurement.config.to_json(),
        "samples_us": list(measurement.samples_us),
        **{name: getattr(measurement, name) for name in (*plain, *rest)},
    }


def _from_json(value: dict[str, object]) -> Measurement:
    fields: dict[str, Any] = dict(value)
    gemm = ExpertGemm(layer=ExpertLayer.from_json(fields.pop("layer")), name=cast(GemmName, fields.pop("gemm")))
    config = TileConfig.from_json(fields.pop("config"))
    samples = tuple(cast(list[float], fields.pop("samples_us")))
    return Measurement(gemm=gemm, config=config, samples_us=samples, **fields)
