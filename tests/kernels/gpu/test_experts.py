"""The Triton expert kernels against the float64 oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from tests.cases import CASES, Case, assert_both_gemms, operands
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.split_k import SplitK
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.gpu.tma import Tma
from tilecast.problem import ExpertLayer, TileConfig

TILE = {"block_m": 16, "block_n": 64, "block_k": 64, "group_m": 4, "num_warps": 4, "num_stages": 3}
VARIANTS: dict[str, tuple[TritonExperts, TileConfig]] = {
    "grouped": (Grouped(), TileConfig(Grouped.name, {**TILE, "swap": 0})),
    "grouped swapped": (Grouped(), TileConfig(Grouped.name, {**TILE, "block_m": 8, "swap": 1})),
    "persistent": (Persistent(), TileConfig(Persistent.name, {**TILE, "swap": 0, "waves": 1})),
    "tma": (Tma(), TileConfig(Tma.name, {**TILE, "waves": 0, "specialize": 0})),
    "tma persistent": (Tma(), TileConfig(Tma.name, {**TILE, "waves": 1, "specialize": 0})),
    "decode": (Decode(), TileConfig(Decode.name, {k: v for k, v in TILE.items() if k != "group_m"} | {"swap": 0})),
    "decode swapped": (
        Decode(), TileConfig(Decode.name, {k: v for k, v in TILE.items() if k != "group_m"} | {"block_m": 8, "swap": 1})
    ),
    "split-K": (SplitK(), TileConfig(SplitK.name, {**TILE, "chunk": 256})),
}  # fmt: skip


HERE = parse_target("cuda:90").environment()


def refusal(kernel: TritonExperts, config: TileConfig, layer: ExpertLayer) -> str | None:
    reasons = [kernel.rejects(gemm, HERE) or kernel.invalid(gemm, config, HERE) for gemm in layer.gemms]
    return next((reason for reason in reasons if reason), None)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(case: Case, variant: str, dtype: str) -> None:
    kernel, config = VARIANTS[variant]
    layer = dataclasses.replace(case.layer, dtype=dtype)
    if reason := refusal(kernel, config, layer):
        pytest.skip(reason)
    assert_both_gemms(kernel, config, operands(layer, case.tokens, case.routing))
