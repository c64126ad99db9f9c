"""What a token's absent slots cost the unsorted down GEMM: counted in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import Operands, operands, run_down
from tests.tensor_core import tensor_core
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.routing import sort_slots
from tilecast.problem import ExpertLayer, TileConfig

LAYER = ExpertLayer(hidden=48, intermediate=80, experts=4, top_k=4, global_experts=32)
STEPS, COLUMN_TILES = 3, 2
"""K of 80 in steps of 32, 48 columns in tiles of 32."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


def config(swap: int) -> TileConfig:
    tile = {"block_m": 8 if swap else 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 3}
    return TileConfig(Decode.name, {**tile, "swap": swap})


def routed(given: Operands, ids: list[int]) -> Operands:
    return replace(given, route=sort_slots(torch.tensor([ids]), LAYER.experts))


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize(
    ("ids", "present"), [([2, 0, 3, 1], 4), ([-1, 2, 17, -1], 1), ([9, -1, 1, 0], 2), ([-1, 4, -7, 31], 0)]
)
def test_absent_slots_cost_no_steps(ids: list[int], present: int, swap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    dots = 0
    given = routed(operands(LAYER, 1), ids)
    with tensor_core(16, 25):
        create_dot = InterpreterBuilder.create_dot

        def counted(*arguments: Any) -> Any:
            nonlocal dots
            dots += 1
            return create_dot(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_dot", counted)
            out = run_down(Decode(), config(swap), given)
    assert dots == present * STEPS * COLUMN_TILES
    assert bool(out.any()) is (present > 0)
