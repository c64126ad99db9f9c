"""Defaults of the Triton kernels: tiles an expert, programs for the SMs, and that every one of them is valid."""

from __future__ import annotations

from math import comb

import pytest

from tilecast.kernels import registry
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.split_k import MAX_ROWS, SplitK
from tilecast.kernels.gpu.target import TARGETS, Target, parse_target
from tilecast.kernels.gpu.tiles import default_tile
from tilecast.kernels.gpu.tma import Tma
from tilecast.kernels.spec import numerics_class
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

HOPPER = parse_target("cuda:90")
MIXTRAL = ExpertLayer(hidden=4096, intermediate=7168, experts=8, top_k=2)
QWEN3 = ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8)
TOKENS = (1, 3, 8, 24, 64, 200, 512, 4096)


def passes(gemm: ExpertGemm, tokens: int, block_m: int) -> float:
    """How often an expert that is routed to has its weights read, on average, with uniform routing."""
    layer = gemm.layer
    chance = layer.top_k / layer.experts
    likely = [comb(tokens, n) * chance**n * (1 - chance) ** (tokens - n) for n in range(tokens + 1)]
    return sum(p * -(-n // block_m) for n, p in enumerate(likely)) / (1 - likely[0])


@pytest.mark.parametrize(
    ("layer", "tokens"), [(MIXTRAL, 48), (MIXTRAL, 64), (MIXTRAL, 128), (QWEN3, 256), (QWEN3, 512)]
)
def test_weights_are_read_about_once_where_their_bytes_count(layer: ExpertLayer, tokens: int) -> None:
    for gemm in layer.gemms:
        tile = default_tile(gemm, tokens, HOPPER)
        assert passes(gemm, tokens, tile["block_m"]) < 1.1, tile


@pytest.mark.parametrize("layer", [MIXTRAL, QWEN3])
def test_one_token_occupies_nearly_every_unit(layer: ExpertLayer) -> None:
    for gemm in layer.gemms:
        config = Decode().default(gemm, 1, HOPPER.environment())
        groups = layer.top_k if gemm.name == "up" else 1
        programs = groups * -(-gemm.n // config.integer("block_n"))
        assert programs >= 0.95 * HOPPER.units, config


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_default_is_valid(target: Target, dtype: str) -> None:
    environment = target.environment()
    small = ExpertLayer(hidden=320, intermediate=264, experts=4, top_k=2, dtype=dtype)
    mixtral = ExpertLayer(hidden=4096, intermediate=7168, experts=8, top_k=2, dtype=dtype)
    for layer in (small, mixtral):
        for gemm in layer.gemms:
            for tokens in TOKENS:
                for kernel in (Grouped(), Decode()):
                    config = kernel.default(gemm, tokens, environment)
                    owner = kernel if config.kernel == kernel.name else Grouped()
                    assert owner.invalid(gemm, config, environment) is None, (gemm.name, tokens, config)


def test_split_k_keeps_to_the_rows_it_is_for() -> None:
    for gemm in MIXTRAL.gemms:
        assert SplitK().default(gemm, 4096, HOPPER.environment()).integer("block_m") <= MAX_ROWS


def test_split_k_cuts_a_short_k() -> None:
    environment = HOPPER.environment()
    for k in (260, 768, 1024, 1025):
        layer = ExpertLayer(hidden=k, intermediate=k, experts=16, top_k=2)
        for gemm in layer.gemms:
            config = SplitK().default(gemm, 8, environment)
            assert registry.invalid(gemm, config, environment) is None, config


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("layer", [MIXTRAL, QWEN3], ids=["Mixtral", "Qwen3"])
def test_a_default_has_the_class_it_is_to_be_like(target: Target, layer: ExpertLayer) -> None:
    """On sm_100 the instruction is part of the class: it must not change with the number of tokens."""
    environment, checked = target.environment(), 0
    for kernel in (Grouped(), Persistent(), Tma(), Decode(), SplitK()):
        for gemm in layer.gemms:
            if kernel.rejects(gemm, environment):
                continue
            for tokens in (2, 64, 4096):
                space = [c for c in kernel.space(gemm, tokens, environment) if not kernel.invalid(gemm, c, environment)]
                for like in one_a_class(gemm, space, target):
                    for other in TOKENS:
                        config = kernel.default(gemm, other, environment, like)
                        reason = registry.invalid(gemm, config, environment)
                        assert reason is None, (like.label, other, config.label, reason)
                        assert class_of(gemm, config, target) == class_of(gemm, like, target), (
                            like.label,
                            config.label,
                        )
                        checked += 1
    assert checked > 50


def class_of(gemm: ExpertGemm, config: TileConfig, target: Target) -> str:
    return numerics_class(registry[config.kernel], gemm, config, target.environment())


def one_a_class(gemm: ExpertGemm, configs: list[TileConfig], target: Target) -> list[TileConfig]:
    return list({class_of(gemm, config, target): config for config in configs}.values())
