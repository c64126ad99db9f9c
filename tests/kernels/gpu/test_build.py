"""What `Build.launch` and the descriptors take: grids that a device has, operands where compiled code expects them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import operands
from tilecast.errors import InputError
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.tma import Tma, describe
from tilecast.problem import ExpertLayer, TileConfig

TILE = {"block_m": 16, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}
CPU = torch.device("cpu")


class NeverLaunched:
    def __getitem__(self, grid: object) -> object:
        raise AssertionError(f"launched on {grid}")


class Launched(Exception):
    pass


class Recorded:
    def __getitem__(self, grid: object) -> object:
        raise Launched(str(grid))


def build_of(kernel: object) -> Build:
    build = Build(module="_x", function="tiles", signature=(), constants=(), num_warps=4, num_stages=1)
    # Where a cached property keeps its value.
    build.__dict__["kernel"] = kernel
    return build


@pytest.mark.parametrize("grid", [(1 << 31,), (1 << 16, 1 << 15), (1 << 20, 1, 1 << 11), (1, 1 << 16), (4, 1, 1 << 16)])
def test_a_grid_that_would_be_dropped_or_refused_is_an_error(grid: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"tiles needs a grid of [0-9×]+ programs"):
        build_of(NeverLaunched()).launch(grid, CPU)


@pytest.mark.parametrize("grid", [((1 << 31) - 1,), (2, 65535), (1 << 12, 1, 65535)])
def test_the_largest_grids_are_launched(grid: tuple[int, ...]) -> None:
    with pytest.raises(Launched):
        build_of(Recorded()).launch(grid, CPU)


@pytest.mark.parametrize("grid", [(0,), (1 << 40, 0)])
def test_an_empty_grid_is_not_launched(grid: tuple[int, ...]) -> None:
    build_of(NeverLaunched()).launch(grid, CPU)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return an equal, contiguous tensor that begins one element past a 16-byte boundary."""
    memory = torch.empty(tensor.numel() + 16 // tensor.element_size(), dtype=tensor.dtype)
    first = -memory.data_ptr() % 16 // tensor.element_size() + 1
    moved = memory[first : first + tensor.numel()].view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    return moved


def test_a_descriptor_of_unaligned_memory_is_an_error() -> None:
    matrix = torch.zeros((32, 64), dtype=torch.bfloat16)
    assert describe(matrix, (32, 64), (16, 64)).base is matrix
    with pytest.raises(InputError, match=r"multiples of 16; pass a clone"):
        describe(shifted(matrix), (32, 64), (16, 64))


@pytest.mark.parametrize("kernel", [Decode(), Tma()], ids=lambda kernel: kernel.name)
def test_kernels_get_aligned_rows_and_routing_weights(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExpertLayer(hidden=64, intermediate=64, experts=2, top_k=2)
    given = operands(layer, 3)
    extra = {"swap": 0} if isinstance(kernel, Decode) else {"group_m": 1, "waves": 0, "specialize": 0}
    config = TileConfig(kernel.name, {**TILE, **extra})
    seen: list[tuple[str, int, bool]] = []

    def launch(self: Build, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        memory = [getattr(a, "base", a) for a in arguments]
        seen.extend((self.function, i, t.data_ptr() % 16 == 0) for i, t in enumerate(memory) if torch.is_tensor(t))

    monkeypatch.setattr(Build, "launch", launch)
    rows = torch.empty((6, 64), dtype=torch.bfloat16)
    kernel.up(config, shifted(given.hidden), given.up, given.route, rows)
    out = torch.empty((3, 64), dtype=torch.bfloat16)
    kernel.down(config, shifted(rows), given.down, given.route, shifted(given.topk_weights), out)
    assert len(seen) >= 10 and all(aligned for _, _, aligned in seen), seen
