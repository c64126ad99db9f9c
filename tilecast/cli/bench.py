"""`tilecast bench`: tuned configs against the defaults and against what users have today."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.cli._bench_tables import bench_json, show_bench, show_placed
from tilecast.cli._exit import resumable
from tilecast.cli._layers import ShardedModel, sharded
from tilecast.cli._options import (
    BudgetOption,
    EpOption,
    JsonOption,
    LayerOption,
    OptionalModelArgument,
    PolicyOption,
    StoreOption,
    TableOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    model_or_layer,
    parse_budget,
    parse_dtypes,
    parse_policy,
    parse_token_option,
)
from tilecast.cli._output import Output, json_text, plural
from tilecast.cli._placement import (
    GpuExpertsOption,
    PlacedLayers,
    benched_layers,
    break_even_json,
    break_even_lines,
    break_evens,
    parse_gpu_experts,
)
from tilecast.cli._run import reported_tuning, use_threads
from tilecast.cli._stores import check_configs, read_table, store_location
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer
from tilecast.settings import Settings, launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilecast.engine.bench_result import BenchResult
    from tilecast.engine.peers import Peer
    from tilecast.engine.placed_choice import Shares
    from tilecast.engine.streaming import BreakEven
    from tilecast.environment import Environment

    Parts = tuple[tuple[Environment, tuple[ExpertLayer, ...]], ...]

LAYER = "E=8,H=1024,I=3584,k=2"
DTYPES = ("fp32", "bf16", "fp16")
TOKENS = (1, 4, 16, 64, 256)
LAYER_TIMING_S = 120.0
"""Time for timing one layer where no budget is given."""
TUNING_SHARE = 0.6
"""Part of a budget that tuning may take where something has to be tuned."""


def bench(
    model: OptionalModelArgument = None,
    layer: LayerOption = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    tokens: TokensOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPES",
            help="Dtypes, comma-separated. Default: the model's; all of fp32,bf16,fp16 without MODEL.",
            show_default=False,
        ),
    ] = None,
    policy: PolicyOption = None,
    table_file: TableOption = None,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Tune first what the table lacks.")] = True,
    budget: BudgetOption = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=10_000, metavar="N", help="Most samples per point.")
    ] = 20,
    threads: ThreadsOption = None,
    gpu_experts: GpuExpertsOption = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            metavar="NAMES",
            help="Contestants to compare with, comma-separated, or none. Default: all that run here.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write the JSON document into this file, too.", show_default=False),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Time expert layers: tuned, with default configs, and by what PyTorch and transformers offer.

    All contestants run interleaved in this process on the same operands, with weights read from memory and not
    from a cache, and are checked against float64. What the table lacks is tuned first. Without MODEL the layer
    is E=8,H=1024,I=3584,k=2 in fp32, bf16 and fp16.

    Examples:

        tilecast bench --threads 2 --json > bench.json

        tilecast bench mixtral-8x7b --tp 8 --table mixtral.db --peers "torch loop"

        tilecast bench mixtral-8x7b --gpu-experts 2 --tokens 1,64 --peers none
    """  # fmt: skip
    from tilecast.cache_store.files import check_writable, write_atomically
    from tilecast.engine.peers import PEERS, find_peers

    output = Output(json_wanted=json_)
    if launcher() is not None:
        raise UsageError("bench times one process, but a launcher started several; start it without torchrun")
    settings = Settings.from_environment()
    chosen = parse_policy(policy, settings.policy)
    counts = parse_token_option(tokens, TOKENS)
    budget_s = parse_budget(budget)
    contestants = PEERS if peers is None else find_peers(_names(peers))
    choice = parse_gpu_experts(gpu_experts, tp=tp, ep=ep)
    splits = _splits(model_or_layer(model, layer, LAYER), tp, ep, dtype, default=model is None and layer is None)
    layers = tuple(dict.fromkeys(layer for split in splits for layer in split.layers))
    where = store_location(store, settings)
    if save is not None:
        check_writable(save.expanduser())
    used = use_threads(threads)
    placed = None if choice is None else benched_layers(splits, choice)
    source = table_file or settings.import_from
    found = TuningTable() if source is None else _read(source)
    output.note(
        f"{plural(len(layers), 'layer')} × {plural(len(counts), 'token count')}, {chosen}, {plural(used, 'thread')}"
    )
    if placed is not None:
        placed.explain(output)
    before, tuned = found.digest, 0
    if tune:
        found, tuned, budget_s = _tuned(output, found, _parts(layers, placed), counts, chosen, where, budget_s)
    elif source is None:
        output.warn("no table is in use and --no-tune is given: the default configs are timed")
    share_s = LAYER_TIMING_S if budget_s is None else budget_s / len(layers)
    result = _timed(
        output, found, layers, counts, chosen, contestants, rounds=rounds, share_s=share_s, threads=used,
        placed=() if placed is None else placed.shares,
    )  # fmt: skip
    sent = [] if placed is None else _break_evens(placed, found, chosen)
    document = {
        **bench_json(result, source=source, imported=before, table=found, tuned=tuned),
        "break_even": None if placed is None else break_even_json(sent),
    }
    if save is not None:
        write_atomically(save.expanduser(), json_text(document).encode("utf-8"))
    output.emit(document)
    show_bench(output, result)
    show_placed(output, result, break_even_lines(sent))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--peers is {text!r:.40}, expected names with commas between them, or none")
    return [] if names == ["none"] else names


def _splits(spec: str, tp: int, ep: int, dtype: str | None, *, default: bool) -> tuple[ShardedModel, ...]:
    """Return the model in each of the dtypes asked for."""
    dtypes: Sequence[str | None] = parse_dtypes(dtype) if dtype is not None else DTYPES if default else (None,)
    return tuple(sharded(spec, tp=tp, ep=ep, dtype=name) for name in dtypes)


def _parts(layers: tuple[ExpertLayer, ...], placed: PlacedLayers | None) -> Parts:
    """Return the layers to tune by the device that runs them, this one first."""
    from tilecast import environment

    if placed is None:
        return ((environment.here(), layers),)
    (near, shares), *far = placed.parts
    return ((near, tuple(dict.fromkeys((*layers, *shares)))), *far)


def _break_evens(placed: PlacedLayers, table: TuningTable, policy: str) -> list[tuple[Shares, BreakEven]]:
    from tilecast.engine.runtime import default_registry
    from tilecast.engine.table_runtime import Runtime

    runtime = Runtime(table, environment=placed.near, registry=default_registry(), policy=policy)
    return break_evens(placed, table, policy=policy, routing=runtime.routing)


def _read(source: str) -> TuningTable:
    from tilecast import environment

    table = read_table(source)
    check_configs(table, environment.here(), source)
    return table


def _tuned(
    output: Output,
    table: TuningTable,
    parts: Parts,
    counts: tuple[int, ...],
    policy: str,
    where: str,
    budget_s: float | None,
) -> tuple[TuningTable, int, float | None]:
    """Return the table with what it lacked, how many buckets those were, and what is left of the budget."""
    import time

    from tilecast.cache_store.store import open_store
    from tilecast.engine.group import Group
    from tilecast.engine.runtime import default_registry
    from tilecast.engine.table_runtime import Runtime, missing_buckets
    from tilecast.engine.tuning import tune_missing

    (here, _), *_ = parts
    first = Runtime(table, environment=here, registry=default_registry(), policy=policy)
    runtimes = [first if place == here else first.with_environment(place) for place, _ in parts]
    missing = [
        {layer: missing_buckets(runtime, layer, counts) for layer in layers}
        for runtime, (_, layers) in zip(runtimes, parts, strict=True)
    ]
    numbers = [sum(map(len, found.values())) for found in missing]
    lacking = sum(numbers)
    if not lacking:
        return table, 0, budget_s
    output.note(f"the table lacks {plural(lacking, 'bucket')}: tuning them first; measurements go to {where}")
    start = time.monotonic()
    share_s = None if budget_s is None else TUNING_SHARE * budget_s
    with resumable("measurements made"), reported_tuning(output) as progress, open_store(where) as opened:
        for runtime, found, number in zip(runtimes, missing, numbers, strict=True):
            if number:
                part_s = None if share_s is None else share_s * number / lacking
                # What a runtime lacks of its own device does not depend on what was tuned for the other.
                tuned = tune_missing(runtime, found, opened, Group.alone(), budget_s=part_s, progress=progress)
                table = table.merged(tuned)
    left = None if budget_s is None else max(1.0, budget_s - (time.monotonic() - start))
    return table, lacking, left


def _timed(
    output: Output,
    table: TuningTable,
    layers: tuple[ExpertLayer, ...],
    counts: tuple[int, ...],
    policy: str,
    peers: Sequence[Peer],
    *,
    rounds: int,
    share_s: float,
    threads: int,
    placed: Sequence[Shares],
) -> BenchResult:
    from tilecast.engine.bench import bench_layer

    result: BenchResult | None = None
    with output.progress("timing") as reporter:
        for place, layer in enumerate(layers):
            done = [place * len(counts)]

            def report(text: str, done: list[int] = done) -> None:
                total = len(layers) * len(counts)
                reporter.update(done=done[0], total=total, text=text, remaining_s=None)
                done[0] += 1

            found = bench_layer(
                layer, counts, table=table, policy=policy, peers=peers, rounds=rounds, budget_s=share_s,
                threads=threads, progress=report, placed=[shares for shares in placed if shares.layer == layer],
            )  # fmt: skip
            result = found if result is None else result.merged(found)
    assert result is not None, "a model has at least one layer"
    return result
