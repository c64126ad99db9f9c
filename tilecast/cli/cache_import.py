"""`tilecast cache import`: an exported file's decisions into a store, checked first."""

from __future__ import annotations

from typing import Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._options import JsonOption, StoreOption
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import Origin, check_configs, origins, read_file, store_location
from tilecast.settings import Settings


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An exported file.")],
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Check an exported file wholly, then put its decisions into a store.

    Decisions made on another device are kept too and reported; they are never used on this one. A decision
    that the store has already for the same layer, bucket and policy is replaced.

    Example:

        tilecast cache import mixtral.db
    """
    from tilecast import environment
    from tilecast.cache_store.bundle import adopt
    from tilecast.cache_store.store import open_store

    output = Output(json_wanted=json_)
    where = store_location(store, Settings.from_environment())
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
