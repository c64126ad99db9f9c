"""Quantised layers in the tuner: their operands, the gate's oracle, the class check and certificates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE
from tests.torch_kernel import TorchKernel
from tilecast.autotune.certify import certify
from tilecast.autotune.classes import ClassVerifier, wide_operands
from tilecast.autotune.gate import Gate
from tilecast.autotune.stacks import half_of, quantized_stack
from tilecast.autotune.workload import Workload, weight_stack
from tilecast.canonical import Json
from tilecast.engine.bench import make_weights
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.reference import rounded_rows
from tilecast.kernels.spec import FP8_ROWS, PLAIN, GemmWeights, Registry
from tilecast.kernels.stacks import backward, reversal
from tilecast.problem import WEIGHT_FORMATS, Bucket, ExpertGemm, ExpertLayer, TileConfig, weight_format

FORMATS = [form for form in WEIGHT_FORMATS if form != "dense"]
SOME = ["awq_g32", "int4_g64", "int8_channel", "fp8_block128", "fp8_tensor"]
LAYER = ExpertLayer(hidden=128, intermediate=192, experts=3, top_k=2, dtype="bf16", weight_format="awq_g32")


def gemms(form: str) -> tuple[ExpertGemm, ExpertGemm]:
    """Return both GEMMs of a layer whose sizes are whole groups, or not quite, where blocks may end early."""
    return replace(LAYER, weight_format=form, intermediate=256 if form.endswith("_g128") else 192).gemms


@pytest.mark.parametrize("form", FORMATS)
def test_random_stacks_are_normal_in_every_expert_and_no_two_rows_alike(form: str) -> None:
    for gemm in gemms(form):
        stack = quantized_stack(gemm, gemm.k**-0.5, 3)
        stack.check(gemm)
        assert stack.nbytes == gemm.weight_bytes()
        dense = torch.stack([stack.dequantized(gemm, expert, torch.float32) for expert in range(3)])
        assert dense.std(dim=(1, 2)).mul(gemm.k**0.5) == pytest.approx([1, 1, 1], rel=0.1)
        assert dense.abs().amax(2).min() > 0
        assert not torch.equal(dense[0], dense[1]) and not torch.equal(dense[1], dense[2])
        again = quantized_stack(gemm, gemm.k**-0.5, 3)
        other = quantized_stack(gemm, gemm.k**-0.5, 4)
        same = [torch.equal(stack.codes.view(torch.uint8), x.codes.view(torch.uint8)) for x in (again, other)]
        assert same == [True, False]


@pytest.mark.parametrize("form", ["awq_g32", "fp8_block128", "fp8_tensor"])
def test_stretches_of_the_pool_bring_their_scales(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.stacks.POOL_ELEMENTS", 256 * 128)
    gemm = replace(LAYER, weight_format=form, intermediate=320).up
    stack = quantized_stack(gemm, 1.0, 1)
    dense = torch.stack([stack.dequantized(gemm, expert, torch.float32) for expert in range(3)])
    assert dense.std(2).min() > 0.7 and dense.std(2).max() < 1.3
    assert not torch.equal(dense[0], dense[1]) and not torch.equal(dense[1], dense[2])
    if form == "awq_g32":
        # A row with scales or zero points of another one would be no row of the pool.
        assert len(torch.unique(dense.flatten(0, 1), dim=0)) <= 256


def test_sizes_that_cut_a_group_are_refused() -> None:
    with pytest.raises(InputError, match="hidden size H is 100, which cuts a group of 32"):
        weight_stack(replace(LAYER, hidden=100).up, 0)


def test_layers_are_timed_in_their_format() -> None:
    weights = make_weights(replace(LAYER, bias=True))
    assert isinstance(weights.w13, QuantizedStack) and weights.bias2 is not None
    assert weights.w2.shape == (3, 128, 192)


@pytest.mark.parametrize("form", SOME)
def test_sound_configs_pass_the_gate(form: str) -> None:
    kernel, gate = TorchKernel(), Gate(Workload(HERE))
    for gemm in gemms(form):
        for config in (kernel.config(), kernel.config(layout="transposed")):
            verdict = gate.check(gemm, 5, config, kernel)
            assert (verdict.status, verdict.detail) == ("ok", "")


class WrongScales(TorchKernel):
    """Takes the next row's scales."""

    def _product(self, config: TileConfig, rows: torch.Tensor, weights: GemmWeights, expert: int) -> torch.Tensor:
        shifted = replace(weights.data, scales=weights.data.scales.roll(1, 1))
        return super()._product(config, rows, replace(weights, data=shifted), expert)


class RoundsRows(TorchKernel):
    """Rounds rows to fp8 before it multiplies them, and says so if it is honest."""

    def __init__(self, *, honest: bool) -> None:
        super().__init__()
        self.honest = honest

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        found = super().numerics(gemm, config, environment)
        return {**found, "activations": FP8_ROWS} if self.honest else found

    def _product(self, config: TileConfig, rows: torch.Tensor, weights: GemmWeights, expert: int) -> torch.Tensor:
        return super()._product(config, rounded_rows(rows, FP8_ROWS).float(), weights, expert)


def test_scales_of_another_row_are_caught() -> None:
    kernel = WrongScales()
    verdict = Gate(Workload(HERE)).check(LAYER.up, 5, kernel.config(), kernel)
    assert verdict.status == "wrong_result" and "times that of torch" in verdict.detail


def test_rows_may_be_rounded_by_those_who_say_so() -> None:
    gate, (gemm, _) = Gate(Workload(HERE)), gemms("fp8_block128")
    honest, liar = RoundsRows(honest=True), RoundsRows(honest=False)
    assert gate.check(gemm, 5, honest.config(), honest).status == "ok"
    assert gate.check(gemm, 5, liar.config(), liar).status == "wrong_result"
    plain = TorchKernel()
    assert gate.check(gemm, 5, plain.config(), plain).status == "ok"


@pytest.mark.parametrize("form", FORMATS)
def test_operands_of_the_class_check_cancel_and_turn_around(form: str) -> None:
    for gemm in gemms(form):
        made = wide_operands(gemm, 0, tokens=4)
        stack, half = made.weights.data, half_of(gemm)
        assert isinstance(stack, QuantizedStack)
        stack.check(made.gemm)
        dense = stack.dequantized(made.gemm, 0)
        assert torch.equal(dense[:, :half], dense[:, half : 2 * half]) and torch.isfinite(dense).all()
        products = made.rows[0, 0].double() * dense
        # What is left of the sum is far smaller than what went into it.
        assert products.sum(1).abs().median() < 0.05 * products.abs().sum(1).median()
        turned = backward(stack, made.gemm)
        assert isinstance(turned, QuantizedStack)
        assert torch.equal(turned.dequantized(made.gemm, 1), stack.dequantized(made.gemm, 1)[:, reversal(made.gemm)])


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_class_check_tells_orders_of_summation_apart(form: str, dtype: str) -> None:
    kernel = TorchKernel("batch_order")
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    gemm = gemms(form)[0]
    gemm = replace(gemm, layer=replace(gemm.layer, dtype=dtype))
    bucket = Bucket(above=2, tokens=8)
    assert verifier.verify(gemm, kernel.config(row_block=16), bucket) is None
    assert verifier.control(gemm, kernel.config()) is None
    assert "differs from the same row alone" in str(verifier.verify(gemm, kernel.config(variant="batch_order"), bucket))


@pytest.mark.parametrize("form", ["awq_g64", "fp8_block128"])
def test_certificates_of_quantised_layers(form: str) -> None:
    kernel, (gemm, _) = TorchKernel("misclassed"), gemms(form)
    members = [kernel.config(row_block=16), kernel.config(row_block=64, layout="transposed")]
    (result,) = certify(gemm, members, HERE, Registry((kernel,)), inputs=12).classes
    assert result.verdict == "equal" and result.reason is None
    (result,) = certify(
        gemm, [*members, kernel.config(variant="misclassed")], HERE, Registry((kernel,)), inputs=12
    ).classes
    assert result.verdict != "equal"


def test_plain_stacks_are_what_kernels_pack() -> None:
    workload, kernel = Workload(HERE), TorchKernel()
    packed = workload.weights(LAYER.down, kernel, "transposed")
    plain = workload.plain(LAYER.down)
    assert plain.layout == PLAIN and isinstance(plain.data, QuantizedStack)
    assert torch.equal(kernel.unpack(packed).data.codes, plain.data.codes)
    assert weight_format(plain.data.format).kind == "awq"
