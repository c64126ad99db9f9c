"""`tilecast cache import`: an exported file's decisions into a store, or other engines' files, checked first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._cache_options import RelaxOption
from tilecast.cli._interop import OWN_FORMAT, FormatOption, check_format, import_from_engine
from tilecast.cli._options import JsonOption, StoreOption
from tilecast.cli._output import Output, plural
from tilecast.cli._stores import Origin, check_configs, origins, read_file, store_location
from tilecast.errors import UsageError
from tilecast.settings import Settings

if TYPE_CHECKING:
    from tilecast.cache_store.adopt import Adopted

THEIRS = "theirs"


def import_(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="An exported file; for other formats several, or folders.")
    ],
    format_: FormatOption = OWN_FORMAT,
    store: StoreOption = None,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="What to keep where the store decides the same: theirs (the file's), ours, best, newest, error.",
        ),
    ] = THEIRS,
    relax: RelaxOption = None,
    json_: JsonOption = False,
) -> None:
    """Check an exported file wholly, then put its decisions into a store.

    Decisions made on another device are kept too and reported; they are never used on this one. A decision
    that the store has already for the same layer, bucket and policy is replaced, unless --policy says otherwise.
    With --relax those that only named fields keep from this machine are adopted, and say so for good. The files of
    vLLM and SGLang become hints and a baseline for tuning, never decisions.

    Examples:

        tilecast cache import mixtral.db

        tilecast cache import --format vllm tuned/E=8,N=3584,device_name=NVIDIA_H200.json
    """
    from tilecast import environment
    from tilecast.cache_store.adopt import adopt_under
    from tilecast.cache_store.match import check_relax
    from tilecast.cache_store.relax import relax_table
    from tilecast.cache_store.resolve import check_merge_policy

    check_format(format_)
    check_merge_policy(policy)
    fields = check_relax(relax or ())
    output = Output(json_wanted=json_)
    settings = Settings.from_environment()
    if format_ != OWN_FORMAT:
        if store is not None:
            raise UsageError(f"--store is given with --format {format_}, whose files are kept in the cache folder")
        if policy != THEIRS or fields:
            raise UsageError(f"--policy and --relax are about decisions, files of {format_} hold hints only")
        import_from_engine(output, format_, files, settings.cache_dir / "peers")
        return
    if len(files) != 1:
        raise UsageError(f"{len(files)} files are given, expected one; import them one after the other")
    file = files[0]
    where = store_location(store, settings)
    here = environment.seen()
    bundle = read_file(file)
    relaxed = relax_table(bundle.table, here, fields)
    table = relaxed.table
    checked = check_configs(table, here, file, ((m.environment, m.config) for m in bundle.measurements))
    adopted = adopt_under(replace(bundle, table=table), where, policy)
    found = origins(table, here)
    output.emit(
        {
            "command": "cache import",
            "file": file,
            "store": where,
            "digest": table.digest,
            "decisions": len(table),
            "policy": policy,
            **_adopted_json(adopted),
            "relaxed": [
                {"from": there.digest, "as": made_up.digest, "record": made_up.system}
                for there, made_up in relaxed.adopted
            ],
            "configs_checked": checked,
            "environments": [_origin_json(origin) for origin in found],
        }
    )
    output.show(f"{where}: {plural(len(table), 'decision')} imported from {file}, {plural(checked, 'config')} checked")
    for conflict in adopted.conflicts:
        output.line(f"  {conflict}")
    for origin in found:
        output.show(f"  {plural(origin.decisions, 'decision')} from {origin}")


def _adopted_json(adopted: Adopted) -> dict[str, Json]:
    return {
        "new_measurements": adopted.measurements,
        "put": adopted.put,
        "removed": adopted.removed,
        "conflicts": [
            {"kept": conflict.kept, "reason": conflict.reason, "text": str(conflict)} for conflict in adopted.conflicts
        ],
    }


def _origin_json(origin: Origin) -> dict[str, Json]:
    return {
        "digest": origin.environment.digest,
        "device": origin.environment.device,
        "decisions": origin.decisions,
        "usable_here": origin.usable,
        "hard": list(origin.hard),
        "soft": list(origin.soft),
    }
