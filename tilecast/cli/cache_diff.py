"""`tilecast cache diff`: two tables, by layer and bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tilecast.canonical import Json
from tilecast.cli._options import JsonOption
from tilecast.cli._output import Output, add_row, microseconds, percent, plural, table
from tilecast.cli._stores import read_table
from tilecast.cli._tables import config_text, decision_json, span
from tilecast.evidence import Decision

if TYPE_CHECKING:
    from tilecast.cache_store.diff import Diff, Difference

COLUMNS = ("layer", "tokens", "policy", "what", "A µs", "B µs", "change", "noise", "A's configs", "B's configs")
LEFT = ("layer", "policy", "what", "A's configs", "B's configs")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An exported file, a store, or a SQLAlchemy URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare with it.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if the tables differ.")] = False,
    json_: JsonOption = False,
) -> None:
    """Show what differs between two tables: buckets only one has, other configs, and times beyond the noise.

    Decisions of an environment that the other table lacks are compared with its nearest one of the same device.

    Example:

        tilecast cache diff deployed.db candidate.db --exit-code
    """
    from tilecast.cache_store.diff import diff as compare

    output = Output(json_wanted=json_)
    found = compare(read_table(a), read_table(b))
    output.emit(
        {
            "command": "cache diff",
            "a": a,
            "b": b,
            "same": found.same,
            "environments": [
                {"a": mine.digest, "b": theirs.digest, "fields": [str(field) for field in fields]}
                for mine, theirs, fields in found.environments
            ],
            "differences": [_json(difference) for difference in found.differences],
        }
    )
    for mine, theirs, fields in found.environments:
        if fields:
            changed = "; ".join(f"{f.field}: {f.here!r} in A, {f.there!r} in B" for f in fields)
            output.line(f"{mine.device}: environment {mine.digest[:12]} compared with {theirs.digest[:12]}: {changed}")
    if found.differences:
        output.show(_table(found))
    output.show(f"{plural(found.same, 'bucket')} the same, {len(found.differences)} differ")
    if exit_code and found.differences:
        raise typer.Exit(1)


def _table(found: Diff) -> Table:
    shown = table(f"What differs in {plural(len(found.differences), 'bucket')}", COLUMNS, left=LEFT)
    for difference in found.differences:
        decision = difference.decision
        a, b = difference.a, difference.b
        policy = decision.policy if decision.routing == "uniform" else f"{decision.policy}, {decision.routing}"
        add_row(
            shown, decision.layer.label, span(decision), policy, difference.kind,
            microseconds(None if a is None else a.tuned_us), microseconds(None if b is None else b.tuned_us),
            percent(difference.change, sign=True), percent(difference.noise), *_configs(a, b),
            style="bold" if difference.beyond_noise else None,
        )  # fmt: skip
    return shown


def _configs(a: Decision | None, b: Decision | None) -> tuple[str, str]:
    """Return both sides' configs; nothing where they are the same."""
    pairs = [() if d is None else (d.up.config, d.down.config) for d in (a, b)]
    if pairs[0] == pairs[1]:
        return "", ""
    first, second = (" | ".join(config_text(config, kernel=False) for config in pair) for pair in pairs)
    return first, second


def _json(difference: Difference) -> dict[str, Json]:
    return {
        "kind": difference.kind,
        "layer": difference.decision.layer.label,
        "tokens": difference.decision.bucket.tokens,
        "change": difference.change,
        "noise": difference.noise,
        "beyond_noise": difference.beyond_noise,
        "a": None if difference.a is None else decision_json(difference.a),
        "b": None if difference.b is None else decision_json(difference.b),
    }
