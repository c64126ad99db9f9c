from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecast.errors import InputError
from tilecast.kernels import routing
from tilecast.kernels.gpu import build, sorting
from tilecast.kernels.gpu.sorting import DeviceLayout, TileMap, max_tiles

PATHS = {"one launch": sorting.SPAN, "three launches": 0}
paths = pytest.mark.parametrize("small", PATHS.values(), ids=PATHS)
POISON = -(2**30)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of every kernel that is launched."""
    names: list[str] = []
    launch = build.Build.launch

    def record(self: build.Build, grid: tuple[int, ...], device: torch.device, *args: Any) -> None:
        if 0 not in grid:
            names.append(self.function)
        launch(self, grid, device, *args)

    monkeypatch.setattr(build.Build, "launch", record)
    return names


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse everything by which the host would wait for a value; the interpreter's own reads come after."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host read a value")

    names = ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__index__", "nonzero")
    monkeypatch.setattr(build.Build, "launch", lambda *_: None)
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, refuse)
        yield


def draw(tokens: int, top_k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Draw ids of which some lie on either side of the experts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)


def expected_tiles(offsets: torch.Tensor, block_m: int) -> list[tuple[int, int, int]]:
    bounds = offsets.tolist()
    return [
        (expert, start, end)
        for expert, (begin, end) in enumerate(pairwise(bounds))
        for start in range(begin, end, block_m)
    ]


def entries(tiles: TileMap) -> list[tuple[int, int, int]]:
    parts = [part[: int(tiles.count)].tolist() for part in (tiles.experts, tiles.starts, tiles.ends)]
    return list(zip(*parts, strict=True))


def assert_same(layout: DeviceLayout, ids: torch.Tensor, experts: int, *block_ms: int) -> None:
    expected = routing.sort_slots(ids, experts)
    present = int(expected.offsets[-1])
    for block_m in block_ms:
        tiles = layout.tiles(block_m)
        assert entries(tiles) == expected_tiles(expected.offsets, block_m)
        assert tiles.max_tiles == tiles.experts.numel() == max_tiles(ids.numel(), experts, block_m)
    assert torch.equal(layout.offsets, expected.offsets)
    assert torch.equal(layout.slots[:present], expected.slots[:present])
    assert layout.slots.shape == expected.slots.shape
    assert layout.slots.dtype == layout.offsets.dtype == layout.ids.dtype == torch.int32
    inside = (layout.ids >= 0) & (layout.ids < experts)
    assert torch.equal(torch.where(inside, layout.ids, -1), torch.where(expected.ids < experts, expected.ids, -1))


@paths
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 8), (1, 1, 1), (1, 8, 128), (5, 3, 7), (37, 6, 60), (64, 8, 64), (70, 1, 65), (100, 2, 3), (17, 8, 512)],
)
def test_layouts_are_those_of_the_plain_sort(
    monkeypatch: pytest.MonkeyPatch, small: int, tokens: int, top_k: int, experts: int
) -> None:
    monkeypatch.setattr(sorting, "SMALL", small)
    ids = draw(tokens, top_k, experts)
    assert_same(DeviceLayout(ids.to(torch.int32), experts), ids, experts, 16, 64)


@paths
def test_most_experts(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(sorting, "SMALL", small)
    ids = draw(33, 4, sorting.MAX_EXPERTS)
    ids[0] = torch.tensor([0, 1023, 1024, 1025])
    assert_same(DeviceLayout(ids, 1024), ids, 1024, 32)


@pytest.mark.parametrize("over", [0, 1])
def test_at_the_limit_of_one_launch(over: int, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "SMALL", 96)
    ids = draw(sorting.SMALL + over, 1, 5)
    assert_same(DeviceLayout(ids.to(torch.int32), 5), ids, 5, 128)
    assert launches == (["count_chunks", "scan_chunks", "place_slots"] if over else ["sort_at_once"])


@paths
@pytest.mark.parametrize("expert", [0, 3, -1, 4, 2**31 - 1, -(2**31)])
def test_all_to_one(monkeypatch: pytest.MonkeyPatch, small: int, expert: int) -> None:
    monkeypatch.setattr(sorting, "SMALL", small)
    ids = torch.full((600, 1), expert, dtype=torch.int32)
    assert_same(DeviceLayout(ids, 4), ids, 4, 16)


@pytest.mark.parametrize("absent", [-1, -(2**40), 4, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, -(2**63)])
def test_wide_ids_do_not_wrap_around(absent: int) -> None:
    layout = DeviceLayout(torch.tensor([[1, absent], [absent, 1]]), 4)
    assert layout.ids.tolist() == [[1, -1], [-1, 1]]
    assert layout.offsets.tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    layout = DeviceLayout(torch.tensor([[1, 0], [100, 1]], dtype=dtype), 2)
    assert layout.slots[:3].tolist() == [1, 0, 3]


@given(st.data())
@settings(max_examples=20)
def test_any_routing(data: st.DataObject) -> None:
    experts, top_k, small = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    one_id = st.one_of(st.integers(0, experts - 1), st.integers(-(2**31), 2**31 - 1))
    rows = data.draw(st.lists(st.lists(one_id, min_size=top_k, max_size=top_k), max_size=40))
    ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, top_k).repeat(data.draw(st.integers(1, 5)), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "SMALL", sorting.SPAN if small else 0)
        # Small blocks, so that few slots make many programs.
        patch.setattr(sorting, "CHUNK", 128)
        sorting.builds.cache_clear()
        try:
            assert_same(DeviceLayout(ids, experts), ids, experts, data.draw(st.sampled_from([1, 8, 16, 128])))
        finally:
            sorting.builds.cache_clear()


@paths
def test_many_chunks_are_scanned_in_order(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """More chunks than one step of the scan takes, and more experts than one of its programs."""
    monkeypatch.setattr(sorting, "SMALL", small)
    monkeypatch.setattr(sorting, "SCAN_ROWS", 16)
    monkeypatch.setattr(sorting, "CHUNK", 64)
    sorting.builds.cache_clear()
    ids = draw(1100, 1, 20, seed=3)
    assert_same(DeviceLayout(ids, 20), ids, 20, 32)
    sorting.builds.cache_clear()


@pytest.mark.parametrize(("slots", "experts", "block_m"), [(1, 1, 16), (7, 3, 2), (9, 4, 4), (3, 8, 2), (12, 2, 1)])
def test_the_bound_of_tiles_is_the_least(slots: int, experts: int, block_m: int) -> None:
    def most(left: int, over: int) -> int:
        """Return the most tiles of `left` slots over so many experts, by trying every split."""
        if over == 1:
            return -(-left // block_m)
        return max(-(-mine // block_m) + most(left - mine, over - 1) for mine in range(left + 1))

    assert max_tiles(slots, experts, block_m) == most(slots, experts)
    assert max_tiles(0, experts, block_m) == 0


def test_nothing_is_launched_before_it_is_needed(launches: list[str]) -> None:
    ids = draw(9, 2, 4).to(torch.int32)
    layout = DeviceLayout(ids, 4)
    assert layout.ids.data_ptr() == ids.data_ptr()
    assert (layout.tokens, layout.top_k, layout.experts, repr(layout), layout == layout) is not None
    assert launches == []
    layout.tiles(16)
    assert launches == ["sort_at_once"]
    assert layout.tiles(16) is layout.tiles(16)
    assert layout.slots is layout.slots
    assert layout.offsets is layout.offsets
    assert launches == ["sort_at_once"]
    layout.tiles(32)
    assert launches == ["sort_at_once", "map_tiles"]


def test_order_first_and_tiles_later(launches: list[str]) -> None:
    ids = draw(50, 2, 7)
    layout = DeviceLayout(ids, 7)
    assert launches == ["narrow_ids"]
    assert layout.slots.numel() == 100
    assert launches == ["narrow_ids", "sort_at_once"]
    assert_same(layout, ids, 7, 16)
    assert launches == ["narrow_ids", "sort_at_once", "map_tiles"]


def test_no_slots_launch_nothing(launches: list[str]) -> None:
    for shape in ((0, 2), (3, 0)):
        layout = DeviceLayout(torch.empty(shape, dtype=torch.int64), 3)
        assert (int(layout.tiles(16).count), layout.offsets.tolist(), layout.slots.numel()) == (0, [0] * 4, 0)
        assert int(layout.tiles(32).count) == 0
    assert launches == []


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("tokens", [0, 5, 5000])
def test_the_host_reads_nothing(tokens: int) -> None:
    for dtype in (torch.int32, torch.int64):
        layout = DeviceLayout(torch.zeros(tokens, 2, dtype=dtype), 8)
        layout.tiles(16)
        layout.tiles(32)
        assert layout.slots.shape == (tokens * 2,)


@paths
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (530, 65)])
def test_nothing_is_written_outside(monkeypatch: pytest.MonkeyPatch, small: int, tokens: int, experts: int) -> None:
    """Ids are garbage of every kind, and between all arrays lies poison that must survive."""
    guard, buffers = 1024, []
    monkeypatch.setattr(sorting, "SMALL", small)

    def guarded(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        widths = [part for size in sizes for part in (size, -size % 4 + guard)]
        buffer = torch.full((guard + sum(widths),), POISON, dtype=torch.int32, device=device)
        parts = buffer[guard:].split(widths)
        buffers.extend([buffer[:guard], *parts[1::2]])
        return parts[::2]

    monkeypatch.setattr(sorting, "_empty", guarded)
    generator = torch.Generator().manual_seed(1)
    for low, high, dtype in ((-(2**31), 2**31 - 1, torch.int32), (-1, experts + 1, torch.int64)):
        ids = torch.randint(low, high, (tokens, 1), generator=generator, dtype=dtype)
        layout = DeviceLayout(ids, experts)
        assert_same(layout, ids, experts, 16, 32)
        tiles = layout.tiles(16)
        for part in (tiles.experts, tiles.starts, tiles.ends):
            assert bool((part[int(tiles.count) :] == POISON).all())
    assert buffers
    assert all(bool((buffer == POISON).all()) for buffer in buffers)


def test_strides_and_alignment_do_not_matter() -> None:
    ids = draw(40, 4, 9).to(torch.int32)
    transposed, shifted = ids.T.contiguous().T, torch.empty(161, dtype=torch.int32)[1:].view(40, 4).copy_(ids)
    for given_ids in (transposed, shifted, shifted.to(torch.int64), ids.to(torch.int64).T.contiguous().T):
        layout = DeviceLayout(given_ids, 9)
        assert layout.ids.is_contiguous()
        assert layout.ids.data_ptr() % 16 == 0
        assert_same(layout, ids, 9, 16)


@pytest.mark.parametrize("ids", [torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64),
                                 torch.zeros(4, 2, dtype=torch.bool)])  # fmt: skip
def test_refuses_what_are_no_ids(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="expected integers"):
        DeviceLayout(ids, 4)


@pytest.mark.parametrize("experts", [0, -1, 1025])
def test_refuses_too_many_experts(experts: int) -> None:
    with pytest.raises(InputError, match=f"E is {experts}, the GPU's sort takes 1 to 1024"):
        DeviceLayout(torch.zeros(1, 1, dtype=torch.int32), experts)


def test_refuses_too_many_slots() -> None:
    with pytest.raises(InputError, match="16777217 tokens × top-1"):
        DeviceLayout(torch.empty(1, 1, dtype=torch.int32).expand(2**24 + 1, 1), 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@paths
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 8, 128), (513, 8, 60), (4096, 8, 1024), (20000, 4, 9)])
def test_on_a_device(monkeypatch: pytest.MonkeyPatch, small: int, tokens: int, top_k: int, experts: int) -> None:
    monkeypatch.setattr(sorting, "SMALL", min(small, sorting.SPAN))
    ids = draw(tokens, top_k, experts)
    expected = routing.sort_slots(ids, experts)
    present = int(expected.offsets[-1])
    for _ in range(3):
        layout = DeviceLayout(ids.cuda(), experts)
        assert entries(layout.tiles(16)) == expected_tiles(expected.offsets, 16)
        assert torch.equal(layout.offsets.cpu(), expected.offsets)
        assert torch.equal(layout.slots[:present].cpu(), expected.slots[:present])
