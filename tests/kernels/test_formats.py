"""Weight formats: what codes stand for, which sizes they take, how near rounding comes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilecast.errors import InputError
from tilecast.kernels.formats import QuantizedStack, check_sizes, quantize, scale_rows
from tilecast.kernels.scales import scale_shape
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, weight_format

QUANTIZED = WEIGHT_FORMATS[1:]


def layer(form: str, **changes: object) -> ExpertLayer:
    sizes: dict[str, object] = {"hidden": 256, "intermediate": 128, "experts": 2, "top_k": 1, "dtype": "fp16"}
    return ExpertLayer(**{**sizes, "weight_format": form, **changes})  # type: ignore[arg-type]


def dense(gemm: ExpertGemm) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((gemm.layer.experts, gemm.n, gemm.k), generator=generator) / 8


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("name", ["up", "down"])
def test_rounding_to_a_format_errs_by_half_a_step_at_most(form: str, name: str) -> None:
    gemm = getattr(layer(form), name)
    weights = dense(gemm)
    stack = quantize(weights, gemm, torch.float32)
    stack.check(gemm)
    assert stack.nbytes <= 1.4 * gemm.weight_bytes()
    for expert in range(gemm.layer.experts):
        error = (stack.dequantized(gemm, expert) - weights[expert].double()).abs()
        step = stack.row_scales(gemm, expert, torch.float64)
        if weight_format(form).kind == "fp8":
            step = step * stack.integers(expert).abs().double().clamp(min=2**-6) / 8
        assert (error <= 0.501 * step + 1e-9).all()


@pytest.mark.parametrize("form", ["awq_g32", "int4_g64", "int8_channel", "fp8_block128", "fp8_channel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(form: str, bad: float) -> None:
    gemm = layer(form).down
    weights = dense(gemm)
    weights[1, 3, 5] = bad
    with pytest.raises(InputError, match="weights of expert 1 are not finite"):
        quantize(weights, gemm)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("least", [1e-7, 1e-12, 1e-30])
def test_tiny_weights_err_by_half_a_step_too(form: str, least: float) -> None:
    gemm = layer(form).down
    weights = dense(gemm) * least
    stack = quantize(weights, gemm, torch.float32)
    for expert in range(gemm.layer.experts):
        found = stack.dequantized(gemm, expert)
        error = (found - weights[expert].double()).norm() / weights[expert].double().norm()
        assert error < (0.04 if weight_format(form).bits == 8 else 0.2)


@pytest.mark.parametrize("form", ["awq_g32", "int4_g64", "int8_channel"])
def test_scales_of_float16_keep_whatever_float16_would(form: str) -> None:
    gemm = layer(form).down
    weights = dense(gemm) * 1e-5
    stack = quantize(weights, gemm)
    for expert in range(gemm.layer.experts):
        error = (stack.dequantized(gemm, expert) - weights[expert].double()).abs()
        # A scale of a few of float16's least numbers is rounded up, so that no code is cut off.
        assert (error <= 0.501 * stack.row_scales(gemm, expert, torch.float64)).all()
        assert (stack.row_scales(gemm, expert, torch.float64) <= 1e-6).all()


@pytest.mark.parametrize("form", QUANTIZED)
def test_weights_of_zero_stay_zero(form: str) -> None:
    gemm = layer(form).down
    stack = quantize(torch.zeros_like(dense(gemm)), gemm)
    assert not stack.dequantized(gemm, 0).any() and stack.scales.float().isfinite().all()


def test_scales_and_zero_points_that_cannot_be_are_refused() -> None:
    gemm = layer("awq_g32").down
    stack = quantize(dense(gemm), gemm)
    assert stack.zeros is not None
    stack.check_values()
    for name, bad, message in (
        ("scales", float("nan"), "scales of expert 1 hold nan"),
        ("scales", -0.5, r"scales of expert 1 hold -0\.5"),
        ("zeros", 16, "zero points of expert 1 hold 16, expected 0 to 15"),
    ):
        changed = {name: getattr(stack, name).clone()}
        changed[name][1, 3, 2] = bad
        with pytest.raises(InputError, match=message):
            replace(stack, **changed).check_values()


def test_weights_whose_scales_overflow_are_refused() -> None:
    gemm = layer("int4_g32").down
    weights = dense(gemm)
    weights[0, 0, 0] = 1e6
    with pytest.raises(InputError, match=r"expert 0 are not finite, or too large for scales of torch\.float16"):
        quantize(weights, gemm)
    assert torch.isfinite(quantize(weights, gemm, torch.float32).scales).all()


def test_a_nibble_is_where_it_is_said_to_be() -> None:
    gemm = layer("awq_g32", hidden=32, intermediate=32, gated=False, experts=1).up
    codes = torch.zeros((1, 32, 16), dtype=torch.uint8)
    codes[0, 3, 5] = 0x9C
    zeros = torch.full((1, 32, 1), 2, dtype=torch.uint8)
    stack = QuantizedStack(format="awq_g32", codes=codes, scales=torch.full((1, 32, 1), 0.5), zeros=zeros)
    row = stack.dequantized(gemm, 0)[3]
    assert row[10] == (0xC - 2) * 0.5 and row[11] == (0x9 - 2) * 0.5 and row[12] == -1.0


def test_gate_and_up_share_no_scale() -> None:
    gemm = layer("fp8_block128", intermediate=200).up
    assert scale_shape(gemm) == (4, 2)
    assert scale_rows(gemm).tolist() == [0] * 128 + [1] * 72 + [2] * 128 + [3] * 72
    assert scale_shape(layer("fp8_tensor").up) == (2, 1) and scale_shape(layer("fp8_tensor").down) == (1, 1)


def test_sizes_that_cut_a_group_are_refused_with_those_that_work() -> None:
    with pytest.raises(InputError, match=r"intermediate size I is 96.*multiples of 64, such as 64 or 128"):
        check_sizes(layer("awq_g64", intermediate=96).down)
    check_sizes(layer("fp8_block128", intermediate=96).down)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeros": None}, "needs zero points"),
        ({"codes": torch.zeros(2, 8, 16)}, "codes are torch.float32"),
        ({"scales": torch.ones(2, 256)}, "scales are"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "codes": torch.zeros((2, 256, 128), dtype=torch.uint8),
        "scales": torch.ones(2, 256, 2),
        "zeros": torch.zeros((2, 256, 2), dtype=torch.uint8),
    }
    QuantizedStack(format="awq_g128", **good).check(layer("awq_g128").up)
    with pytest.raises(InputError, match=message):
        QuantizedStack(format="awq_g128", **{**good, **change})


def test_weights_of_another_shape_or_format_are_refused() -> None:
    stack = quantize(dense(layer("int8_g64").up), layer("int8_g64").up)
    with pytest.raises(InputError, match="expected int4_g64"):
        stack.check(layer("int4_g64").up)
    with pytest.raises(InputError, match="expected int8_g64"):
        stack.check(layer("int8_g64").down)
