"""A small real kernel on plain torch, for tests of everything that works with kernels.

It sums products one by one with elementwise operations, so that a row's bits depend on nothing but the row and
`chunk_k`. Variants of it are wrong, or lie, each in its own way.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import product

import torch

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.reference import activate
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

VARIANTS = {
    "ordered": "right, and batch-invariant",
    "matmul": "right, by torch.matmul, whose bits may depend on the batch: claims no invariance",
    "misclassed": "right, but summed in chunks of 16 whatever `chunk_k` says and the class claims",
    "batch_order": "right, claims invariance, but sums in another order where an expert has several rows",
    "zeros": "fast and wrong",
    "off_by_one": "leaves the last product out",
    "unwritten": "leaves the last row as it was",
    "overwrites": "writes the rows of absent slots",
    "raises": "raises RuntimeError",
    "no_memory": "raises MemoryError",
    "no_compiler": "raises as a compiler would",
    "hangs": "never returns",
    "crashes": "takes its process along",
}


class TorchKernel:
    """`torch.moe_gemm`: row_block rows of an expert at a time, K in chunks of chunk_k (0: one chain)."""

    device_kind = "cpu"

    def __init__(self, *variants: str, name: str = "torch.moe_gemm", rejection: str | None = None) -> None:
        """Offer the sound variant, and `variants` besides it."""
        self.name = name
        self.variants = ("ordered", *variants)
        self.rejection = rejection
        self.launches = 0
        self.domain: dict[str, tuple[ParamValue, ...] | range] = {
            "row_block": (0, 16, 64),
            "chunk_k": (0, 64),
            "layout": (PLAIN, "transposed"),
            "variant": tuple(VARIANTS),
        }

    def config(self, **params: ParamValue) -> TileConfig:
        return TileConfig(self.name, {"row_block": 0, "chunk_k": 0, "layout": PLAIN, "variant": "ordered", **params})

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        return self.rejection

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        for row_block, chunk_k, layout in product((0, 16, 64), (0, 64), (PLAIN, "transposed")):
            yield self.config(row_block=row_block, chunk_k=chunk_k, layout=layout)
            yield self.config(row_block=min(row_block, 16), chunk_k=chunk_k, layout=layout)
        for variant in self.variants[1:]:
            yield self.config(variant=variant)

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        if config.integer("chunk_k") and config["layout"] == "transposed":
            return "chunks of K need the plain layout"
        return None

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        config = self.config(row_block=16 if tokens >= 16 else 0)
        if like is None:
            return config
        variant = "matmul" if like["variant"] == "matmul" else "ordered"
        return config.with_params(chunk_k=like["chunk_k"], layout=like["layout"], variant=variant)

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        return {"kernel": self.name, "chunk_k": config["chunk_k"], "matmul": config["variant"] == "matmul"}

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        return config["variant"] != "matmul"

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        return str(config["layout"])

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return `slot`: row s of the intermediate belongs to slot s."""
        return "slot"

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        assert weights.layout == PLAIN and layout == "transposed"
        data = weights.data
        # Of quantised weights the codes are stored otherwise, and dequantised a product at a time.
        data = _Turned(data) if isinstance(data, QuantizedStack) else data.transpose(1, 2).contiguous()
        return GemmWeights(gemm=weights.gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        data = weights.data
        if weights.layout != PLAIN:
            data = data.stack() if isinstance(data, _Turned) else data.transpose(1, 2).contiguous()
        return GemmWeights(gemm=weights.gemm, layout=PLAIN, data=data, bias=weights.bias)

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        layer = weights.gemm.layer
        for expert, slots in self._blocks(config, route, out):
            sums = self._product(config, hidden[slots // route.top_k], weights, expert)
            gate = sums[:, : layer.intermediate]
            other = sums[:, layer.intermediate :] if layer.gated else None
            out[slots] = activate(gate, other, layer.activation).to(out.dtype)

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        parts = torch.zeros(route.tokens * route.top_k, weights.gemm.n, device=out.device)
        scale = topk_weights.flatten()
        for expert, slots in self._blocks(config, route, out):
            parts[slots] = self._product(config, intermediate[slots], weights, expert) * scale[slots, None]
        by_position = parts.view(route.tokens, route.top_k, -1)
        total = by_position[:, 0].clone()
        for position in range(1, route.top_k):
            total += by_position[:, position]
        written = route.tokens - (config["variant"] == "unwritten")
        out[:written] = total[:written].to(out.dtype)

    def _blocks(self, config: TileConfig, route: ExpertLayout, out: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        self.launches += 1
        variant = config["variant"]
        if variant == "raises":
            raise RuntimeError("the planted\nfailure")
        if variant == "no_memory":
            raise MemoryError("no room")
        if variant == "no_compiler":
            raise RuntimeError("LLVM IR parsing error")
        if variant == "hangs":
            time.sleep(600)
        if variant == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if variant == "overwrites":
            out[:] = 0
        offsets = route.offsets.tolist()
        last = offsets[-1] - (variant == "unwritten")
        for expert in range(route.experts):
            step = config.integer("row_block") or max(1, offsets[-1])
            for start in range(offsets[expert], min(offsets[expert + 1], last), step):
                yield expert, route.slots[start : min(start + step, offsets[expert + 1], last)].long()

    def _product(self, config: TileConfig, rows: torch.Tensor, weights: GemmWeights, expert: int) -> torch.Tensor:
        weight = _dense(weights, expert)
        rows = rows.float()
        chunk = config.integer("chunk_k")
        match config["variant"]:
            case "zeros":
                return torch.zeros(rows.shape[0], weight.shape[1], device=rows.device)
            case "matmul":
                total = rows @ weight
            case "off_by_one":
                total = _chained(rows[:, :-1], weight[:-1], chunk)
            case "misclassed":
                total = _chained(rows, weight, 16)
            case "batch_order":
                total = _chained(rows, weight, 16 if rows.shape[0] > 1 else chunk)
            case _:
                total = _chained(rows, weight, chunk)
        return total if weights.bias is None else total + weights.bias[expert].float()


class _Turned:
    """Quantised weights whose codes are stored as [E, K, N]."""

    def __init__(self, stack: QuantizedStack) -> None:
        self.codes = stack.codes.transpose(1, 2).contiguous()
        self.format, self.scales, self.zeros = stack.format, stack.scales, stack.zeros

    def stack(self) -> QuantizedStack:
        codes = self.codes.transpose(1, 2).contiguous()
        return QuantizedStack(format=self.format, codes=codes, scales=self.scales, zeros=self.zeros)


def _dense(weights: GemmWeights, expert: int) -> torch.Tensor:
    """Return one expert's weights [K, N] in float32."""
    data = weights.data
    if isinstance(data, _Turned | QuantizedStack):
        stack = data if isinstance(data, QuantizedStack) else data.stack()
        return stack.dequantized(weights.gemm, expert, torch.float32).T
    return data[expert].float().T if weights.layout == PLAIN else data[expert].float()


class SortedTorchKernel(TorchKernel):
    """`sorted.moe_gemm`: the same sums; its parameter `order` says which intermediate up writes and down reads."""

    def __init__(self, *variants: str, default_order: str = "slot") -> None:
        super().__init__(*variants, name="sorted.moe_gemm")
        self.domain["order"] = ("slot", "sorted")
        self.default_order = default_order

    def config(self, **params: ParamValue) -> TileConfig:
        return super().config(**{"order": "slot", **params})

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        for config in super().space(gemm, tokens, environment):
            yield config
            yield config.with_params(order="sorted")

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        return super().default(gemm, tokens, environment, like).with_params(order=self.default_order)

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        return str(config["order"])

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        if config["order"] == "slot":
            return super().up(config, hidden, weights, route, out)
        by_slot = torch.empty_like(out)
        super().up(config, hidden, weights, route, by_slot)
        slots = self._present(route)
        out[: len(slots)] = by_slot[slots]
        return None

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        by_slot = intermediate
        if config["order"] == "sorted":
            slots = self._present(route)
            by_slot = torch.empty_like(intermediate)
            by_slot[slots] = intermediate[: len(slots)]
        super().down(config, by_slot, weights, route, topk_weights, out)

    @staticmethod
    def _present(route: ExpertLayout) -> torch.Tensor:
        return route.slots[: int(route.offsets[-1])].long()


def _chained(rows: torch.Tensor, weight: torch.Tensor, chunk: int) -> torch.Tensor:
    """Sum products in ascending K: within chunks of `chunk` first, then the chunks' sums (0: one chunk)."""
    k = rows.shape[1]
    total = torch.zeros(rows.shape[0], weight.shape[1], device=rows.device)
    for start in range(0, k, chunk or k):
        part = torch.zeros_like(total)
        for index in range(start, min(start + (chunk or k), k)):
            # Two operations: fused into one, the last elements of a vector could round otherwise than the rest.
            part = part + rows[:, index : index + 1] * weight[index]
        total = total + part
    return total
