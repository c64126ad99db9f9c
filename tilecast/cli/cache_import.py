"""`tilecast cache import`: an exported file's decisions into a store, or other engines' files, checked first."""

from __future__ import annotations

from typing import Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._interop import OWN_FORMAT, FormatOption, check_format, import_from_engine
from tilecast.cli._options import JsonOption, StoreOption
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import Origin, check_configs, origins, read_file, store_location
from tilecast.errors import UsageError
from tilecast.settings import Settings


def import_(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="An exported file; for other formats several, or folders.")
    ],
    format_: FormatOption = OWN_FORMAT,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Check an exported file wholly, then put its decisions into a store.

    Decisions made on another device are kept too and reported; they are never used on this one. A decision
    that the store has already for the same layer, bucket and policy is replaced. The files of vLLM and SGLang
    become hints and a baseline for tuning, never decisions.

    Examples:

        tilecast cache import mixtral.db

        tilecast cache import --format vllm tuned/E=8,N=3584,device_name=NVIDIA_H200.json
    """
    from tilecast import environment
    from tilecast.cache_store.bundle import adopt
    from tilecast.cache_store.store import open_store

    check_format(format_)
    output = Output(json_wanted=json_)
    settings = Settings.from_environment()
    if format_ != OWN_FORMAT:
        if store is not None:
            raise UsageError(f"--store is given with --format {format_}, whose files are kept in the cache folder")
        import_from_engine(output, format_, files, settings.cache_dir / "peers")
        return
    if len(files) != 1:
        raise UsageError(f"{len(files)} files are given, expected one; import them one after the other")
    file = files[0]
    where = store_location(store, settings)
    here = environment.here()
    bundle = read_file(file)
    table = bundle.table
    checked = check_configs(table, here, file)
    with open_store(where) as opened:
        measurements = adopt(bundle, opened)
    found = origins(table, here)
    output.emit(
        {
            "command": "cache import",
            "file": file,
            "store": where,
            "digest": table.digest,
            "decisions": len(table),
            "new_measurements": measurements,
            "configs_checked": checked,
            "environments": [_origin_json(origin) for origin in found],
        }
    )
    output.show(f"{where}: {plural(len(table), 'decision')} imported from {file}, {plural(checked, 'config')} checked")
    for origin in found:
        output.show(f"  {plural(origin.decisions, 'decision')} from {origin}")


def _origin_json(origin: Origin) -> dict[str, Json]:
    return {
        "digest": origin.environment.digest,
        "device": origin.environment.device,
        "decisions": origin.decisions,
        "usable_here": origin.usable,
        "hard": list(origin.hard),
        "soft": list(origin.soft),
    }
