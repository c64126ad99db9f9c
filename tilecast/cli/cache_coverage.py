"""`tilecast cache coverage`: what a deployment will ask for, and what a table lacks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._cache_options import RelaxOption
from tilecast.cli._layers import sharded
from tilecast.cli._options import (
    DtypeOption,
    EpOption,
    JsonOption,
    ModelArgument,
    PolicyOption,
    ThreadsOption,
    TokensOption,
    TpOption,
    parse_policy,
    parse_token_option,
    tune_command,
)
from tilecast.cli._output import Output, add_row, plural, table
from tilecast.cli._placement import GpuExpertCountOption, parse_gpu_experts, placed_layers
from tilecast.cli._routing import asked_routing, tuned_routing
from tilecast.cli._run import use_threads
from tilecast.cli._stores import check_configs, read_table, store_location
from tilecast.environment import Environment
from tilecast.errors import CoverageError, InputError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer
from tilecast.settings import DEFAULT_TOKENS, Settings

if TYPE_CHECKING:
    from tilecast.cache_store.match import Alike, Match

Point = tuple[ExpertLayer, int, "Match"]


def coverage(
    model: ModelArgument,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE",
            help="An exported file, a store, or a SQLAlchemy URL. Default: TM_GEMM_IMPORT, else the default store.",
            show_default=False,
        ),
    ] = None,
    tp: TpOption = 1,
    ep: EpOption = 1,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    policy: PolicyOption = None,
    gpu_experts: GpuExpertCountOption = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="NAME",
            help="Decisions of this routing profile. Default: TM_GEMM_ROUTING, else the table's own.",
            show_default=False,
        ),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            "--environment",
            metavar="DIGEST",
            help="Ask for this environment of the table, by the start of its digest. Default: this machine.",
            show_default=False,
        ),
    ] = None,
    relax: RelaxOption = None,
    reach: Annotated[
        float | None,
        typer.Option(
            "--reach",
            min=1.0,
            metavar="X",
            help="A bucket tuned for more than X times the tokens is a gap. Default: a bucket holds for all it covers.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
) -> None:
    """List what a deployment of MODEL will ask for and which of it the table lacks, with the reason field by field.

    Exits with 4 if anything is lacking, for a deploy pipeline; --environment asks on behalf of another machine.

    Examples:

        tilecast cache coverage mixtral-8x7b mixtral.db --tp 8

        tilecast cache coverage mixtral-8x7b mixtral-gpu2.db --gpu-experts 2

        tilecast cache coverage qwen3-30b-a3b fleet.db --tp 4 --tokens 1,16,256 --environment 3f9a12c4 --json
    """  # fmt: skip
    from tilecast.cache_store.match import check_relax, match

    relaxed = check_relax(relax or ())
    output = Output(json_wanted=json_)
    settings = Settings.from_environment()
    chosen = parse_policy(policy, settings.policy)
    counts = parse_token_option(tokens, DEFAULT_TOKENS)
    choice = parse_gpu_experts(gpu_experts, tp=tp, ep=ep)
    split = sharded(model, tp=tp, ep=ep, dtype=dtype)
    if threads is not None:
        use_threads(threads)
    where = source or settings.import_from or store_location(None, settings)
    found = read_table(where)
    place = _place(found, environment, where, whole=json_)
    profile = asked_routing(found, chosen, place, routing or settings.routing, relaxed)
    # Each device with the layers that it will run: two where experts are placed on a GPU and the CPU.
    asked = ((place, split.layers),) if choice is None else placed_layers(split, choice, near=place).runs
    points = []
    for device, layers in asked:
        alike = _check_servable(found, device, chosen, where, here=environment is None)
        points += [
            (layer, count, match(found, device, layer, count, chosen, profile, relax=relaxed, reach=reach, alike=alike))
            for layer in layers
            for count in counts
        ]
    gaps = [point for point in points if not point[2].hit]
    split.explain(output)
    output.emit(
        {
            "command": "cache coverage",
            "source": where,
            "digest": found.digest,
            "model": split.to_json(),
            "environment": {"digest": place.digest, **place.to_json()},
            "policy": chosen,
            "routing": profile,
            "relax": list(relaxed),
            "points": [_point_json(point) for point in points],
            "gaps": len(gaps),
        }
    )
    _show(output, points)
    if gaps:
        command = tune_command(
            model, tp=tp, ep=ep, tokens=tokens, dtype=dtype, policy=chosen, gpu_experts=gpu_experts,
            routing=tuned_routing(routing or settings.routing, profile, settings),
        )  # fmt: skip
        raise CoverageError(
            f"{where} lacks {len(gaps)} of {plural(len(points), 'point')} of {model}; tune what is missing on "
            f"{place.device}: {command}"
        )


def _place(found: TuningTable, digits: str | None, where: str, *, whole: bool) -> Environment:
    """Return the environment that is asked for; with `whole` its thread count, too, and so its usual digest."""
    if digits is None:
        from tilecast import environment

        return environment.here() if whole else environment.seen()
    named = [e for e in found.environments if e.digest.startswith(digits.lower())]
    if len(named) != 1 or not digits:
        has = "; ".join(f"{e.digest[:12]} ({e.device})" for e in found.environments) or "none"
        raise InputError(f"--environment {digits!r:.70} names {len(named)} environments of {where}; it has: {has}")
    return named[0]


def _check_servable(found: TuningTable, place: Environment, policy: str, where: str, *, here: bool) -> Alike:
    """Return which decisions may hold side by side. Raises ConfigError for what serving on this machine would refuse.

    What another machine can run, only that machine knows.
    """
    from tilecast.engine.table_index import alike_under
    from tilecast.kernels import registry

    if here:
        fits = {e.digest for e in found.environments if place.accepts(e)}
        usable = TuningTable(found.environments, tuple(d for d in found.decisions if d.environment in fits))
        check_configs(usable, place, where)
    return alike_under(registry, place, policy)


def _show(output: Output, points: list[Point]) -> None:
    shown = table("What will be asked for", ("layer", "tokens", "by", "why"), left=("layer", "by", "why"))
    for layer, tokens, found in points:
        style = None if found.hit else "bold"
        add_row(shown, layer.label, str(tokens), _by(found, tokens), _why(found), style=style)
    output.show(shown)


def _by(found: Match, tokens: int) -> str:
    """Return which way a point is served: exactly, by a covering bucket, or by the default config."""
    if found.decision is None:
        return "default"
    bucket = found.decision.bucket
    return "exact" if bucket.tokens == tokens else f"bucket {bucket.above + 1}–{bucket.tokens}"


def _why(found: Match) -> str:
    if not found.hit:
        return "; ".join(found.reasons)
    parts = [f"{'relaxed ' if difference.hard else ''}{difference}" for difference in found.differences]
    return "; ".join(parts)


def _point_json(point: Point) -> dict[str, Json]:
    layer, tokens, found = point
    decision = found.decision
    return {
        "layer": layer.label,
        "layer_digest": layer.digest,
        "tokens": tokens,
        "hit": found.hit,
        "by": "default" if decision is None else "exact" if decision.bucket.tokens == tokens else "bucket",
        "bucket": None if decision is None else [decision.bucket.above + 1, decision.bucket.tokens],
        "certificate": None if decision is None else decision.certificate,
        "reasons": list(found.reasons),
        "differences": [
            {"field": d.field, "here": d.here, "there": d.there, "hard": d.hard} for d in found.differences
        ],
    }
