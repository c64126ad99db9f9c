"""A checkpoint folder before it is loaded: its files, their headers, and whether all ranks have the same."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilecast.canonical import Json, canonical_json
from tilecast.engine.group import Group
from tilecast.errors import AgreementError, ModelError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
"""Fields of both configs that hold a token's id, the first also several."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names that families give to how many experts there are, and to how many a token is sent to."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
GIT_LFS = b"version "
"""How a pointer of Git LFS begins; as the length of a header it would be more than any file has."""
MAX_HEADER_BYTES = 256 << 20
SAMPLES, SAMPLE_BYTES = 64, 512
MAX_JSON_BYTES = 256 << 20
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""What loading converts to the wanted dtype; other dtypes are quantized, or integers, and keep their size."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with config.json and complete safetensors files.

    `files` are (name, bytes) in order; `numbers` counts its floating-point weights, `other_bytes` is the rest.
    """

    folder: Path
    config: Mapping[str, object]
    files: tuple[tuple[str, int], ...]
    numbers: int
    other_bytes: int
    digest: str

    def needed_bytes(self, item_bytes: int) -> int:
        """Return how large the weights are in a dtype of `item_bytes`."""
        return self.numbers * item_bytes + self.other_bytes


def inspect_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint folder's config and the headers of its weights, and check that no file is missing or cut off.

    Raises ModelError that names the file. Only safetensors are read: other formats are unpickled, which runs code.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path's own raises for names that are too long
        raise ModelError(f"{folder} is not a folder, expected one with {CONFIG} and *.safetensors")
    config = _json(folder / CONFIG)
    _check_config(folder, config)
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    files, numbers, other_bytes = [], 0, 0
    for name in _weight_files(folder):
        size, header = _header(folder / name)
        digest.update(header + _sampled(folder / name, size))
        files.append((name, size))
        for tensor in json.loads(header).values():
            if not isinstance(tensor, dict) or "data_offsets" not in tensor:
                continue  # __metadata__
            begin, end = tensor["data_offsets"]  # Checked by `_header`.
            item = ITEM_BYTES.get(tensor.get("dtype", ""))
            numbers += (end - begin) // item if item else 0
            other_bytes += 0 if item else end - begin
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return Checkpoint(
        folder=folder, config=config, files=tuple(files), numbers=numbers, other_bytes=other_bytes,
        digest=digest.hexdigest(),
    )  # fmt: skip


def _check_config(folder: Path, config: Mapping[str, object]) -> None:
    """Raise ModelError, naming file and field, for what transformers loads without a word and runs wrong, or not."""
    nested = config.get("text_config")
    for fields in (config, nested if isinstance(nested, Mapping) else {}):
        _check_tokens(folder / CONFIG, fields)
        _check_routing(folder / CONFIG, fields)
    if (folder / GENERATION).is_file():
        _check_tokens(folder / GENERATION, _json(folder / GENERATION))


def experts_of(config: Mapping[str, object]) -> tuple[int, ...]:
    """Return the numbers of experts that layers have, by a config that `inspect_checkpoint` read; () if unknown."""
    nested = config.get("text_config")
    parts = (config, nested) if isinstance(nested, Mapping) else (config,)
    counts = (count for fields in parts for name in EXPERTS for count in _several(fields.get(name)))
    return tuple(sorted({count for count in counts if _is_count(count, 1)}))


def _check_tokens(path: Path, fields: Mapping[str, object]) -> None:
    for name in TOKENS:
        value = fields.get(name)
        several = isinstance(value, list) and name == TOKENS[0]
        for token in value if isinstance(value, list) and several else [value]:
            if token is not None and not _is_count(token, 0):
                kinds = "token ids of 0 or above, or null" if name == TOKENS[0] else "a token id of 0 or above, or null"
                # Some files say -1 for no padding; transformers' own code reads it as that.
                if name == "pad_token_id" and token == -1:
                    continue
                raise ModelError(f"{path}: field {name} is {value!r:.80}, expected {kinds}")


def _check_routing(path: Path, fields: Mapping[str, object]) -> None:
    experts = [count for name in EXPERTS for count in _several(fields.get(name))]
    for name in TOP_K:
        value = fields.get(name)
        for top_k in _several(value):
            if not _is_count(top_k, 1):
                raise ModelError(f"{path}: field {name} is {value!r:.80}, expected at least 1")
            fewest = min((count for count in experts if _is_count(count, 1)), default=top_k)
            if top_k > fewest:
                raise ModelError(f"{path}: field {name} is {value!r:.80}, more than the {fewest} experts")
    for name in EXPERTS:
        if not all(_is_count(count, 0) for count in _several(fields.get(name))):
            raise ModelError(f"{path}: field {name} is {fields[name]!r:.80}, expected a number of experts")


def _several(value: object) -> list[Any]:
    """Return a field's values, which some families give for each layer."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def agree_on_checkpoint(group: Group, checkpoint: Checkpoint, orders: Mapping[str, Json]) -> None:
    """Make sure that all ranks are about to load the same checkpoint in the same way.

    `orders` is what else must be equal, by name. Raises AgreementError, on all ranks, naming what differs.
    """
    if group.world_size == 1:
        return
    own: dict[str, Json] = {"checkpoint": checkpoint.digest[:16], **orders}
    seen = [json.loads(data) for data in group.gather("checkpoint", canonical_json(own).encode("ascii"))]
    for rank, theirs in enumerate(seen):
        for name in sorted({*seen[0], *theirs}):
            if seen[0].get(name) != theirs.get(name):
                raise AgreementError(
                    f"rank {rank} has another {name} ({theirs.get(name)}) than rank 0 ({seen[0].get(name)}); start "
                    f"all ranks with the same checkpoint and options"
                )


def agree_on_table_file(group: Group, path: str | None) -> None:
    """Make sure that ranks which can read a table's file read the same: rank 0's will be used, whatever others have.

    Raises AgreementError, on all ranks, naming the first one that differs.
    """
    if group.world_size == 1:
        return
    own = b""
    if path is not None and Path(path).is_file():
        own = hashlib.sha256(Path(path).read_bytes()).hexdigest().encode("ascii")
    seen = group.gather("table file", own)
    for rank, theirs in enumerate(seen):
        if seen[0] and theirs and theirs != seen[0]:
            raise AgreementError(
                f"rank {rank} was given another table ({theirs[:12].decode()}) than rank 0 ({seen[0][:12].decode()}); "
                "give all ranks the same"
            )


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        names = _json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{folder / INDEX} has no weight_map that names files")
        found = sorted(set(names.values()))
        outside = [name for name in found if Path(name).name != name]
        if outside:
            raise ModelError(f"{folder / INDEX} names {outside[0]!r:.80}, expected files of the folder itself")
        missing = [name for name in found if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its {len(found)} weight files, {missing[0]} for one; "
                "copy the whole checkpoint"
            )
        return found
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; {others[0]} is of another format, convert it to safetensors" if others else ""
    raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")


def _header(path: Path) -> tuple[int, bytes]:
    """Return a safetensors file's size and its JSON header, checked to describe exactly the file's bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if not start:
                raise ValueError("it is empty; copy it again")
            if start == GIT_LFS:
                raise ValueError("it is a pointer of Git LFS; fetch the weights with git lfs pull")
            (length,) = struct.unpack("<Q", start)
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = file.read(length)
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        offsets = [tensor["data_offsets"] for tensor in tensors]
        if not all(len(pair) == 2 and all(type(place) is int for place in pair) for pair in offsets):
            raise ValueError("its header has data_offsets that are not two numbers")
        end = max((pair[1] for pair in offsets), default=0)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error or 'no header'}") from error
    if 8 + length + end != size:
        raise ModelError(f"{path} has {size} bytes, its header describes {8 + length + end}; copy it again")
    return size, header


def _sampled(path: Path, size: int) -> bytes:
    """Return parts of a file that differ for other weights of the same shapes, without reading all of it."""
    step = max(1, size // SAMPLES)
    with path.open("rb") as file:
        found = []
        for place in range(0, size, step):
            file.seek(place)
            found.append(file.read(SAMPLE_BYTES))
    return b"".join(found)


def _json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object")
    return found
