"""Tables and operands that the engine's tests share, made with the real kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tilecast.environment import Environment, cpu_environment
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, buckets

LAYER = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2, dtype="fp32")

Chooser = Callable[[ExpertGemm, int], TileConfig]


def default_config(gemm: ExpertGemm, tokens: int) -> TileConfig:
    here = cpu_environment()
    return registry.default_kernel(gemm, here).default(gemm, tokens, here)


def decided(
    *layers: ExpertLayer,
    tokens: tuple[int, ...] = (1, 4, 16),
    environment: Environment | None = None,
    policy: str = "reproducible",
    choose: Chooser = default_config,
) -> TuningTable:
    """Return a table that decides `choose`'s configs for the layers and buckets."""
    here = environment or cpu_environment()

    def choice(gemm: ExpertGemm, count: int) -> Choice:
        return Choice(config=choose(gemm, count), p50_us=10.0, default=default_config(gemm, count), default_us=12.0)

    decisions = tuple(
        Decision(
            environment=here.digest,
            layer=layer,
            bucket=bucket,
            policy=policy,
            up=choice(layer.up, bucket.tokens),
            down=choice(layer.down, bucket.tokens),
        )
        for layer in layers
        for bucket in buckets(tokens)
    )
    return TuningTable((here,), decisions)


class Weights(NamedTuple):
    """Plain weights of a layer."""

    w13: torch.Tensor
    w2: torch.Tensor
    bias13: torch.Tensor | None
    bias2: torch.Tensor | None


def weights(layer: ExpertLayer, seed: int = 0) -> Weights:
    """Return seeded weights."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(TORCH_DTYPES[layer.dtype])

    up, down = layer.up, layer.down
    return Weights(
        normal(layer.experts, up.n, up.k),
        normal(layer.experts, down.n, down.k),
        normal(layer.experts, up.n) if layer.bias else None,
        normal(layer.experts, down.n) if layer.bias else None,
    )


def inputs(layer: ExpertLayer, tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden [T, H], ids [T, k] and weights [T, k]."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.hidden, generator=draw).to(TORCH_DTYPES[layer.dtype])
    scores = torch.rand(tokens, layer.global_experts, generator=draw)
    top = scores.sort(dim=-1, descending=True, stable=True)
    return hidden, top.indices[:, : layer.top_k].to(torch.int32).contiguous(), top.values[:, : layer.top_k].contiguous()
