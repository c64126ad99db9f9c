"""What `tiles.py` says of a config, against what the compiler makes of it."""

from __future__ import annotations

import pytest

from tilecast.kernels import registry
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.gpu.tiles import instruction, shared_bytes
from tilecast.kernels.static import analyse, verdict
from tilecast.problem import ExpertLayer, TileConfig

pytest.importorskip("triton", reason="Triton is not installed")
LAYER = ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8)


def grouped(block_m: int, block_n: int, block_k: int, warps: int, stages: int, swap: int) -> TileConfig:
    shape = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "group_m": 4}
    return TileConfig("triton.moe_gemm", {**shape, "num_warps": warps, "num_stages": stages, "swap": swap})


SPECIALIZED = TileConfig(
    "triton.moe_tma",
    {**{f"block_{axis}": 64 for axis in "nk"}, "block_m": 16, "group_m": 8, "num_warps": 4, "num_stages": 3}
    | {"waves": 0, "specialize": 1},
)
CASES = {
    "cuda:80": [grouped(32, 256, 16, 4, 2, 1), grouped(32, 128, 16, 4, 3, 0)],
    "cuda:90": [grouped(8, 128, 64, 8, 3, 1), grouped(16, 64, 64, 4, 3, 1), grouped(64, 32, 16, 8, 2, 0)],
    "cuda:100": [grouped(8, 64, 64, 4, 3, 1), grouped(16, 128, 64, 8, 3, 1), SPECIALIZED],
    "hip:gfx942": [grouped(32, 64, 16, 4, 2, 0)],
}


@pytest.mark.parametrize("name", CASES)
def test_edges_of_the_rules(name: str) -> None:
    target, gemm = parse_target(name), LAYER.down
    builds = []
    for config in CASES[name]:
        kernel = registry[config.kernel]
        assert isinstance(kernel, TritonExperts)
        assert registry.invalid(gemm, config, target.environment()) is None
        builds.append(kernel.builds(gemm, config, target)[0])
    for config, report in zip(CASES[name], analyse(builds, target), strict=True):
        assert verdict(report, target, tensor_cores=True) is None, config.label
        assert [kind.removesuffix(".mma") for kind in report.mma_kinds] == [instruction(gemm, config, target)]
        assert report.shared_bytes <= shared_bytes(gemm, config, target), config.label
