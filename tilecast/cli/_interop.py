"""What `cache export` and `cache import` do for other engines' formats: vLLM's and SGLang's folders of JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._exit import ExitCode
from tilecast.cli._output import Output, plural
from tilecast.errors import CacheError, CoverageError, UsageError
from tilecast.evidence import Measurement, TuningTable

if TYPE_CHECKING:
    from tilecast.cache_store.interop.export import EngineExport

OWN_FORMAT = "tilecast"
FORMATS = (OWN_FORMAT, "vllm", "sglang")
FormatOption = Annotated[
    str,
    typer.Option("--format", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}."),
]


def check_format(name: str) -> None:
    """Raise UsageError unless `name` is a format."""
    if name not in FORMATS:
        raise UsageError(f"--format is {name!r:.40}, expected one of {', '.join(FORMATS)}")


def export_for_engine(
    output: Output, engine: str, source: str, table: TuningTable, measurements: Sequence[Measurement], folder: Path
) -> None:
    """Write an engine's files below a folder and say what is in them and what is not."""
    from tilecast.cache_store.interop.export import engine_files, write_engine_files
    from tilecast.cache_store.interop.names import ENGINE_TITLES

    export = engine_files(table, engine, measurements)
    if not export.files:
        reasons = "; ".join(dict.fromkeys(left.reason for left in export.left_out))
        raise CoverageError(f"{source} has nothing that {ENGINE_TITLES[engine]} could use: {reasons:.300}")
    write_engine_files(export, folder)
    output.emit(_export_json(export, source, folder))
    for file in export.files:
        made = f"{plural(file.buckets, 'bucket')} of {file.layer.label} in {plural(file.rows, 'row')}"
        output.show(f"{folder / file.path}: {made}")
        for remark in file.remarks:
            output.show(f"  {remark}")
    for left in export.left_out:
        output.show(f"left out: {left.what}: {left.reason}")
    variable = {"vllm": "VLLM_TUNED_CONFIG_FOLDER", "sglang": "SGLANG_MOE_CONFIG_DIR"}[engine]
    output.show(f"{ENGINE_TITLES[engine]} reads them with {variable}={folder}")


def _export_json(export: EngineExport, source: str, folder: Path) -> dict[str, Json]:
    return {
        "command": "cache export",
        "format": export.engine,
        "source": source,
        "folder": str(folder),
        "files": [
            {
                "path": file.path,
                "layer": file.layer.label,
                "device": file.device,
                "buckets": file.buckets,
                "rows": file.rows,
                "remarks": list(file.remarks),
            }
            for file in export.files
        ],
        "left_out": [{"what": left.what, "reason": left.reason} for left in export.left_out],
    }


def import_from_engine(output: Output, engine: str, names: Sequence[str], peers: Path) -> None:
    """Check an engine's files and keep the good ones as hints; exits with 3 where one was refused."""
    from tilecast import environment
    from tilecast.cache_store.interop.names import ENGINE_TITLES, device_in_name
    from tilecast.cache_store.interop.peers import PeerFolder, find_files
    from tilecast.cache_store.interop.rows import read_peer

    paths = find_files([Path(name).expanduser() for name in names])
    kept, rows, here, refused = 0, 0, 0, list[str]()
    device = device_in_name(engine, environment.seen().device)
    folder = PeerFolder(peers)
    for path in paths:
        try:
            configs = read_peer(path, engine)
            folder.keep(configs)
        except CacheError as error:
            if len(paths) == 1:
                raise
            refused.append(str(error))
            continue
        kept, rows, here = kept + 1, rows + len(configs.rows), here + (configs.name.device == device)
    output.emit(
        {"command": "cache import", "format": engine, "folder": str(peers), "files": kept, "rows": rows,
         "for_this_device": here, "refused": list(refused)}
    )  # fmt: skip
    for line in refused:
        output.warn(f"refused: {line}")
    output.show(
        f"{peers}: {plural(kept, 'file')} of {ENGINE_TITLES[engine]} with {plural(rows, 'config')} imported, "
        f"{here} for this device; they are hints and a baseline for tuning, never decisions"
    )
    if refused:
        raise typer.Exit(ExitCode.INPUT)
