"""`tilecast cache export`: a store's decisions as one self-contained file, or as another engine's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilecast.cli._interop import OWN_FORMAT, FormatOption, check_format, export_for_engine
from tilecast.cli._options import JsonOption, check_writable
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import origins, read_file, read_table
from tilecast.cli._tables import table_json
from tilecast.errors import CoverageError, UsageError
from tilecast.evidence import POLICIES, TuningTable


def export(
    source: Annotated[
        str, typer.Argument(metavar="STORE_OR_FILE", help="A store, an exported file, or a SQLAlchemy URL.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write, whole or not at all; a folder for other formats.")
    ],
    format_: FormatOption = OWN_FORMAT,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="POLICY", help="Only decisions of this policy.", show_default=False),
    ] = None,
    measurements: Annotated[
        bool, typer.Option("--measurements", help="Include the measurements that the decisions rest on.")
    ] = False,
    here: Annotated[bool, typer.Option("--here", help="Only decisions that fit this machine.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write decisions into one self-contained SQLite file, or into a folder of vLLM's or SGLang's files.

    Examples:

        tilecast cache export ~/.cache/tilecast/store.db mixtral.db --here

        tilecast cache export postgresql+psycopg://host/fleet fleet.db

        tilecast cache export mixtral.db --format vllm tuned/
    """
    from tilecast.cache_store.bundle import export_table
    from tilecast.cache_store.merge import copy_file

    if policy is not None and policy not in POLICIES:
        raise UsageError(f"--policy is {policy!r:.40}, expected one of {', '.join(POLICIES)}")
    check_format(format_)
    if measurements and format_ != OWN_FORMAT:
        raise UsageError(f"--measurements is given with --format {format_}, whose files hold none")
    output = Output(json_wanted=json_)
    if format_ == OWN_FORMAT:
        check_writable("OUT", out)

    def select(found: TuningTable) -> TuningTable:
        table = _selected(found, policy=policy, here=here)
        if not table.decisions:
            raise CoverageError(f"{source} has no decision to export with these options; nothing was written")
        return table

    if format_ != OWN_FORMAT:
        # Which config serves both GEMMs of another engine best, only the measurements tell.
        bundle = read_file(source, measurements=True)
        export_for_engine(output, format_, source, select(bundle.table), bundle.measurements, out.expanduser())
        return
    if measurements:
        copied = copy_file(source, out, select=select)
        table, count = copied.table, copied.measurements
    else:
        table, count = select(read_table(source)), 0
        export_table(table, out)
    output.emit(
        {"command": "cache export", "source": source, "file": str(out), "measurements": count, **table_json(table)}
    )
    output.show(f"{out}: {plural(len(table), 'decision')}, {plural(count, 'measurement')}, table {table.digest[:12]}")


def _selected(table: TuningTable, *, policy: str | None, here: bool) -> TuningTable:
    environments = {environment.digest for environment in table.environments}
    if here:
        from tilecast import environment

        environments = {o.environment.digest for o in origins(table, environment.seen()) if o.usable}
    decisions = [
        d for d in table.decisions if d.environment in environments and policy in (None, d.policy)
    ]  # fmt: skip
    used = {d.environment for d in decisions}
    return TuningTable(tuple(e for e in table.environments if e.digest in used), tuple(decisions))
