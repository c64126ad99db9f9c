"""Reading one file of vLLM's or SGLang's: strict JSON, one config a token count, everything within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tilecast.cache_store.files import reason, regular_size
from tilecast.cache_store.interop.names import PeerName, parse_name, triton_version
from tilecast.errors import CacheError
from tilecast.problem import MAX_DIMENSION, TileConfig

Value = int | bool | str
Row = Mapping[str, Value]

MAX_FILE_BYTES = 1 << 20
"""The largest of the engines' own files has under 8 KiB."""
MAX_ROWS = 4096
TRITON_KEY = "triton_version"

TILE_FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
INTEGERS: dict[str, tuple[int, int]] = {
    "BLOCK_SIZE_M": (1, 4096),
    "BLOCK_SIZE_N": (1, 4096),
    "BLOCK_SIZE_K": (1, 4096),
    "GROUP_SIZE_M": (1, 4096),
    "num_warps": (1, 64),
    "num_stages": (0, 32),
    "num_ctas": (1, 16),
    "SPLIT_K": (1, 256),
    "waves_per_eu": (0, 16),
    "matrix_instr_nonkdim": (0, 64),
    "kpack": (1, 4),
}
"""The integers of a row of the Triton kernel, with what each may be at all."""
OTHER_INTEGERS = ("tile_m", "tile_n", "tile_k", "tile_n2", "tile_k2")
"""The integers of a row of another kernel of vLLM's (`backend=flydsl`): read, and no config of ours."""


@dataclass(frozen=True, kw_only=True)
class PeerConfigs:
    """One imported file: which engine's, what its name says, the Triton version (empty if unknown) and its rows.

    `rows` are (token count, config) in the file's order, which decides between equally near counts. `says_triton`: the
    version stands in the file itself, which only vLLM's loader expects.
    """

    engine: str
    name: PeerName
    triton: str
    rows: tuple[tuple[int, Row], ...]
    says_triton: bool = False

    def nearest(self, tokens: int) -> tuple[int, Row]:
        """Return the row that the engine uses: the nearest token count, the first one of two equally near."""
        return min(self.rows, key=lambda row: abs(row[0] - tokens))


def read_peer(path: Path, engine: str) -> PeerConfigs:
    """Read and check one file. Raises CacheError with one line that names it."""
    try:
        size = regular_size(path)
        if size is None:
            raise CacheError(f"{path}: does not exist; check the path")
        if size > MAX_FILE_BYTES:
            raise CacheError(f"{path}: has {size} bytes, more than the {MAX_FILE_BYTES} allowed")
        name = parse_name(path.name)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error
    except CacheError as error:
        raise _named(path, error) from error
    try:
        rows, version = parse_rows(data)
    except CacheError as error:
        raise _named(path, error) from error
    triton = version or triton_version(path.parent.name)
    return PeerConfigs(engine=engine, name=name, triton=triton, rows=rows, says_triton=bool(version))


def _named(path: Path, error: CacheError) -> CacheError:
    text = str(error)
    return error if text.startswith(f"{path}: ") else CacheError(f"{path}: {text}")


def parse_rows(data: bytes) -> tuple[tuple[tuple[int, Row], ...], str]:
    """Return a file's rows and its Triton version (empty without one). Raises CacheError."""
    try:
        # No number of these files has many digits, and int() is slow on those that do.
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse, parse_float=_refuse, parse_int=_small
        )
    except (ValueError, RecursionError) as error:
        raise CacheError(f"is not the JSON of a tuning file: {' '.join(str(error).split()):.120}") from error
    if not isinstance(value, dict):
        raise CacheError(f"holds a {type(value).__name__}, expected an object of token counts")
    version = value.pop(TRITON_KEY, "")
    if not isinstance(version, str) or len(version) > 32:
        raise CacheError(f"{TRITON_KEY} is {version!r:.40}, expected a version of Triton")
    if not 1 <= len(value) <= MAX_ROWS:
        raise CacheError(f"has {len(value)} token counts, expected 1 to {MAX_ROWS}")
    return tuple((_tokens(key), _row(key, row)) for key, row in value.items()), version


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse(text: str) -> object:
    raise ValueError(f"{text:.20} is no integer")


def _small(text: str) -> int:
    if len(text) > 12:
        raise ValueError(f"{text:.20}… is out of range")
    return int(text)


def _tokens(key: str) -> int:
    # The engines take int(key); only the plain form of a number is one token count and one key.
    if key.isascii() and key.isdigit() and len(key) <= 8 and key[0] != "0" and int(key) <= MAX_DIMENSION:
        return int(key)
    raise CacheError(f"key {key!r:.40} is no token count, expected 1 to {MAX_DIMENSION}")


def _row(key: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise CacheError(f"the row of {key} is a {type(value).__name__}, expected an object")
    others = [name for name in OTHER_INTEGERS if name in value]
    if not others and (missing := [name for name in TILE_FIELDS if name not in value]):
        raise CacheError(f"the row of {key} lacks {', '.join(missing)}")
    for name, setting in value.items():
        wanted = _outside(str(name), setting)
        if wanted is not None:
            raise CacheError(f"the row of {key} has {str(name)!r:.40} = {setting!r:.40}, expected {wanted}")
    return cast(Row, value)


def _outside(name: str, value: object) -> str | None:
    """Return what a setting should have been, None where it is that."""
    if name == "USE_TMA":
        return None if isinstance(value, bool) else "true or false"
    if name == "grf_mode":
        return None if value in ("128", "256", "auto", "default") else "128, 256, auto or default"
    low, high = INTEGERS.get(name, (1, 4096))
    if name not in INTEGERS and name not in OTHER_INTEGERS:
        return "no setting of that name"
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return None if fits else f"an integer from {low} to {high}"


def tile_config(row: Row, device_kind: str = "cuda", kernel: str = "triton.moe_gemm") -> TileConfig | None:
    """Return the config of ours (of `kernel`) that means the same as a row, None for another kernel's or a split K.

    A row without warps or stages has Triton's defaults: 4 warps and 3 stages, 2 on AMD (`device_kind` `hip`).
    Whether this kernel takes the values is for its own checks to say.
    """
    if any(name not in row for name in TILE_FIELDS) or row.get("SPLIT_K", 1) != 1 or row.get("num_ctas", 1) != 1:
        return None
    params: dict[str, int | str] = {
        "block_m": int(row["BLOCK_SIZE_M"]),
        "block_n": int(row["BLOCK_SIZE_N"]),
        "block_k": int(row["BLOCK_SIZE_K"]),
        "group_m": int(row["GROUP_SIZE_M"]),
        "num_warps": int(row.get("num_warps", 4)),
        "num_stages": int(row.get("num_stages", 2 if device_kind == "hip" else 3)),
    }
    if row.get("USE_TMA", False):
        if kernel != "triton.moe_gemm":
            return None
        return TileConfig("triton.moe_tma", {**params, "waves": 0, "specialize": 0})
    return TileConfig(kernel, {**params, "swap": 0})
