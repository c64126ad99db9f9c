"""Numerics classes of the Triton kernels, in the model of the tensor core: which configs give equal bits, which not."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from tests.cases import Operands, run_down, run_up
from tests.kernels.gpu.test_experts import HERE, TILE, VARIANTS
from tests.tensor_core import tensor_core
from tilecast.autotune.classes import wide_operands
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.split_k import SplitK
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import numerics_class
from tilecast.problem import ExpertLayer, TileConfig

HOPPER, AMPERE = (parse_target(f"cuda:{arch}") for arch in (90, 80))
LAYER = ExpertLayer(hidden=320, intermediate=264, experts=2, top_k=2, activation="relu")
TOKENS = 5
GROUPED = Grouped()
SHAPES = [
    {},
    {"block_m": 32},
    {"block_n": 32},
    {"block_k": 16},
    {"block_k": 128},
    {"num_warps": 8, "num_stages": 5},
    {"block_m": 64, "block_n": 128, "block_k": 32, "group_m": 1},
]


def wide(dtype: str) -> Operands:
    """Operands on which any other order of summation shows, for both GEMMs."""
    layer = dataclasses.replace(LAYER, dtype=dtype)
    up, down = (wide_operands(gemm, 3, tokens=TOKENS) for gemm in layer.gemms)
    ids = up.ids[:TOKENS]
    return Operands(
        layer=layer,
        route=sort_slots(ids, layer.experts),
        topk_weights=up.topk_weights[:TOKENS],
        up=up.weights,
        down=down.weights,
        hidden=up.rows[:TOKENS].flatten(0, -2),
        intermediate=down.rows[:TOKENS].flatten(0, -2),
    )


def bits(kernel: TritonExperts, config: TileConfig, given: Operands, core: tuple[int, int]) -> list[torch.Tensor]:
    with tensor_core(*core):
        up = run_up(kernel, config, given)
        down = run_down(kernel, config, given, torch.float32)
    present = given.route.slots[: int(given.route.offsets[-1])].long().sort().values
    integers = torch.int32 if up.dtype == torch.float32 else torch.int16
    return [up[present].view(integers), down.view(torch.int32)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def core(target_name: str) -> tuple[int, int]:
    target = parse_target(target_name)
    return target.group, target.fraction_bits


def config_with(**changes: int) -> TileConfig:
    return TileConfig(Grouped.name, {**TILE, "swap": 0, **changes})


@cache
def hopper_bits(dtype: str = "bf16") -> list[torch.Tensor]:
    """What the plain kernel gives on Hopper for `wide(dtype)`."""
    return bits(GROUPED, config_with(), wide(dtype), core("cuda:90"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_is_one_class_over_blocks_stages_and_warps(dtype: str) -> None:
    given = wide(dtype)
    first = hopper_bits(dtype)
    classes = set()
    for changes in SHAPES:
        config = config_with(**changes)
        classes |= {numerics_class(GROUPED, gemm, config, HERE) for gemm in given.layer.gemms}
        assert equal(bits(GROUPED, config, given, core("cuda:90")), first), config.label
    assert len(classes) == 1


@pytest.mark.parametrize("variant", ["persistent", "tma", "tma persistent", "decode"])
def test_other_kernels_share_the_class(variant: str) -> None:
    given = wide("bf16")
    kernel, config = VARIANTS[variant]
    for gemm in given.layer.gemms:
        assert numerics_class(kernel, gemm, config, HERE) == numerics_class(GROUPED, gemm, config_with(), HERE)
    assert equal(bits(kernel, config, given, core("cuda:90")), hopper_bits())


def test_split_k_is_another_class() -> None:
    given = wide("bf16")
    kernel, config = SplitK(), TileConfig(SplitK.name, {**TILE, "chunk": 128})
    for gemm in given.layer.gemms:
        assert numerics_class(kernel, gemm, config, HERE) != numerics_class(GROUPED, gemm, config_with(), HERE)
    split = bits(kernel, config, given, core("cuda:90"))
    assert not equal(split, hopper_bits())
    narrow = config.with_params(block_k=32, block_n=32)
    assert equal(split, bits(kernel, narrow, given, core("cuda:90"))), "within its class only the stretch counts"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ampere_and_hopper_are_different_classes(dtype: str) -> None:
    given = wide(dtype)
    there = AMPERE.environment()
    for gemm in given.layer.gemms:
        assert numerics_class(GROUPED, gemm, config_with(), HERE) != numerics_class(GROUPED, gemm, config_with(), there)
    hopper, ampere = hopper_bits(dtype), bits(GROUPED, config_with(), given, core("cuda:80"))
    assert not any(torch.equal(a, b) for a, b in zip(hopper, ampere, strict=True))
    other = bits(GROUPED, config_with(block_k=128, block_n=32), given, core("cuda:80"))
    assert equal(ampere, other), "blocks are neutral there, too"


def test_swapped_operands_are_a_class_of_their_own_until_a_device_says_otherwise() -> None:
    given = wide("bf16")
    swapped = config_with(swap=1, block_m=8)
    for gemm in given.layer.gemms:
        claims = {numerics_class(GROUPED, gemm, config, HERE) for config in (config_with(), swapped)}
        assert len(claims) == 2
    # The model knows no difference: products commute.
    assert equal(bits(GROUPED, swapped, given, core("cuda:90")), hopper_bits())


def test_fp32_is_one_chain_of_fused_multiply_adds() -> None:
    given, first = wide("fp32"), hopper_bits("fp32")
    for changes in ({"block_k": 16}, {"block_n": 32, "block_m": 32}):
        assert equal(bits(GROUPED, config_with(**changes), given, core("cuda:90")), first)
    decode = TileConfig(Decode.name, dict(VARIANTS["decode"][1].params))
    assert equal(bits(Decode(), decode, given, core("cuda:90")), first)


def test_a_row_alone_has_the_bits_it_has_in_the_batch() -> None:
    given = wide("bf16")
    whole = hopper_bits()[1]
    k = given.layer.top_k
    for token in range(TOKENS):
        alone = dataclasses.replace(
            given,
            route=sort_slots(given.route.ids[token : token + 1], given.layer.experts),
            topk_weights=given.topk_weights[token : token + 1],
            hidden=given.hidden[token : token + 1],
            intermediate=given.intermediate[token * k : token * k + k],
        )
        kernel, config = VARIANTS["decode"]
        assert torch.equal(bits(kernel, config, alone, core("cuda:90"))[1][0], whole[token])
