"""Ranks agree on one environment and one table before any of them runs, or all fail with the same message.

Rank 0 reads, tunes and writes; what the others use are the bytes it spread, checked by their digest. What a
rank must decide for itself it decides from data that all ranks have gathered, so all decide the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tilecast.autotune.routing_profiles import RoutingProfile, load_profile
from tilecast.canonical import Json, canonical_json
from tilecast.engine import recording
from tilecast.engine.group import Group
from tilecast.engine.runtime import default_registry, may_run, use_runtime
from tilecast.engine.table_index import spans
from tilecast.engine.table_runtime import Runtime, missing_buckets
from tilecast.environment import Environment, cpu_environment, here
from tilecast.errors import AgreementError, TilecastError
from tilecast.evidence import TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertLayer
from tilecast.settings import DEFAULT_TOKENS, Settings, launcher
from tilecast.store import Store

if TYPE_CHECKING:
    from tilecast.autotune.measure import Measurer
    from tilecast.autotune.race import Progress
    from tilecast.engine.placed_choice import Shares

_group: Group | None = None


def process_group() -> Group:
    """Return this process's group: all ranks under torchrun, else itself alone. Joined once, at the first call.

    Every rank must come here, since joining counts. Raises AgreementError if the others cannot be reached.
    """
    global _group
    if _group is None:
        _group = Group.connect(launched=launcher() is not None)
    return _group


def agree_on_environment(group: Group, environment: Environment | None = None) -> Environment:
    """Return rank 0's environment, once no rank differs from it in a hard field.

    `environment` is this rank's, by default its current GPU's or, where there is none, the CPU's. Raises
    AgreementError, on all ranks, naming the first rank that differs and its fields.
    """
    own = environment or here()
    found = _gather_json(group, "environments", own.to_json())
    environments = [Environment.from_json(value) for value in found]
    for rank, there in enumerate(environments):
        hard = [m for m in environments[0].compare(there) if m.hard]
        if hard:
            fields = "; ".join(f"{m.field}: rank 0 {m.here!r}, rank {rank} {m.there!r}" for m in hard)
            raise AgreementError(f"rank {rank} has another device or toolchain than rank 0: {fields}; use equal ranks")
    return environments[0]


def agree_on_table(group: Group, table: TuningTable | None) -> TuningTable:
    """Return rank 0's table (None: an empty one) on every rank; the others' argument is ignored.

    Raises AgreementError, on all ranks, if any of them did not get the very bytes that rank 0 sent.
    """
    if group.world_size == 1:
        return table or TuningTable()
    sent = (table or TuningTable()).to_bytes() if group.rank == 0 else None
    received = group.broadcast("table", sent)
    digests = [seen.decode("ascii", "replace") for seen in group.gather("digest", _sha256(received))]
    for rank, seen in enumerate(digests):
        if seen != digests[0]:
            raise AgreementError(
                f"rank {rank} received a table of digest {seen[:12]}, rank 0 sent {digests[0][:12]}; start all again"
            )
    with group.guard():
        adopted = TuningTable.from_bytes(received)
        if adopted.to_bytes() != received:
            raise AgreementError(
                "the table is not in its canonical form, so its digest proves nothing; export it again"
            )
    return adopted


def check_coverage(group: Group, runtime: Runtime, layers: Sequence[ExpertLayer]) -> list[list[ExpertLayer]]:
    """Return every rank's layers, once for each of them all ranks hit, or all miss, at the same token counts.

    Layers are compared by their place in the list: with uneven shards they are different ones. Raises
    AgreementError on all ranks.
    """
    everyone = gather_layers(group, layers)
    for place in range(len(everyone[0])):
        first = runtime.buckets(everyone[0][place])
        for rank, theirs in enumerate(everyone):
            found = runtime.buckets(theirs[place])
            if found != first:
                raise AgreementError(
                    f"the table covers {everyone[0][place].label} of rank 0 at {spans(first)} tokens, but "
                    f"{theirs[place].label} of rank {rank} at {spans(found)} tokens; tune it for all ranks' shards"
                )
    return everyone


def gather_layers(group: Group, layers: Sequence[ExpertLayer]) -> list[list[ExpertLayer]]:
    """Return every rank's layers, in rank order. Raises AgreementError if they are not equally many."""
    found = _gather_json(group, "layers", [layer.to_json() for layer in layers])
    everyone = [[ExpertLayer.from_json(value) for value in _sequence(theirs)] for theirs in found]
    for rank, theirs in enumerate(everyone):
        if len(theirs) != len(everyone[0]):
            raise AgreementError(
                f"rank {rank} has {len(theirs)} layers, rank 0 {len(everyone[0])}; start all with the same model"
            )
    return everyone


def startup(
    layers: Iterable[ExpertLayer],
    settings: Settings | None = None,
    *,
    group: Group | None = None,
    registry: Registry | None = None,
    environment: Environment | None = None,
    store: Store | None = None,
    measurer: Measurer | None = None,
    budget_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    placed: Sequence[Shares] | None = None,
) -> Runtime:
    """Do what the environment variables ask for and return the runtime that is then in use on all ranks.

    Imports (TM_GEMM_IMPORT, read by rank 0), tunes what `layers` (this rank's, in model order) miss
    (TM_GEMM_TUNE, or TM_GEMM_MISS=tune), exports what was agreed on (TM_GEMM_EXPORT, written by rank 0). In
    one process it does the same without others. Every rank must call it. `store` keeps rank 0's measurements,
    by default a file in the cache folder. `placed`, on all ranks or none, are layers with experts on two devices: the
    far shares are tuned for the CPU, and both for the near device, as far experts' weights may be sent there; then
    the near device is the environment's even where the table is for CPUs alone. Errors of any rank are raised, with
    one message, on all: CacheError, ConfigError, CoverageError, AgreementError, DeviceError.
    """
    mine = group or process_group()
    with mine.guard():
        device = agree_on_environment(mine, environment)
        chosen = settings or Settings.from_environment()
        orders = _agree_on_orders(mine, chosen)
        kernels = registry or default_registry()
        table = agree_on_table(mine, _read(chosen) if mine.rank == 0 else None)
        stays = placed is not None or may_run(table, device.device_kind)
        if environment is None and device.device_kind != "cpu" and not stays:
            # All ranks come here or none, as the table and the kind of device are agreed on.
            device = agree_on_environment(mine, cpu_environment())
        two_kinds = placed is not None and device.device_kind != "cpu"
        build = partial(_build, registry=kernels, settings=chosen, orders=orders, optional=two_kinds)
        runtime = build(table, device)
        parts = _parts(mine, device, layers, placed)
        if orders.tokens is not None:
            wanted = orders.for_shares(placed or ())
            tune = partial(
                _tune, mine, settings=chosen, orders=wanted, store=store, measurer=measurer, progress=progress
            )
            table = _with_missing(mine, runtime, parts, orders.tokens, build, tune, budget_s)
            runtime = runtime if table is runtime.table else build(table, device)
        for place, own in parts:
            check_coverage(mine, runtime if place == device else build(table, place), own)
        others = _other_kinds(mine, runtime)
        if mine.rank == 0 and chosen.export_to is not None:
            # Imported here, as in _read: most processes neither import nor export.
            from tilecast.cache_store.bundle import export_table

            export_table(table, chosen.export_to)
        if mine.rank == 0:
            runtime.log_differences()
        # Nobody starts to serve before rank 0 has written: an export that fails ends all.
        mine.gather("ready", b"")
    # Only now, so that a start that failed leaves what was in use as it was.
    recording.start(chosen.record_to)
    return use_runtime(runtime, others)


@dataclass(frozen=True, slots=True)
class _Orders:
    """What rank 0's settings say and all ranks follow. `tokens` is None where nothing is to be tuned.

    `routing` is a profile's name, None where it is to be the table's; `profile` is it where it was read or is a name
    that says all.
    """

    policy: str
    miss: str
    tokens: tuple[int, ...] | None
    routing: str | None = None
    profile: RoutingProfile | None = None

    def for_shares(self, placed: Sequence[Shares]) -> _Orders:
        """Return them with a profile that knows the shares of layers on two devices."""
        if not placed or self.profile is None:
            return self
        # Imported here: that module builds on this one.
        from tilecast.engine.placed_choice import profile_of_shares

        return replace(self, profile=profile_of_shares(self.profile, placed))


def _agree_on_orders(group: Group, settings: Settings) -> _Orders:
    tokens: tuple[int, ...] | None = None
    if settings.tune is not None:
        tokens = settings.tune.tokens
    elif settings.miss == "tune":
        tokens = DEFAULT_TOKENS
    own: dict[str, Json] = {
        "policy": settings.policy,
        "miss": settings.miss,
        "tokens": None if tokens is None else list(tokens),
        "routing": settings.routing,
        "profile": None,
    }
    if group.rank == 0 and settings.routing is not None and not settings.routing.startswith("histogram:"):
        # Its file need be there for rank 0 only.
        profile = load_profile(settings.routing)
        own.update(routing=profile.name, profile=profile.to_json())
    first = json.loads(group.broadcast("orders", canonical_json(own).encode("ascii")))
    agreed, sent = first["tokens"], first["profile"]
    return _Orders(
        first["policy"],
        first["miss"],
        None if agreed is None else tuple(agreed),
        first["routing"],
        None if sent is None else RoutingProfile.from_json(sent),
    )


def _other_kinds(group: Group, runtime: Runtime) -> dict[str, Runtime | TilecastError]:
    """Return the CPU's runtime on ranks that run on GPUs, if the table decides anything for CPUs.

    Ranks on unlike CPUs get the error instead, which only layers on the CPU ask for. Alone, and without decisions,
    nothing needs to be agreed on: the runtime is made when it is asked for.
    """
    kind = runtime.environment.device_kind
    if group.world_size == 1 or kind == "cpu" or not runtime.table.decisions or not may_run(runtime.table, "cpu"):
        return {}
    try:
        return {"cpu": runtime.with_environment(agree_on_environment(group, cpu_environment()))}
    except TilecastError as error:
        return {"cpu": error}


def _parts(
    group: Group, device: Environment, layers: Iterable[ExpertLayer], placed: Sequence[Shares] | None
) -> list[tuple[Environment, tuple[ExpertLayer, ...]]]:
    """Return this rank's layers by the device that they are tuned for; where all are placed on CPUs that is one."""
    near = dict.fromkeys(layers)
    if placed is None:
        return [(device, tuple(near))]
    far = dict.fromkeys(part.far for part in placed if part.far is not None)
    near.update(dict.fromkeys(own for part in placed for own in part[1:] if own is not None))
    parts = [(device, tuple(near))]
    if device.device_kind != "cpu":
        parts.append((agree_on_environment(group, cpu_environment()), tuple(far)))
    return parts


def _with_missing(
    group: Group,
    runtime: Runtime,
    parts: Sequence[tuple[Environment, tuple[ExpertLayer, ...]]],
    tokens: tuple[int, ...],
    build: Callable[[TuningTable, Environment], Runtime],
    tune: Callable[..., TuningTable],
    budget_s: float | None,
) -> TuningTable:
    """Return the runtime's table with what it lacks of all ranks' layers, tuned on one device after the other."""
    table = runtime.table
    lacking = []
    for place, own in parts:
        everyone = dict.fromkeys(layer for theirs in gather_layers(group, own) for layer in theirs)
        there = runtime if place == runtime.environment else build(table, place)
        lacking.append((place, {layer: missing_buckets(there, layer, tokens) for layer in everyone}))
    counts = [sum(map(len, missing.values())) for _, missing in lacking]
    for (place, missing), count in zip(lacking, counts, strict=True):
        if count:
            share = None if budget_s is None else budget_s * count / sum(counts)
            table = tune(build(table, place), missing, budget_s=share)
    return table


def _build(
    table: TuningTable,
    here: Environment,
    registry: Registry,
    settings: Settings,
    orders: _Orders,
    *,
    optional: bool = False,
) -> Runtime:
    return Runtime(
        table,
        environment=here,
        registry=registry,
        policy=orders.policy,
        routing=orders.routing,
        miss=orders.miss,
        warn_miss=settings.warn_cache_miss,
        optional=optional,
    )


def _read(settings: Settings) -> TuningTable | None:
    if settings.export_to is None and settings.import_from is None:
        return None
    # Imported here: most processes neither import nor export.
    from tilecast.cache_store.bundle import check_exportable, import_table

    if settings.export_to is not None:
        # Found out now, not after the tuning.
        check_exportable(settings.export_to)
    return None if settings.import_from is None else import_table(settings.import_from)


def _tune(
    group: Group,
    runtime: Runtime,
    missing: dict[ExpertLayer, tuple[Bucket, ...]],
    *,
    settings: Settings,
    orders: _Orders,
    store: Store | None,
    measurer: Measurer | None,
    budget_s: float | None,
    progress: Callable[[Progress], None] | None,
) -> TuningTable:
    # Imported here: serving from a table needs no tuner.
    from tilecast.cache_store.store import open_store
    from tilecast.engine.tuning import tune_missing

    opened = None
    if group.rank == 0 and store is None:
        opened = store = open_store(settings.cache_dir / "store.db")
    try:
        return tune_missing(
            runtime,
            missing,
            store,
            group,
            profile=orders.profile,
            measurer=measurer,
            budget_s=budget_s,
            progress=progress,
        )
    finally:
        if opened is not None:
            opened.close()


def _gather_json(group: Group, name: str, value: Json) -> list[object]:
    return [json.loads(seen) for seen in group.gather(name, canonical_json(value).encode("ascii"))]


def _sequence(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode("ascii")
