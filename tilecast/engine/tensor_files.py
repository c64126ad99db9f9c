"""A checkpoint's safetensors files, read one tensor, or a part of one, at a time into memory of its own.

Files are not mapped: the pages of a mapped file count as the process's memory, so that a checkpoint which is turned
into something else tensor by tensor would be held twice.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAGE_BYTES = 4096
"""What a file system reads at least: rows of which less is wanted are read whole."""
BLOCK_BYTES = 1 << 20
"""How much of whole rows is in memory at a time besides the part that is wanted."""

Index = EllipsisType | slice | tuple[slice, ...]


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

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
        """Return one tensor, or some rows of it, or some columns of those of a tensor of two dimensions.

        Raises ModelError where its file cannot be read.
        """
        place = self._places[name]
        rows = range(place.shape[0]) if rows is None and place.shape else rows
        if rows is None:
            rows, width = range(1), place.end - place.begin
        else:
            width = (place.end - place.begin) // max(1, place.shape[0])
        try:
            with (self.folder / place.file).open("rb", buffering=0) as file:
                begin = place.begin + rows.start * width
                if columns is None or columns == range(place.shape[1]):
                    data = torch.empty(len(rows) * width, dtype=torch.uint8)
                    _fill(file, data, begin)
                    return data.view(place.dtype).view((len(rows), *place.shape[1:]) if place.shape else ())
                size = place.dtype.itemsize
                part = _columns(file, begin, len(rows), width, slice(columns.start * size, columns.stop * size))
                return part.view(place.dtype).view(len(rows), len(columns))
        except OSError as error:
            raise ModelError(f"{self.folder / place.file} cannot be read: {error}") from error

    def on_demand(self, name: str) -> OnDemand:
        """Return one tensor that is read when it is wanted."""
        place = self._places[name]

        def part(index: Index) -> torch.Tensor:
            if not place.shape or index is ...:
                return self.read(name)
            picked = index if isinstance(index, tuple) else (index,)
            rows, *others = [range(*cut.indices(size)) for cut, size in zip(picked, place.shape, strict=False)]
            if len(place.shape) <= 2:
                return self.read(name, rows, *others)
            return self.read(name, rows)[(slice(None), *picked[1:])].clone()

        return OnDemand(place.shape, place.dtype, part)


class OnDemand:
    """A tensor, or any part of it, that is read when it is indexed; called as the slices of safetensors are."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, part: Callable[[Any], torch.Tensor]) -> None:
        """Take what `part` gives for slices without a step."""
        self._shape, self._dtype, self._part = shape, dtype, part

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors names it."""
        return NAMES[self._dtype]

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Return a part: an ellipsis, a slice or a tuple of slices. Raises what reading it does."""
        return self._part(index)


def _fill(file: Any, data: torch.Tensor, begin: int) -> None:
    """Read bytes from `begin` on into contiguous `data`. Raises OSError."""
    file.seek(begin)
    view, done = memoryview(data.numpy().data), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError("it ends early")
        done += count


def _columns(file: Any, begin: int, rows: int, width: int, wanted: slice) -> torch.Tensor:
    """Return the bytes `wanted` of each of some rows of `width` bytes: uint8 [rows, bytes]."""
    size = wanted.stop - wanted.start
    found = torch.empty((rows, size), dtype=torch.uint8)
    if size >= PAGE_BYTES:
        for row, part in enumerate(found):
            _fill(file, part, begin + row * width + wanted.start)
        return found
    together = max(1, BLOCK_BYTES // max(1, width))
    for first in range(0, rows, together):
        part = found[first : first + together]
        block = torch.empty((len(part), width), dtype=torch.uint8)
        _fill(file, block.view(-1), begin + first * width)
        part.copy_(block[:, wanted])
    return found


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
