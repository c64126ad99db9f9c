"""A kernel whose sums are exact, as those of integer codes with rows as integers are; variants of it lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.torch_kernel import TorchKernel, _dense
from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

BITS = 14
"""A row's largest element has so many bits below its first one; what lies below is rounded off."""
LONGEST = 256


class ExactKernel(TorchKernel):
    """Rounds each row to integers and sums exactly; `chunk_k` of 64 is another class, chains of floats.

    Two variants are right alone and other in a batch: `misclassed` takes floats where an expert has several rows,
    `batch_order` rounds them against the largest element of them all. With `floats` the claim of exact sums is false.
    """

    def __init__(self, *variants: str, chunks: tuple[int, ...] = (0, 64), floats: bool = False) -> None:
        """Offer the sound variant and `variants` besides it, in the classes that `chunks` names."""
        super().__init__(*variants)
        self.chunks = chunks
        self.floats = floats

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        return (c for c in super().space(gemm, tokens, environment) if c["chunk_k"] in self.chunks)

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        claim: dict[str, Json] = {"flush_k": LONGEST, "group_sums": "exact, rows as 16 bits"}
        return super().numerics(gemm, config, environment) | ({} if config["chunk_k"] else claim)

    def _product(self, config: TileConfig, rows: torch.Tensor, weights: GemmWeights, expert: int) -> torch.Tensor:
        variant, several = config["variant"], rows.shape[0] > 1
        if config["chunk_k"] or self.floats or (variant == "misclassed" and several):
            chain: ParamValue = "misclassed" if self.floats else "ordered"
            return super()._product(config.with_params(variant=chain), rows, weights, expert)
        top = rows.float().abs().amax(dim=None if variant == "batch_order" else 1, keepdim=True)
        last = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 1 - BITS)
        whole = (torch.round(rows.float() / last) * last).double()
        # 15 bits of a row, 8 of a code and 11 of a scale: float64 holds the sum of 2^9 such products.
        return (whole @ _dense(weights, expert).double()).float()
