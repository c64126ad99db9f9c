"""Writing a table as the files that vLLM or SGLang read, and saying what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tilecast.cache_store.files import check_writable, write_atomically
from tilecast.cache_store.interop.names import ENGINE_TITLES, ENGINES, name_for, triton_folder
from tilecast.cache_store.interop.pinned import pinned, spans
from tilecast.cache_store.interop.rows import TRITON_KEY, parse_rows, read_peer
from tilecast.cache_store.interop.tiles import Evidence, Picked, default_tiles, gather, shared_tile, tile_pair
from tilecast.environment import Environment
from tilecast.errors import CacheError, UsageError
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import Bucket, ExpertLayer, weight_format


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Something that has no place in the engine's files, and why."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One file to write: its path below the folder, its bytes, and what it is made from."""

    path: str
    data: bytes
    layer: ExpertLayer
    device: str
    buckets: int
    rows: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineExport:
    """All files of one export, by path, and everything that is not in them."""

    engine: str
    files: tuple[EngineFile, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class _Series:
    """The decisions of one environment, layer, policy and routing, by ascending bucket."""

    environment: Environment
    decisions: tuple[Decision, ...]

    @property
    def layer(self) -> ExpertLayer:
        """The layer."""
        return self.decisions[0].layer

    @property
    def preference(self) -> tuple[object, ...]:
        """What series of one file sort by: fastest first (the engines promise no bits), then uniform routing, bf16."""
        first = self.decisions[0]
        uncommon = (first.policy != "fastest", first.routing != "uniform", first.layer.dtype != "bf16")
        return (*uncommon, -len(self.decisions), first.sort_key[:4])

    def __str__(self) -> str:
        """Return a short human form."""
        first = self.decisions[0]
        routing = "" if first.routing == "uniform" else f", routing {first.routing}"
        where = f"{self.environment.device} (Triton {self.environment.compiler}, {first.policy}{routing})"
        return f"{first.layer.label} on {where}"


def check_engine(engine: str) -> str:
    """Return the engine's name. Raises UsageError."""
    if engine not in ENGINES:
        raise UsageError(f"--format is {engine!r:.40}, expected one of {', '.join(ENGINES)}")
    return engine


def engine_files(table: TuningTable, engine: str, measurements: Iterable[Measurement] = ()) -> EngineExport:
    """Return the files that carry a table's decisions to an engine.

    With measurements a bucket's config is chosen among all that were timed; without, among those of the decision.
    Raises UsageError for an unknown engine.
    """
    check_engine(engine)
    evidence = gather(measurements)
    places, left_out = _placed(engine, table)
    files: list[EngineFile] = []
    for path in sorted(places):
        best, *others = sorted(places[path], key=lambda series: series.preference)
        reason = f"its file would be {path}, too, which {best} has"
        left_out += [LeftOut(what=str(series), reason=reason) for series in others]
        made, missing = _files(engine, path, best, evidence)
        files += made
        left_out += missing
    return EngineExport(engine=engine, files=tuple(files), left_out=tuple(left_out))


def write_engine_files(export: EngineExport, folder: Path) -> None:
    """Write every file below a folder, which is made if need be; each is there whole or not at all.

    Every path is tried before the first is written. A file that is there is replaced if it is one of the engine's.
    Raises CacheError.
    """
    targets = [(folder / file.path, file) for file in export.files]
    try:
        for path, _ in targets:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder}: cannot be made ({error.strerror}); choose a folder that is writable") from error
    for path, _ in targets:
        if path.exists():
            try:
                read_peer(path, export.engine)
            except CacheError as error:
                raise CacheError(f"{error}; it is left alone and nothing was written, choose another folder") from error
        check_writable(path)
    for path, file in targets:
        write_atomically(path, file.data)


def _placed(engine: str, table: TuningTable) -> tuple[dict[str, list[_Series]], list[LeftOut]]:
    """Return a table's series by the path that their file has, and those that have none."""
    environments = {environment.digest: environment for environment in table.environments}
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for decision in table.decisions:
        groups.setdefault(decision.sort_key[:4], []).append(decision)
    places: dict[str, list[_Series]] = {}
    left_out = []
    for decisions in groups.values():
        series = _Series(environment=environments[decisions[0].environment], decisions=tuple(decisions))
        reason = _unsayable(engine, series.environment, series.layer)
        if reason is None:
            places.setdefault(_place(engine, series.layer, series.environment), []).append(series)
        else:
            left_out.append(LeftOut(what=str(series), reason=reason))
    return places, left_out


def _unsayable(engine: str, environment: Environment, layer: ExpertLayer) -> str | None:
    """Return why no file of the engine can stand for a layer's decisions."""
    if environment.device_kind != "cuda":
        return f"was tuned on a {environment.device_kind.upper()}; the files are for GPUs"
    if layer.dtype == "fp32":
        return "fp32: that kernel multiplies in TF32, so its tiles and times are other ones"
    if weight_format(layer.weight_format).kind == "fp8" and layer.weight_format != "fp8_block128":
        return f"{layer.weight_format}: that kernel rounds whole rows to fp8, ours 128 elements at a time"
    device = environment.device
    if not device.strip() or set(device) & set(",/\\") or not device.isprintable():
        return f"the device's name {device!r:.60} cannot stand in a file's name"
    try:
        _place(engine, layer, environment)
    except CacheError as error:
        return str(error)
    return None


def _place(engine: str, layer: ExpertLayer, environment: Environment) -> str:
    name = name_for(engine, layer, environment).text(engine)
    return name if engine == "vllm" else f"configs/{triton_folder(environment.compiler)}/{name}"


def _bucket_text(bucket: Bucket) -> str:
    low = bucket.above + 1
    return f"{low} token{'s' if low != 1 else ''}" if low == bucket.tokens else f"{low} to {bucket.tokens} tokens"


def _files(engine: str, path: str, series: _Series, evidence: Evidence) -> tuple[list[EngineFile], list[LeftOut]]:
    """Return the file of one series, for SGLang with that of the down projection; none if no bucket can be said."""
    layer = series.layer
    picked: list[tuple[Bucket, Picked]] = []
    left_out, remarks = [], []
    for decision in series.decisions:
        found = shared_tile(decision, evidence) if engine == "vllm" else tile_pair(decision, evidence)
        where = _bucket_text(decision.bucket)
        if isinstance(found, str):
            reason = f"{found}; {ENGINE_TITLES[engine]} runs its default there"
            left_out.append(LeftOut(what=f"{layer.label} at {where}", reason=reason))
            continue
        if found.remark:
            remarks.append(f"{where}: {found.remark}")
        picked.append((decision.bucket, found))
    if not picked:
        return [], left_out
    defaults = default_tiles(engine, layer.experts, hip=series.environment.arch.startswith("gfx"))
    if layer.weight_format != "dense":
        # What the engines run for these without a file depends on more than a row can say.
        defaults = []
        remarks.append("token counts outside of the table get the nearest row of the file, not the engine's default")
    parts = {path: False} if engine == "vllm" else {path: False, path.removesuffix(".json") + "_down.json": True}
    files = []
    for part, down in parts.items():
        chosen = [(bucket, each.down if down else each.up) for bucket, each in picked]
        rows = pinned(spans(chosen, defaults))
        document: dict[str, object] = {str(tokens): tile.row(down=down) for tokens, tile in rows}
        if engine == "vllm":
            document = {TRITON_KEY: series.environment.compiler, **document}
        data = (json.dumps(document, indent=4) + "\n").encode("ascii")
        parse_rows(data)  # nothing is written that would not be read back
        files.append(
            EngineFile(
                path=part, data=data, layer=layer, device=series.environment.device, buckets=len(picked),
                rows=len(rows), remarks=() if down else tuple(remarks),
            )
        )  # fmt: skip
    return files, left_out
