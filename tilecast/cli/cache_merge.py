"""`tilecast cache merge`: several tables in one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._cache_options import MergePolicyOption
from tilecast.cli._options import JsonOption, check_writable
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import check_configs
from tilecast.cli._tables import table_json
from tilecast.evidence import TuningTable
from tilecast.problem import TileConfig

if TYPE_CHECKING:
    from tilecast.cache_store.merge import Merged


def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="TABLE...", help="Exported files, stores or SQLAlchemy URLs; first is ours.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write; whole or not at all.")],
    policy: MergePolicyOption = "best",
    measurements: Annotated[
        bool, typer.Option("--measurements/--no-measurements", help="Unite the measurements, too.")
    ] = True,
    json_: JsonOption = False,
) -> None:
    """Put the decisions and measurements of several tables into one file; the inputs are never changed.

    Measurements are united. Where two tables decide the same token counts differently, --policy says which is kept,
    and a line says which and why; best compares times within one environment only, and believes no win within noise.
    A table with a config that its kernel does not know is refused, as import refuses it.

    Examples:

        tilecast cache merge node1.db node2.db --out fleet.db

        tilecast cache merge fleet.db new.db --out next.db --policy newest --json
    """  # fmt: skip
    from tilecast import environment
    from tilecast.cache_store.merge import merge_files
    from tilecast.cache_store.resolve import check_merge_policy

    check_merge_policy(policy)
    check_writable("--out", out)
    output = Output(json_wanted=json_)
    here = environment.seen()

    def check(name: str, found: TuningTable, measured: Iterable[tuple[str, TileConfig]]) -> None:
        check_configs(found, here, name, measured)

    merged = merge_files(sources, out, policy=policy, measurements=measurements, check=check)
    output.emit(_document(merged, out, policy))
    for source, conflict in merged.conflicts:
        output.line(f"{source}: {conflict}")
    for part in merged.parts:
        output.line(
            f"{part.source}: {plural(part.decisions, 'decision')}, {part.added} new, {part.equal} alike; "
            f"{plural(part.measurements, 'measurement')}, {part.new_measurements} new"
        )
    output.line(
        f"{out}: {plural(len(merged.table), 'decision')}, {plural(merged.measurements, 'measurement')}, "
        f"{plural(len(merged.conflicts), 'conflict')}, table {merged.table.digest[:12]}"
    )


def _document(merged: Merged, out: Path, policy: str) -> dict[str, Json]:
    return {
        "command": "cache merge",
        "file": str(out),
        "policy": policy,
        "inputs": [
            {"source": part.source, "decisions": part.decisions, "added": part.added, "equal": part.equal,
             "measurements": part.measurements, "new_measurements": part.new_measurements}
            for part in merged.parts
        ],
        "conflicts": [
            {"source": source, "layer": first.layer.label, "layer_digest": first.layer.digest,
             "environment": first.environment, "policy": first.policy, "routing": first.routing,
             "tokens": [d.bucket.tokens for d in conflict.ours or conflict.theirs],
             "kept": conflict.kept, "reason": conflict.reason}
            for source, conflict in merged.conflicts
            for first in [(conflict.ours + conflict.theirs)[0]]
        ],
        "measurements": merged.measurements,
        **table_json(merged.table),
    }  # fmt: skip
