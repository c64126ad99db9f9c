"""`tilecast tune`: measure a model's expert layers on this machine and decide on configs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._forecast import report_forecast
from tilecast.cli._layers import ShardedModel, sharded
from tilecast.cli._options import (
    BudgetOption,
    DtypeOption,
    EffortOption,
    EpOption,
    FromRecordOption,
    JsonOption,
    OptionalModelArgument,
    PolicyOption,
    RoutingOption,
    SeedOption,
    ShareOption,
    StoreOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    WeightsOption,
    check_writable,
    parse_budget,
    parse_policy,
    parse_token_option,
    parse_weights,
    weights_text,
)
from tilecast.cli._output import Output, duration, plural
from tilecast.cli._placement import (
    GpuExpertCountOption,
    PlacedLayers,
    break_even_json,
    break_even_lines,
    break_evens,
    parse_gpu_experts,
    placed_layers,
)
from tilecast.cli._recorded import Missed, read_missed, tune_missed
from tilecast.cli._run import launched_rank, tune_layers, use_threads
from tilecast.cli._stores import store_location
from tilecast.cli._tables import decision_tables, table_json, weak
from tilecast.environment import Environment, here
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer
from tilecast.settings import DEFAULT_TOKENS, Settings

if TYPE_CHECKING:
    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.engine.group import Group
    from tilecast.engine.tuning import Search
    from tilecast.evidence import Measurement


def tune(
    model: OptionalModelArgument = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    policy: PolicyOption = None,
    routing: RoutingOption = None,
    from_record: FromRecordOption = None,
    effort: EffortOption = "standard",
    budget: BudgetOption = None,
    weights: WeightsOption = None,
    share: ShareOption = "replicate",
    gpu_experts: GpuExpertCountOption = None,
    seed: SeedOption = 0,
    store: StoreOption = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the table into this file.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew instead of going on from the store.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be measured and how long it takes, and measure nothing.")
    ] = False,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """Tune a model's expert layers for this machine.

    Every measurement is kept in the store as it is made: stop whenever you like, the same command goes on.
    Where tensor or expert parallelism splits unevenly, each different shard is a layer of its own. Under
    torchrun all ranks measure and the slowest rank's times decide.

    Examples:

        tilecast tune mixtral-8x7b --tp 8 --export mixtral-tp8.db

        tilecast tune E=8,H=1024,I=3584,k=2 --tokens 1,16,256 --budget 3m

        torchrun --nproc-per-node 4 -m tilecast tune qwen3-30b-a3b --tp 4

        tilecast tune mixtral-8x7b --tp 8 --effort quick --dry-run

        tilecast tune mixtral-8x7b --gpu-experts 2 --export mixtral-gpu2.db

        tilecast tune --from-record seen.json --routing seen.json --export more.db
    """
    from tilecast.autotune.routing_profiles import load_profile
    from tilecast.cache_store.bundle import export_table
    from tilecast.engine.agreement import process_group
    from tilecast.engine.tuning import Search

    rank = launched_rank()
    output = Output(json_wanted=json_, rank=rank)
    settings = Settings.from_environment()
    chosen = parse_policy(policy, settings.policy)
    counts = parse_token_option(tokens, DEFAULT_TOKENS)
    budget_s = parse_budget(budget)
    shares = None if weights is None else parse_weights(weights)
    Search(effort=effort, share=share)  # Usage errors come before anything is read.
    if model is None and from_record is None:
        raise UsageError("neither MODEL nor --from-record is given; name a preset, a config.json, a folder or a spec")
    choice = parse_gpu_experts(gpu_experts, tp=tp, ep=ep)
    if choice is not None and (model is None or from_record is not None):
        raise UsageError("--gpu-experts needs MODEL, and leaves nothing to --from-record; leave out one of the two")
    split = None if model is None else sharded(model, tp=tp, ep=ep, dtype=dtype)
    where = store_location(store, settings)
    use_threads(threads)
    group = process_group()
    with group.guard():
        if rank == 0 and export is not None:
            check_writable("--export", export)
        named = settings.routing if routing is None else routing
        profile = None if named is None else load_profile(named)
        layers = None if split is None else split.layers
        missed, calls = (None, None) if from_record is None else read_missed(from_record, layers, output)
    if shares is None and calls is not None:
        shares = calls
        output.note(f"weights as recorded: {weights_text(shares)}")
    search = Search(effort=effort, seed=seed, weights=shares, share=share)
    placed = None if choice is None or split is None else placed_layers(split, choice)
    if split is not None:
        split.explain(output)
    if placed is not None:
        placed.explain(output)
        profile = placed.profile(profile)
    parts = _parts(split, placed)
    if dry_run:
        wanted = _wanted(parts, missed, counts, as_missed=tokens is None)
        report_forecast(output, wanted, policy=chosen, profile=profile, search=search, folder=settings.cache_dir)
        return
    if missed is not None:
        output.note(f"measurements go to {where}")
        table = tune_missed(
            missed, None if tokens is None else counts, policy=chosen, profile=profile, base=settings.import_from,
            where=where, group=group, output=output, search=search, budget_s=budget_s, fresh=fresh,
        )  # fmt: skip
    else:
        table = _tune_parts(
            parts, counts, policy=chosen, profile=profile, where=where, group=group, output=output, search=search,
            budget_s=budget_s, fresh=fresh,
        )  # fmt: skip
    evidence: list[Measurement] = []
    with group.guard():
        if rank == 0:
            evidence = _evidence(table, where)
        if rank == 0 and export is not None:
            export_table(table, export, evidence)
        group.gather("exported", b"")
    _report(
        output, split, table, evidence, where=where, export=export, ranks=group.world_size, weights=shares,
        placed=placed, policy=chosen, routing="uniform" if profile is None else profile.name,
    )  # fmt: skip


Parts = tuple[tuple[Environment, tuple[ExpertLayer, ...]], ...]
"""The layers to tune by the device that runs them."""


def _parts(split: ShardedModel | None, placed: PlacedLayers | None) -> Parts:
    if placed is not None:
        return placed.parts
    return () if split is None else ((here(), split.layers),)


def _wanted(
    parts: Parts, missed: Missed | None, counts: tuple[int, ...], *, as_missed: bool
) -> list[tuple[Environment, dict[ExpertLayer, tuple[int, ...]]]]:
    """Return the token counts to tune by device and layer: those that were missed, or `counts`."""
    if missed is None:
        return [(place, dict.fromkeys(layers, counts)) for place, layers in parts]
    return [(here(), {layer: tuple(sorted(seen)) if as_missed else counts for layer, seen in missed.items()})]


def _tune_parts(
    parts: Parts,
    counts: tuple[int, ...],
    *,
    policy: str,
    profile: RoutingProfile | None,
    where: str,
    group: Group,
    output: Output,
    search: Search,
    budget_s: float | None,
    fresh: bool,
) -> TuningTable:
    """Tune the layers of every device, each with its part of the budget by how many it has."""
    total = sum(len(layers) for _, layers in parts)
    _announce(output, total, counts, policy, budget_s, where)
    table = TuningTable()
    for place, layers in parts:
        tuned = tune_layers(
            layers, counts, policy=policy, routing=profile, where=where, group=group, output=output, search=search,
            budget_s=None if budget_s is None else budget_s * len(layers) / total, fresh=fresh, on=place,
        )  # fmt: skip
        table = table.merged(tuned)
    return table


def _announce(
    output: Output, layers: int, counts: tuple[int, ...], policy: str, budget_s: float | None, where: str
) -> None:
    shown = ", ".join(map(str, counts[:12])) + (f", … {counts[-1]}" if len(counts) > 12 else "")
    within = "" if budget_s is None else f", within {duration(budget_s)}"
    noun = "token" if counts == (1,) else "tokens"
    output.note(f"tuning {plural(layers, 'layer')} for {shown} {noun}, policy {policy}{within}")
    output.note(f"measurements go to {where}")


def _evidence(table: TuningTable, where: str) -> list[Measurement]:
    """Return the measurements that the decisions rest on."""
    from tilecast.autotune.explain import deciding_measurements
    from tilecast.cache_store.store import open_store

    with open_store(where, create=False, read_only=True) as store:
        return deciding_measurements(table, store)


def _report(
    output: Output,
    split: ShardedModel | None,
    table: TuningTable,
    evidence: list[Measurement],
    *,
    where: str,
    export: Path | None,
    ranks: int,
    weights: dict[int, float] | None,
    placed: PlacedLayers | None,
    policy: str,
    routing: str,
) -> None:
    from tilecast.autotune.explain import table_costs
    from tilecast.cli._explained import cost_lines, costs_json
    from tilecast.cli._peers import peer_table, peer_times_or_warning, peers_json
    from tilecast.kernels import registry

    costs = table_costs(table, evidence, registry, weights=weights)
    peers = peer_times_or_warning(output, table, evidence, Settings.from_environment())
    sent = [] if placed is None else break_evens(placed, table, policy=policy, routing=routing)
    document: dict[str, Json] = {
        "command": "tune",
        "model": None if split is None else split.to_json(),
        "store": where,
        "export": None if export is None else str(export),
        "ranks": ranks,
        "table": table_json(table),
        "reproducibility": costs_json(costs, table),
        "peers": peers_json(peers),
        "break_even": None if placed is None else break_even_json(sent),
    }
    output.emit(document)
    output.show(*decision_tables(table.decisions), *peer_table(peers), *cost_lines(costs, table))
    output.show(*break_even_lines(sent))
    uncertified = weak(table.decisions)
    if uncertified:
        output.warn(f"{plural(len(uncertified), 'decision')} could not be certified on this device as reproducible")
    if export is not None:
        output.show(f"{export}: {plural(len(table), 'decision')}, table {table.digest[:12]}")
        output.show(f"Use it with TM_GEMM_IMPORT={export}")
