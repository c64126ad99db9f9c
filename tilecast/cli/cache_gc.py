"""`tilecast cache gc`: what is old, foreign or superseded goes out of a store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._cache_options import parse_age
from tilecast.cli._options import JsonOption
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import store_location
from tilecast.cli._tables import span_text
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.cache_store.gc import Collected


def gc(
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="STORE",
            help="A store or a SQLAlchemy URL. Default: the one in the cache folder.",
            show_default=False,
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="AGE", help="What was last measured longer ago: 90d, 12h, 2w.", show_default=False
        ),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            "--environment", metavar="DIGEST", help="What was made there: the start of its digest.", show_default=False
        ),
    ] = None,
    superseded: Annotated[
        bool,
        typer.Option(
            "--superseded",
            help="What a later environment of the same machine (another toolchain) decides, too, "
            "and measurements of runs before the ones that decisions rest on.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """Take measurements and decisions out of a store: those that meet all the conditions given.

    It works in short transactions, so tuning goes on meanwhile, and gives the space back at the end.

    Examples:

        tilecast cache gc --superseded --older-than 90d --dry-run

        tilecast cache gc postgresql+psycopg://host/fleet --environment 3f9a12c4
    """  # fmt: skip
    from tilecast.autotune.explain import deciding_run
    from tilecast.cache_store.gc import Unwanted, collect

    unwanted = Unwanted(
        older_than=None if older_than is None else time.time() - parse_age(older_than),
        environment=environment,
        superseded=superseded,
    )
    output = Output(json_wanted=json_)
    where = store_location(store, Settings.from_environment())
    found = collect(where, unwanted, dry_run=dry_run, deciding=deciding_run)
    output.emit(_document(found, where, dry_run))
    gone = "would go" if dry_run else "gone"
    for decision in found.decisions:
        output.line(
            f"{gone}: {decision.layer.label}, {span_text(decision)}, {decision.policy}, routing {decision.routing}, "
            f"environment {decision.environment[:12]}"
        )
    output.line(
        f"{where}: {gone}: {plural(len(found.decisions), 'decision')}, {plural(found.measurements, 'measurement')}"
    )
    if found.bytes_before is not None and found.bytes_after is not None:
        output.show(f"  {found.bytes_before:,} bytes before, {found.bytes_after:,} after")
    if found.undated:
        output.note(
            f"{plural(found.undated, 'decision')} of unknown age kept: no measurement of theirs is in the store"
        )
    if found.note:
        output.warn(found.note)


def _document(found: Collected, where: str, dry_run: bool) -> dict[str, Json]:
    return {
        "command": "cache gc",
        "store": where,
        "dry_run": dry_run,
        "decisions": [
            {"layer": d.layer.label, "layer_digest": d.layer.digest, "above": d.bucket.above,
             "tokens": d.bucket.tokens, "policy": d.policy, "routing": d.routing, "environment": d.environment}
            for d in found.decisions
        ],
        "measurements": found.measurements,
        "undated": found.undated,
        "bytes_before": found.bytes_before,
        "bytes_after": found.bytes_after,
    }  # fmt: skip
