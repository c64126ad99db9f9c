"""The real CPU kernel with a search space of a few configs, so that tuning a tiny layer takes a moment."""

from __future__ import annotations

from collections.abc import Iterator

from tilecast.environment import Environment
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig


class SmallGemm(MoeGemm):
    """`llvm.moe_gemm` with two configs per layout besides the default."""

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        for layout in ("panel16", "panel32"):
            base = self.default(gemm, 1, environment).with_params(layout=layout)
            yield base
            yield base.with_params(block_n=256)


def small_registry() -> Registry:
    return Registry((SmallGemm(),))
