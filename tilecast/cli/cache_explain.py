"""`tilecast cache explain`: the race behind one decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._layers import sharded
from tilecast.cli._options import EpOption, JsonOption, TpOption, parse_weights
from tilecast.cli._output import Output
from tilecast.cli._stores import origins, store_location
from tilecast.environment import Environment
from tilecast.errors import CoverageError, InputError, ModelError, UsageError
from tilecast.evidence import POLICIES, Decision, TuningTable
from tilecast.problem import ExpertLayer, tokens_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.cache_store.bundle import Evidence

DEFAULT_STORE = "store"
SHOWN = 30
"""Configs of a race that are printed unless all are asked for."""
LISTED = 8
"""Layers that an error names; a table may have hundreds."""


def explain(
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE", help="An exported file, a store, or a SQLAlchemy URL; `store` is the default store."
        ),
    ],
    layer: Annotated[
        str,
        typer.Argument(
            metavar="LAYER",
            help="A layer: text in its label, the start of its digest, its number in the table from 1, "
            "or a model or spec as `tune` takes it.",
        ),
    ],
    tokens: Annotated[int, typer.Argument(metavar="TOKENS", min=1, help="Token count; its bucket is explained.")],
    tp: TpOption = 1,
    ep: EpOption = 1,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="Decisions of this policy. Default: reproducible if there are any.",
            show_default=False,
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="NAME",
            help="Decisions of this routing profile. Default: uniform if there are any.",
            show_default=False,
        ),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            "--environment",
            metavar="DIGEST",
            help="Start of the environment's digest. Default: the one that fits.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="T=W,…",
            help="Token counts' shares of the calls, as given to tune: 1=0.9,64=0.1.",
            show_default=False,
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help=f"Show every config that ran, not the {SHOWN} fastest only.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Show why a config was chosen: who ran, who was cut when and why, who won by how much.

    Everything is computed from the measurements in the table, which `tune --export` and `cache export
    --measurements` put there.

    Examples:

        tilecast cache explain mixtral.db mixtral-8x7b 64 --tp 8

        tilecast cache explain mixtral.db 1 64 --json
    """  # fmt: skip
    from tilecast import environment as environments
    from tilecast.autotune.explain import explain as explained
    from tilecast.autotune.explain import series_of
    from tilecast.cache_store.bundle import open_evidence
    from tilecast.cache_store.queries import keeping_all
    from tilecast.cli._explained import explanation_json, show_explanation
    from tilecast.cli._peers import peer_times_or_warning, peers_json
    from tilecast.kernels import registry

    if policy is not None and policy not in POLICIES:
        raise UsageError(f"--policy is {policy!r:.40}, expected one of {', '.join(POLICIES)}")
    if environment == "":
        raise UsageError("--environment is '', expected the start of an environment's digest")
    shares = parse_weights(weights)
    output = Output(json_wanted=json_)
    where = store_location(None, Settings.from_environment()) if table == DEFAULT_STORE else table
    here = environments.seen()
    with keeping_all(), open_evidence(where) as evidence:
        found = evidence.table(_layer(evidence, layer, where, tp=tp, ep=ep))
        series = _series(found, where, here, (policy, routing, environment))
        decision = _covering(series, tokens, where)
        measurements = evidence.of(decision)
        # Of a store it takes longer than the rest of its decisions do, and only people are shown it.
        digest = None if json_ else evidence.digest()
    made = next(e for e in found.environments if e.digest == decision.environment)
    ours = environments.kernel_source_digest(made.device_kind) == made.kernel_source
    with keeping_all():
        explanation = explained(
            decision, series_of(decision, found), measurements, made, registry if ours else None, weights=shares
        )
    alone = TuningTable((made,), (decision,))
    peers = peer_times_or_warning(output, alone, measurements, Settings.from_environment())
    origin = next(o for o in origins(found.for_environment(made.digest), here))
    if digest is not None:
        output.line(f"{where}, table {digest[:12]}, made on {origin}")
    used: dict[str, Json] = {"usable_here": origin.usable, "hard": list(origin.hard), "soft": list(origin.soft)}
    output.emit(
        {"command": "cache explain", "source": where, "tokens": tokens, **used, **explanation_json(explanation),
         "peers": peers_json(peers)}
    )  # fmt: skip
    show_explanation(output, explanation, peers, entrants=None if all_ else SHOWN)


def _layer(evidence: Evidence, text: str, source: str, *, tp: int, ep: int) -> ExpertLayer:
    """Return the one layer of a table that `text` names. Raises InputError for none or several."""
    digests = evidence.layer_digests()
    if text.isdecimal() and 1 <= int(text) <= len(digests):
        return evidence.layers([digests[int(text) - 1]])[0]
    present = evidence.layers(digests)
    named = _named(present, text, tp=tp, ep=ep)
    if len(named) != 1:
        places = [(i, layer) for i, layer in enumerate(present, start=1) if not named or layer in named]
        shown = "; ".join(f"{i}: {layer.label} ({layer.digest[:8]})" for i, layer in places[:LISTED])
        if len(places) > LISTED:
            shown += f"; and {len(places) - LISTED} more, which `tilecast cache show` lists"
        count = f"matches {len(named)} layers" if named else "is no layer"
        raise InputError(f"{text!r:.60} {count} of {source}; it has: {shown or 'none'}")
    return named[0]


def _named(present: list[ExpertLayer], text: str, *, tp: int, ep: int) -> list[ExpertLayer]:
    lower = text.lower()
    # Six digits, so that a size such as "896" is never taken for a digest.
    found = [x for x in present if lower in x.label.lower() or (len(text) >= 6 and x.digest.startswith(lower))]
    exact = [x for x in found if x.label.lower() == lower]
    if found:
        return exact or found
    try:
        wanted = sharded(text, tp=tp, ep=ep).layers
    except ModelError:
        return []
    return [x for x in present if x in wanted]


def _series(
    table: TuningTable, source: str, here: Environment, wanted: tuple[str | None, str | None, str | None]
) -> list[Decision]:
    """Return a layer's decisions of one policy, routing profile and environment. Raises InputError, CoverageError."""
    policy, routing, digest = wanted
    start = (digest or "").lower()
    fits = {e.digest for e in table.environments if here.accepts(e)}
    kept = [
        d for d in table.decisions
        if policy in (None, d.policy) and routing in (None, d.routing) and d.environment.startswith(start)
    ]  # fmt: skip
    if not kept:
        raise CoverageError(f"{source} has no decision of this layer with these options; see `tilecast cache show`")
    best = min(
        kept, key=lambda d: (d.environment not in fits, d.policy != "reproducible", d.routing != "uniform", d.sort_key)
    )
    others = {d.environment for d in kept}
    if digest is None and best.environment not in fits and len(others) > 1:
        names = ", ".join(sorted(other[:12] for other in others))
        raise InputError(f"{source} has this layer for several devices, none of them this one: --environment {names}")
    return [d for d in kept if d.sort_key[:4] == best.sort_key[:4]]


def _covering(series: list[Decision], tokens: int, source: str) -> Decision:
    for decision in series:
        if decision.bucket.above < tokens <= decision.bucket.tokens:
            return decision
    counts = ", ".join(str(d.bucket.tokens) for d in series)
    raise CoverageError(f"no decision of {source} covers {tokens_text(tokens)}; this layer's buckets end at {counts}")
