"""Kernels that offer only what goes with a layer's decisions: its weights' layout, its numerics class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tilecast.canonical import Json
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel, Registry, numerics_class, stack_bytes
from tilecast.problem import ExpertGemm, ExpertLayer, GemmName, ParamValue, TileConfig


def anchored_registry(runtime: Runtime, layer: ExpertLayer) -> Registry:
    """Return a registry of kernels that offer only what goes with `layer`'s decisions."""
    anchor = runtime.anchor(layer)
    anchors: dict[GemmName, tuple[Kernel, TileConfig]] = {
        "up": (anchor.up_kernel, anchor.up), "down": (anchor.down_kernel, anchor.down),
    }  # fmt: skip
    return _AnchoredRegistry(tuple(_Anchored(kernel, anchors, runtime.policy) for kernel in runtime.registry), anchors)


class _AnchoredRegistry(Registry):
    """A registry whose defaults are of the anchors' kernels, which may be another for `up` than for `down`."""

    def __init__(self, kernels: tuple[Kernel, ...], anchors: Mapping[GemmName, tuple[Kernel, TileConfig]]) -> None:
        super().__init__(kernels)
        self._anchors = anchors

    def default_kernel(self, gemm: ExpertGemm, environment: Environment) -> Kernel:
        return self[self._anchors[gemm.name][0].name]


class _Anchored:
    """A kernel restricted to configs with the layout, and under `reproducible` the class, of given ones."""

    def __init__(self, kernel: Kernel, anchors: Mapping[GemmName, tuple[Kernel, TileConfig]], policy: str) -> None:
        self.name = kernel.name
        self.device_kind = kernel.device_kind
        self.domain: dict[str, tuple[ParamValue, ...] | range] = kernel.domain
        self._kernel = kernel
        self._anchors = anchors
        self._policy = policy

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        kernel, anchor = self._anchors[gemm.name]
        # Other layouts than the plain one mean something within one kernel only; classes are told by `invalid`,
        # since kernels may share them.
        if self._kernel is not kernel and (layout := kernel.layout(gemm, anchor)) != PLAIN:
            return f"the layer's weights are stored as {layout} of {kernel.name}"
        return self._kernel.rejects(gemm, environment)

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        return self._kernel.space(gemm, tokens, environment)

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        kernel, anchor = self._anchors[gemm.name]
        layout = kernel.layout(gemm, anchor)
        if self._kernel.layout(gemm, config) != layout:
            return f"the layer's weights are stored as {layout}"
        if self._policy == "reproducible":
            wanted = numerics_class(kernel, gemm, anchor, environment)
            if numerics_class(self._kernel, gemm, config, environment) != wanted:
                return "the layer is decided for another numerics class"
        return self._kernel.invalid(gemm, config, environment)

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        kernel, anchor = self._anchors[gemm.name]
        return self._kernel.default(gemm, tokens, environment, like or (anchor if kernel is self._kernel else None))

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        return self._kernel.numerics(gemm, config, environment)

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        return self._kernel.batch_invariant(gemm, config)

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        return self._kernel.layout(gemm, config)

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Pass on."""
        return self._kernel.order(gemm, config)

    def stack_bytes(self, gemm: ExpertGemm, layout: str) -> int:
        return stack_bytes(self._kernel, gemm, layout)

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        return self._kernel.pack(weights, layout)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        return self._kernel.unpack(weights)

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        self._kernel.up(config, hidden, weights, route, out)

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._kernel.down(config, intermediate, weights, route, topk_weights, out)
