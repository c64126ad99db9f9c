"""What the generated expert kernels share: an intermediate in slot order, bits that do not depend on the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilecast.kernels.spec import GemmWeights
from tilecast.problem import ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.cpu.launch import Plan
    from tilecast.kernels.routing import ExpertLayout


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a launch reads and writes: `rows` rows of `source`; `scale`, the routing weights, for down alone."""

    source: torch.Tensor
    rows: int
    out: torch.Tensor
    scale: torch.Tensor | None = None


class SlotKernel:
    """A kernel whose row s of the intermediate belongs to slot s, and whose sums never involve another row."""

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        """Return True: a row's sums never involve another row, and their order does not depend on the batch."""
        return True

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return the name of the weight layout that `config` reads."""
        return str(config["layout"])

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return `slot`: row s of the intermediate belongs to slot s."""
        return "slot"

    def plan(self, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
        """Return what launches into `out_dtype` share, made once and kept with the weights. Raises as a launch does."""
        raise NotImplementedError

    def prepare(self, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> None:
        """Load what launches into `out_dtype` need, compiled if need be. Raises as a launch does."""
        self.plan(config, weights, out_dtype)

    def launch(self, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
        """Run one of the two GEMMs on a routing with at least one token."""
        raise NotImplementedError

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        """Run the up GEMM: hidden [T, H] to out [T·k, I] in slot order, activation applied, one rounding."""
        if route.tokens:
            self.launch(config, weights, route, Rows(source=hidden, rows=route.tokens, out=out))

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run the down GEMM and the ordered combine: intermediate [T·k, I] to out [T, H]."""
        if route.tokens:
            rows = route.tokens * route.top_k
            self.launch(config, weights, route, Rows(source=intermediate, rows=rows, out=out, scale=topk_weights))
