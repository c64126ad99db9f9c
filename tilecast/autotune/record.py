"""What serving wrote down (TM_GEMM_RECORD): which layers ran at which token counts, what missed, where tokens went.

A record is JSON: one object per layer with its full form, calls per token count and how many of them ran a default,
and per place in the model (a weight tensor) how many slots each of this rank's experts got. It is data from outside:
of bounded size, and every field is checked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tilecast.canonical import Json, fields_of
from tilecast.errors import InputError
from tilecast.problem import MAX_DIMENSION, ExpertLayer, check_int

FORMAT = "tilecast-record"
VERSION = 1
MAX_BYTES = 64 << 20
"""Bound of a record that is read; one of a hundred layers of 512 experts has less than 1 MiB."""
MAX_COUNT = 1 << 53


@dataclass(frozen=True, slots=True)
class Calls:
    """How often a layer ran at some token count, and how many of these calls ran a default: misses."""

    calls: int = 0
    defaults: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Slots that each of this rank's experts got at one place of the model; `absent` went to other ranks or none."""

    slots: tuple[int, ...]
    absent: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was seen of one layer. Equal layers at several places of a model count together, their loads apart."""

    layer: ExpertLayer
    tokens: Mapping[int, Calls]
    loads: tuple[Load, ...] = ()

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        for count, seen in self.tokens.items():
            check_int("recorded token count", count, 1)
            check_int("recorded calls", seen.calls, 0, MAX_COUNT)
            check_int("recorded defaults", seen.defaults, 0, seen.calls)
        for load in self.loads:
            check_counts(load.slots, self.layer)
            check_int("recorded absent slots", load.absent, 0, MAX_COUNT)

    @property
    def calls(self) -> int:
        """All calls."""
        return sum(seen.calls for seen in self.tokens.values())

    @property
    def missed(self) -> dict[int, int]:
        """Calls that ran a default, by token count, ascending."""
        return {count: self.tokens[count].defaults for count in sorted(self.tokens) if self.tokens[count].defaults}

    @property
    def shares(self) -> dict[int, float]:
        """The share of calls at each token count, ascending; empty without calls. They sum to 1."""
        total = self.calls
        return {count: self.tokens[count].calls / total for count in sorted(self.tokens) if self.tokens[count].calls}

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        tokens: list[Json] = [
            {"tokens": count, "calls": self.tokens[count].calls, "defaults": self.tokens[count].defaults}
            for count in sorted(self.tokens)
        ]
        loads: list[Json] = [{"slots": list(load.slots), "absent": load.absent} for load in self.loads]
        return {"layer": self.layer.to_json(), "tokens": tokens, "experts": loads}

    @classmethod
    def from_json(cls, value: object) -> LayerRecord:
        """Build from parsed JSON. Raises InputError."""
        parsed = fields_of(value, {"layer": dict, "tokens": list, "experts": list}, "recorded layer")
        tokens: dict[int, Calls] = {}
        for item in cast(list[object], parsed["tokens"]):
            seen = cast(
                dict[str, int], fields_of(item, {"tokens": int, "calls": int, "defaults": int}, "recorded token count")
            )
            if seen["tokens"] in tokens:
                raise InputError(f"recorded layer: token count {seen['tokens']} is there twice")
            tokens[seen["tokens"]] = Calls(seen["calls"], seen["defaults"])
        loads = []
        for item in cast(list[object], parsed["experts"]):
            load = fields_of(item, {"slots": list, "absent": int}, "recorded experts")
            loads.append(Load(tuple(cast(list[int], load["slots"])), cast(int, load["absent"])))
        return cls(layer=ExpertLayer.from_json(parsed["layer"]), tokens=tokens, loads=tuple(loads))

    def merged(self, other: LayerRecord) -> LayerRecord:
        """Return both as one. Both are of the same layer."""
        tokens = {
            count: Calls(
                *(
                    getattr(self.tokens.get(count, Calls()), name) + getattr(other.tokens.get(count, Calls()), name)
                    for name in ("calls", "defaults")
                )
            )
            for count in {*self.tokens, *other.tokens}
        }
        return LayerRecord(layer=self.layer, tokens=tokens, loads=(*self.loads, *other.loads))


@dataclass(frozen=True, kw_only=True)
class ServingRecord:
    """What one rank, or several merged, saw while serving."""

    layers: tuple[LayerRecord, ...]
    rank: int = 0
    world_size: int = 1
    seconds: float = 0.0

    def of(self, layer: ExpertLayer) -> LayerRecord | None:
        """Return what was seen of a layer, None if it never ran."""
        return next((record for record in self.layers if record.layer == layer), None)

    def shares(self, layers: Collection[ExpertLayer]) -> dict[int, float]:
        """Return the share of the calls of some layers at each token count, ascending; empty without calls."""
        calls = Counter[int]()
        for record in self.layers:
            if record.layer in layers:
                calls.update({count: seen.calls for count, seen in record.tokens.items() if seen.calls})
        return {count: calls[count] / calls.total() for count in sorted(calls)}

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form, layers in the order of their digests."""
        ordered = sorted(self.layers, key=lambda record: record.layer.digest)
        layers: list[Json] = [record.to_json() for record in ordered]
        head: dict[str, Json] = {"format": FORMAT, "version": VERSION, "rank": self.rank}
        return {**head, "world_size": self.world_size, "seconds": self.seconds, "layers": layers}

    @classmethod
    def from_json(cls, value: object) -> ServingRecord:
        """Build from parsed JSON. Raises InputError."""
        if isinstance(value, dict) and (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            seen = f"format {value.get('format')!r:.40}, version {value.get('version')!r:.20}"
            raise InputError(f"record: {seen}, expected {FORMAT!r}, version {VERSION}")
        kinds: dict[str, type | tuple[type, ...]] = {
            "format": str, "version": int, "rank": int, "world_size": int, "seconds": (int, float), "layers": list,
        }  # fmt: skip
        parsed = fields_of(value, kinds, "record")
        check_int("record's world size", parsed["world_size"], 1, 1 << 16)
        check_int("record's rank", parsed["rank"], 0, cast(int, parsed["world_size"]) - 1)
        layers = tuple(LayerRecord.from_json(item) for item in cast(list[object], parsed["layers"]))
        if len({record.layer for record in layers}) != len(layers):
            raise InputError("record: a layer is there twice")
        return cls(
            layers=layers, rank=cast(int, parsed["rank"]), world_size=cast(int, parsed["world_size"]),
            seconds=float(cast(float, parsed["seconds"])),
        )  # fmt: skip

    def merged(self, other: ServingRecord) -> ServingRecord:
        """Return both ranks' records as one of this rank."""
        layers = {record.layer: record for record in self.layers}
        for record in other.layers:
            known = layers.get(record.layer)
            layers[record.layer] = record if known is None else known.merged(record)
        seconds = max(self.seconds, other.seconds)
        return ServingRecord(layers=tuple(layers.values()), rank=self.rank, world_size=self.world_size, seconds=seconds)


def check_counts(counts: tuple[int, ...], layer: ExpertLayer) -> None:
    """Raise InputError unless there is one count of at least 0 for each of the layer's experts."""
    if len(counts) != layer.experts:
        raise InputError(f"recorded experts of {layer.label}: {len(counts)} counts, expected {layer.experts}")
    for count in counts:
        check_int("recorded slots of an expert", count, 0, MAX_COUNT)


def read_json(path: Path, what: str) -> object:
    """Return the parsed JSON of a file. Raises InputError for one that is not there, too large or no JSON."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{what} {path} has more than {MAX_BYTES >> 20} MiB, expected a file that Tilecast wrote")
        parsed: object = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} is not JSON: {str(error)[:100]}") from None
    return parsed


def rank_path(path: Path, rank: int) -> Path:
    """Return where a rank writes its record: rank 0 to the path itself, rank 3 to `PATH.rank3`."""
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def read_record(path: Path) -> ServingRecord:
    """Read what serving wrote to `path`, and beside it the files of the other ranks that are there, as one.

    Raises InputError for a file that is no record.
    """
    record = _read_one(path)
    for rank in range(1, record.world_size):
        if rank_path(path, rank).exists():
            other = _read_one(rank_path(path, rank))
            if (other.rank, other.world_size) != (rank, record.world_size):
                raise InputError(
                    f"record {rank_path(path, rank)} is of rank {other.rank} of {other.world_size}, expected rank "
                    f"{rank} of {record.world_size}; delete what an earlier run left"
                )
            record = record.merged(other)
    return record


def _read_one(path: Path) -> ServingRecord:
    try:
        return ServingRecord.from_json(read_json(path, "record"))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None


def edges_for(missed: Mapping[int, int], defaults: tuple[int, ...], most: int = 32) -> tuple[int, ...]:
    """Return the token counts to tune for what was missed: those counts themselves, where they are few.

    Beyond `most` distinct ones, as prompts of every length leave, they are the ones of `defaults` that cover them,
    and powers of two above its last.
    """
    if len(missed) <= most:
        return tuple(sorted(missed))
    return tuple(sorted({_covering(count, defaults) for count in missed}))


def _covering(count: int, edges: tuple[int, ...]) -> int:
    covering = [edge for edge in edges if edge >= count]
    return min(covering) if covering else min(MAX_DIMENSION, 1 << (count - 1).bit_length())
