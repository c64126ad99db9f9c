"""`tilecast cache show`: what a table or store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from tilecast.cli._options import JsonOption
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import origins, read_table
from tilecast.cli._tables import decision_tables, table_json, weak
from tilecast.errors import InputError
from tilecast.evidence import TuningTable


def show(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_STORE", help="An exported file, a store, or a SQLAlchemy URL.")
    ],
    layers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LAYER",
            help="Only layers whose label holds this text or whose digest starts so.",
            show_default=False,
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show the decisions of a table or store, with the evidence for each.

    Examples:

        tilecast cache show mixtral.db

        tilecast cache show mixtral.db "H4096 I1792" --json
    """  # fmt: skip
    from tilecast import environment

    output = Output(json_wanted=json_)
    whole = read_table(source)
    table = _only(whole, layers or [], source)
    found = origins(table, environment.seen())
    # The digest is what other commands call the table, also where only a part of it is shown.
    output.emit({"command": "cache show", "source": source, **table_json(table), "digest": whole.digest})
    shown = "" if len(table) == len(whole) else f"{len(table)} of "
    output.show(f"{source}: {shown}{plural(len(whole), 'decision')}, table {whole.digest[:12]}")
    for origin in found:
        output.show(f"  {origin}")
    output.show(*decision_tables(table.decisions))
    for decision in weak(table.decisions)[:1]:
        output.warn(f"reproducible, but not certified on the device: {decision.layer.label} and maybe others")


def _only(table: TuningTable, wanted: list[str], source: str) -> TuningTable:
    """Return the part of a table about the wanted layers. Raises InputError for one that matches nothing."""
    if not wanted:
        return table
    matching = {
        text: {
            d.layer for d in table.decisions if text.lower() in d.layer.label.lower() or _starts(d.layer.digest, text)
        }
        for text in wanted
    }
    for text, layers in matching.items():
        if not layers:
            labels = sorted({d.layer.label for d in table.decisions})
            raise InputError(f"no layer in {source} matches {text!r}; it has: {'; '.join(labels) or 'none'}")
    kept = set().union(*matching.values())
    return TuningTable(table.environments, tuple(d for d in table.decisions if d.layer in kept))


def _starts(digest: str, text: str) -> bool:
    # Six digits, so that a size such as "896" is never taken for a digest.
    return len(text) >= 6 and digest.startswith(text.lower())
