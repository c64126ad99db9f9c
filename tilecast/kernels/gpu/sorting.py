"""Routed slots on a GPU, sorted by expert when something asks for it, and the row tiles of the sorted order.

Up to SMALL slots are sorted, and their tiles mapped, in one launch; more take three. No launch waits for the host:
bounds are computed from the number of slots, and what depends on the routing stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from tilecast.errors import InputError
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.tiles import MAX_EXPERTS
from tilecast.kernels.routing import ExpertLayout

MAX_SLOTS = 1 << 24
SPAN = 4096
"""The most slots that one launch can sort: two numbers, an expert and a slot below SPAN, are compared as one."""
SMALL = SPAN
"""Up to so many slots are sorted in one launch."""

NARROW_BLOCK = 1024
ROWS, COLUMNS = 32, 512
"""Slots that a program of the one launch ranks, and slots it compares them with at a time."""
CHUNK, PLACE_BLOCK = 512, 64
SCAN_ROWS, SCAN_COLUMNS = 512, 16
ALIGNMENT = 4
"""Int32 elements of 16 bytes, where every array begins: kernels are compiled for that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TileMap:
    """The row tiles of an expert-sorted layout, in the order of experts, then of rows.

    All tensors are int32 on the layout's device. Tile t < `count[0]` works for expert `experts[t]` on sorted positions
    `starts[t]` to `starts[t] + block_m - 1`; those from `ends[t]` (the expert's last offset) on are padding. `experts`,
    `starts` and `ends` are [max_tiles]; entries from `count[0]` on have no meaning. `max_tiles` is the most that
    this many slots can need.
    """

    block_m: int
    max_tiles: int
    count: torch.Tensor
    experts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


class Builds(NamedTuple):
    """The kernels for one number of experts."""

    narrow: Build
    at_once: Build
    chunks: Build
    scan: Build
    place: Build
    tiles: Build


@lru_cache(maxsize=64)
def builds(experts: int) -> Builds:
    """Return every kernel that layouts of so many experts may launch, for any top-k, BLOCK_M and target."""
    # At least a warp's lanes: a histogram has no fewer bins.
    bins = max(64, _power_of_two(experts))
    tiles = min(128, max(16, 8192 // bins))
    tile_map = _i32p("tile_count", "tile_experts", "tile_starts", "tile_ends")
    tile_sizes = _i32("block_m", "max_tiles")
    shape = {"EXPERTS": experts, "BINS": bins}
    ids = _i32p("ids")
    return Builds(
        narrow=_build(
            "narrow_ids", (("given", "*i64"), *ids, *_i32("count")), {"EXPERTS": experts, "BLOCK": NARROW_BLOCK}, 4
        ),
        at_once=_build(
            "sort_at_once",
            (*ids, *_i32p("slots", "offsets"), *tile_map, *_i32("count"), *tile_sizes),
            {**shape, "SPAN": SPAN, "ROWS": ROWS, "COLUMNS": COLUMNS, "TILES": tiles},
            8,
        ),
        chunks=_build("count_chunks", (*ids, *_i32p("counts"), *_i32("count")), {**shape, "CHUNK": CHUNK}, 4),
        scan=_build(
            "scan_chunks",
            (*_i32p("counts", "totals"), *_i32("chunks")),
            {"EXPERTS": experts, "ROWS": SCAN_ROWS, "COLUMNS": SCAN_COLUMNS},
            8,
        ),
        place=_build(
            "place_slots",
            (*ids, *_i32p("before", "totals", "slots", "offsets"), *tile_map, *_i32("count", "chunks"), *tile_sizes),
            {**shape, "CHUNK": CHUNK, "BLOCK": PLACE_BLOCK, "TILES": tiles},
            4,
        ),
        tiles=_build("map_tiles", (*_i32p("offsets"), *tile_map, *tile_sizes), {**shape, "TILES": tiles}, 4),
    )


class DeviceLayout(ExpertLayout):
    """Routed slots of ids on a GPU, sorted when `slots`, `offsets` or `tiles` is first asked for, and then kept.

    `ids` is int32 [T, k] at once, without a copy where it was handed in like that: whoever reads it must take any
    value outside [0, experts) for an absent slot. It must not change before the sort is launched, which is on the
    stream that is current then. Nothing here waits for the device.
    """

    ids: torch.Tensor

    def __init__(self, topk_ids: torch.Tensor, experts: int) -> None:
        """Take integer ids [T, k]. Raises InputError for another dtype or shape, or more than the kernels count."""
        _check(topk_ids, experts)
        # The fields of a frozen dataclass; slots and offsets are properties here.
        self.__dict__.update(
            tokens=topk_ids.shape[0],
            top_k=topk_ids.shape[1],
            experts=experts,
            ids=_narrow(topk_ids, experts),
            _order=None,
            _tiles={},
        )

    # Comparing or printing fields would launch the sort and wait for it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Return a short form; reads nothing from the device."""
        return f"DeviceLayout(tokens={self.tokens}, top_k={self.top_k}, experts={self.experts})"

    @property
    def slots(self) -> torch.Tensor:
        """The sorted slots, int32 [T·k]; those from `offsets[-1]` on have no meaning."""
        return self._sorted()[0]

    @property
    def offsets(self) -> torch.Tensor:
        """Where each expert's slots begin, int32 [experts + 1]."""
        return self._sorted()[1]

    def tiles(self, block_m: int) -> TileMap:
        """Return the row tiles of `block_m` sorted slots each; kept, so that up and down share them."""
        tiles: dict[int, TileMap] = self.__dict__["_tiles"]
        if block_m not in tiles:
            tiles[block_m] = self._map(block_m)
        return tiles[block_m]

    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        order: tuple[torch.Tensor, torch.Tensor] | None = self.__dict__["_order"]
        if order is None:
            slots, offsets = _empty((self._count, self.experts + 1), self.ids.device)
            order = self.__dict__["_order"] = slots, offsets
            # Nothing is written to a map of no tiles; the kernels only want pointers.
            self._sort(slots, offsets, (offsets,) * 4, block_m=1, max_tiles=0)
        return order

    def _map(self, block_m: int) -> TileMap:
        device, most = self.ids.device, max_tiles(self._count, self.experts, block_m)
        sizes = (1, most, most, most)
        if self.__dict__["_order"] is None:
            slots, offsets, *parts = _empty((self._count, self.experts + 1, *sizes), device)
            self.__dict__["_order"] = slots, offsets
            self._sort(slots, offsets, tuple(parts), block_m=block_m, max_tiles=most)
        else:
            parts = list(_empty(sizes, device))
            build, offsets = builds(self.experts).tiles, self._sorted()[1]
            if self._count:
                build.launch((self._programs(most),), device, offsets, *parts, block_m, most)
        if not self._count:
            parts[0].zero_()
        count, experts, starts, ends = parts
        return TileMap(block_m=block_m, max_tiles=most, count=count, experts=experts, starts=starts, ends=ends)

    def _sort(
        self,
        slots: torch.Tensor,
        offsets: torch.Tensor,
        tile_map: tuple[torch.Tensor, ...],
        *,
        block_m: int,
        max_tiles: int,
    ) -> None:
        """Launch the sort and, with `max_tiles`, the map of tiles."""
        count, device, kernels = self._count, self.ids.device, builds(self.experts)
        if count == 0:
            offsets.zero_()
            return
        layout_programs, written = self._programs(max_tiles), (slots, offsets, *tile_map)
        if count <= SMALL:
            grid = (-(-count // ROWS) + layout_programs,)
            kernels.at_once.launch(grid, device, self.ids, *written, count, block_m, max_tiles)
            return
        chunks = -(-count // CHUNK)
        counts, totals = _empty((chunks * self.experts, self.experts), device)
        kernels.chunks.launch((chunks,), device, self.ids, counts, count)
        kernels.scan.launch((-(-self.experts // SCAN_COLUMNS),), device, counts, totals, chunks)
        grid = (chunks + layout_programs,)
        kernels.place.launch(
            grid, device, self.ids, counts, totals, *written, count, chunks, block_m, max_tiles
        )  # fmt: skip

    @property
    def _count(self) -> int:
        return self.tokens * self.top_k

    def _programs(self, max_tiles: int) -> int:
        """Return how many programs write the layout; the first one also when there are no tiles."""
        per_program = dict(builds(self.experts).tiles.constants)["TILES"]
        assert isinstance(per_program, int)
        return max(1, -(-max_tiles // per_program))


def max_tiles(slots: int, experts: int, block_m: int) -> int:
    """Return the most tiles that so many slots can need: every expert but one with one slot, one with the rest.

    Each expert that has slots has one tile, and one more for every `block_m` slots after its first.
    """
    active = min(slots, experts)
    return active + (slots - active) // block_m


def _check(topk_ids: torch.Tensor, experts: int) -> None:
    not_integers = topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex or topk_ids.dtype == torch.bool
    if topk_ids.dim() != 2 or not_integers:
        raise InputError(f"topk_ids is {topk_ids.dtype} {tuple(topk_ids.shape)}, expected integers [tokens, top_k]")
    if not 1 <= experts <= MAX_EXPERTS:
        raise InputError(f"number of experts E is {experts}, the GPU's sort takes 1 to {MAX_EXPERTS}")
    if topk_ids.numel() > MAX_SLOTS:
        tokens, top_k = topk_ids.shape
        raise InputError(f"{tokens} tokens × top-{top_k} are more than {MAX_SLOTS} slots; split the batch")


def _narrow(topk_ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the ids as int32, contiguous, on a 16-byte boundary; absent ones stay absent."""
    if topk_ids.dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16):
        return topk_ids.to(torch.int32).contiguous()
    if topk_ids.dtype == torch.int32:
        return aligned(topk_ids)
    wide = aligned(topk_ids.to(torch.int64))
    (ids,) = _empty((wide.numel(),), wide.device)
    grid = (-(-wide.numel() // NARROW_BLOCK),)
    builds(experts).narrow.launch(grid, wide.device, wide, ids, wide.numel())
    return ids.view(wide.shape)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor that begins on a 16-byte boundary, which Triton compiles for: itself if it does."""
    contiguous = tensor.contiguous()
    return contiguous if contiguous.data_ptr() % 16 == 0 else contiguous.clone()


def _empty(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return int32 arrays of these sizes in one allocation, each on a 16-byte boundary."""
    padded = list(_padded(sizes))
    arrays: tuple[torch.Tensor, ...] = torch.split(torch.empty(sum(padded), dtype=torch.int32, device=device), padded)
    return arrays[::2]


def _padded(sizes: tuple[int, ...]) -> Iterator[int]:
    """Yield each size and, after it, the elements up to the next boundary."""
    for size in sizes:
        yield from (size, -size % ALIGNMENT)


def _power_of_two(value: int) -> int:
    """Return the smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def _i32p(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "*i32") for name in names)


def _i32(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "i32") for name in names)


def _build(function: str, signature: tuple[tuple[str, str], ...], constants: dict[str, int], num_warps: int) -> Build:
    return Build(
        module="_sorting",
        function=function,
        signature=signature,
        constants=tuple(constants.items()),
        num_warps=num_warps,
        num_stages=1,
    )
