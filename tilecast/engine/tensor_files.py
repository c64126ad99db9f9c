"""A checkpoint's safetensors files, read one tensor at a time into memory of its own.

Files are not mapped: the pages of a mapped file count as the process's memory, so that a checkpoint which is turned
into something else tensor by tensor would be held twice.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tilecast.engine.checkpoint import Checkpoint
from tilecast.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Place(NamedTuple):
    """Where a tensor's bytes are, and what they are."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles:
    """The tensors of an inspected checkpoint by name; `read` takes one from its file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the headers. Raises ModelError."""
        self.folder = checkpoint.folder
        self.files = tuple(name for name, _ in checkpoint.files)
        self._places: dict[str, Place] = {}
        for file in self.files:
            self._places.update(_places(self.folder / file))

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Give all names, file by file."""
        return iter(self._places)

    def place(self, name: str) -> Place:
        """Return where a tensor is, its dtype and shape."""
        return self._places[name]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor. Raises ModelError where its file cannot be read."""
        place = self._places[name]
        data = torch.empty(place.end - place.begin, dtype=torch.uint8)
        try:
            with (self.folder / place.file).open("rb", buffering=0) as file:
                file.seek(place.begin)
                view, done = memoryview(data.numpy().data), 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError("it ends early")
                    done += count
        except OSError as error:
            raise ModelError(f"{self.folder / place.file} cannot be read: {error}") from error
        return data.view(place.dtype).view(place.shape)


def _places(path: Path) -> Iterator[tuple[str, Place]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, found in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES.get(found["dtype"]), tuple(found["shape"]), found["data_offsets"]
        if dtype is None:
            raise ModelError(f"{path}: {name} is of dtype {found['dtype']!r:.20}, expected one of {', '.join(DTYPES)}")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ModelError(f"{path}: {name} has {end - begin} bytes, which do not fit {found['dtype']} {shape}")
        yield name, Place(path.name, dtype, shape, 8 + length + begin, 8 + length + end)
