"""Classes that take all of K as one exact sum: K reversed shows nothing, so another class is their control."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.autotune.exact_kernel import LONGEST, ExactKernel
from tests.autotune.shared import HERE
from tests.torch_kernel import TorchKernel
from tilecast.autotune import certify as certifier
from tilecast.autotune import classes
from tilecast.autotune.certificate import Certificate, ClassResult, Foreign
from tilecast.autotune.certify import certify
from tilecast.autotune.classes import ClassVerifier, wide_operands
from tilecast.autotune.controls import foreign_config, sums_exactly
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.slots import Rows
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import FP8_ROWS, GemmWeights, Registry
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig

LAYER = ExpertLayer(hidden=64, intermediate=64, experts=2, top_k=2, dtype="bf16", weight_format="int8_channel")
BUCKET = Bucket(above=4, tokens=20)
FEW = 24
NAMES = ("up", "down")


def gemm_of(name: str, **fields: object) -> ExpertGemm:
    layer = replace(LAYER, **fields)  # type: ignore[arg-type]  # each case gives fields of a layer
    return layer.up if name == "up" else layer.down


def run(kernel: TorchKernel, *configs: TileConfig, gemm: ExpertGemm = LAYER.up) -> ClassResult:
    (result,) = certify(gemm, configs, HERE, Registry((kernel,)), inputs=FEW).classes
    return result


def control(kernel: TorchKernel, config: TileConfig, gemm: ExpertGemm = LAYER.up) -> str | None:
    return ClassVerifier(HERE, Registry((kernel,))).control(gemm, config)


@pytest.mark.parametrize(("form", "dtype"), [("int8_channel", "bf16"), ("int4_g64", "fp16")])
@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_exact_sums_is_proven_by_another_class(name: str, dtype: str, form: str) -> None:
    kernel, gemm = ExactKernel(), gemm_of(name, dtype=dtype, weight_format=form)
    members = [kernel.config(row_block=16), kernel.config(row_block=64, layout="transposed")]
    result = run(kernel, *members, gemm=gemm)
    assert (result.verdict, result.reason, result.control) == ("equal", None, 0)
    assert result.foreign is not None and result.foreign.config is not None
    assert result.foreign.config["chunk_k"] == 64 and 2 * result.foreign.different > FEW
    assert (
        not result.certified and replace(result, inputs=1000, foreign=replace(result.foreign, different=900)).certified
    )
    for config in members:
        assert control(kernel, config, gemm) is None


@pytest.mark.parametrize("variant", ["misclassed", "batch_order"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_rounded_otherwise_in_a_batch_are_caught(name: str, variant: str) -> None:
    """As floats beside others, or against the largest element of a tile: what can go wrong where sums are exact."""
    kernel, gemm = ExactKernel(variant), gemm_of(name)
    liar = kernel.config(variant=variant)
    result = run(kernel, kernel.config(), liar, gemm=gemm)
    honest, caught = result.members
    assert result.verdict == "different" and f"variant={variant} differs on" in str(result.reason)
    assert honest.different == 0 and caught.different > FEW / 2
    for seed in range(3):
        verifier = ClassVerifier(HERE, Registry((kernel,)), seed=seed)
        assert "differs from the same row alone" in str(verifier.verify(gemm, liar, BUCKET))
    assert verifier.verify(gemm, kernel.config(), BUCKET) is None


@pytest.mark.parametrize("name", NAMES)
def test_where_inputs_hide_what_is_rounded_the_control_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows of few bits nothing is rounded: a class that is broken passes, and its control must not."""

    def narrow(*given: object) -> classes._Operands:
        made = wide_operands(*given)  # type: ignore[arg-type]  # passed on as given
        codes = torch.ones_like(made.weights.data.codes)
        plain = QuantizedStack(format="int8_channel", codes=codes, scales=torch.ones_like(made.weights.data.scales))
        return replace(made, rows=made.rows.sign(), weights=replace(made.weights, data=plain))

    def narrow_alone(gemm: ExpertGemm, seed: int, device: torch.device) -> classes._Operands:
        return narrow(gemm, seed, None, device)

    monkeypatch.setattr(certifier, "wide_operands", narrow)
    monkeypatch.setattr(classes, "wide_operands", narrow_alone)
    kernel, gemm = ExactKernel("batch_order"), gemm_of(name)
    liar = kernel.config(variant="batch_order")
    result = run(kernel, kernel.config(), liar, gemm=gemm)
    assert result.members[1].different == 0
    assert result.verdict == "control failed"
    assert f"of another class had other bits on only 0 of {FEW} inputs, so equal bits" in str(result.reason)
    assert ClassVerifier(HERE, Registry((kernel,))).verify(gemm, liar, BUCKET) is None
    assert "of another class only 0 of" in str(control(kernel, kernel.config(), gemm))


def test_without_another_class_nothing_is_proven() -> None:
    kernel = ExactKernel(chunks=(0,))
    result = run(kernel, kernel.config())
    assert (result.verdict, result.foreign) == ("control failed", Foreign(config=None, different=0))
    assert "torch.moe_gemm has no other class to tell it from, so equal bits prove nothing" in str(result.reason)
    assert not replace(result, inputs=1000).certified
    assert str(control(kernel, kernel.config())).endswith("torch.moe_gemm has no other class to tell it from")


def test_a_false_claim_of_exact_sums_is_told() -> None:
    """It excuses nothing: bits that depend on the order of K show, whatever another class has."""
    kernel = ExactKernel(floats=True)
    result = run(kernel, kernel.config())
    assert result.verdict == "control failed" and result.control > 0
    assert f"claims exact sums, but with K reversed {result.control} of {FEW} inputs" in str(result.reason)
    assert "claims exact sums, but with K reversed" in str(control(kernel, kernel.config()))


def test_a_class_that_claims_nothing_is_not_proven_by_another_class() -> None:
    class Silent(ExactKernel):
        def numerics(self, gemm, config, environment):
            return TorchKernel.numerics(self, gemm, config, environment)

    kernel = Silent()
    result = run(kernel, kernel.config())
    assert (result.verdict, result.control, result.foreign) == ("control failed", 0, None)
    assert "with K reversed only 0 of" in str(result.reason)
    assert "with K reversed only 0 of" in str(control(kernel, kernel.config()))


def test_sums_over_several_groups_have_the_usual_control() -> None:
    kernel, long = ExactKernel(), replace(LAYER, hidden=2 * LONGEST).up
    assert sums_exactly(kernel.numerics(LAYER.up, kernel.config(), HERE), LAYER.up)
    assert not sums_exactly(kernel.numerics(long, kernel.config(), HERE), long)
    assert not sums_exactly(kernel.numerics(LAYER.up, kernel.config(chunk_k=64), HERE), LAYER.up)
    assert not sums_exactly({"flush_k": 256, "group_sums": "rounded"}, LAYER.up)
    assert not sums_exactly({"group_sums": "exact, rows as 16 bits"}, LAYER.up)
    result = run(kernel, kernel.config(chunk_k=64))
    assert (result.verdict, result.foreign) == ("equal", None) and 2 * result.control > FEW


def test_a_control_that_raises_is_told() -> None:
    class Raises(ExactKernel):
        def _product(self, config, rows, weights, expert):
            if config["chunk_k"]:
                raise RuntimeError("no floats today")
            return super()._product(config, rows, weights, expert)

    kernel = Raises()
    result = run(kernel, kernel.config())
    assert (result.verdict, result.reason) == (
        "control failed", "the control raised RuntimeError: no floats today"
    )  # fmt: skip
    assert control(kernel, kernel.config()) == "RuntimeError: no floats today"


def test_the_other_class_has_the_same_layout_if_it_can_and_rows_of_the_same_type() -> None:
    class Choosy(ExactKernel):
        """Classes of floats come in both layouts here, plain ones later; those of blocks round rows to eight bits."""

        def space(self, gemm, tokens, environment):
            yield self.config(chunk_k=64, row_block=64)
            yield self.config(chunk_k=64, layout="transposed")
            yield self.config(chunk_k=64)

        def invalid(self, gemm, config, environment):
            return None

        def numerics(self, gemm, config, environment):
            found = super().numerics(gemm, config, environment)
            return {**found, "activations": FP8_ROWS} if config["row_block"] == 64 else found

    kernel = Choosy()
    known = Registry((kernel,))
    assert foreign_config(LAYER.up, kernel.config(), HERE, known) == kernel.config(chunk_k=64)
    turned = kernel.config(chunk_k=64, layout="transposed")
    assert foreign_config(LAYER.up, kernel.config(layout="transposed"), HERE, known) == turned
    kernel.batch_invariant = lambda gemm, config: False  # type: ignore[method-assign]  # claims otherwise
    assert foreign_config(LAYER.up, kernel.config(), HERE, known) is None


def test_only_such_classes_say_so_in_json() -> None:
    kernel = ExactKernel()
    certificate = certify(LAYER.up, [kernel.config(), kernel.config(chunk_k=64)], HERE, Registry((kernel,)), inputs=4)
    document = json.loads(json.dumps(certificate.to_json()))
    assert [sorted(entry["foreign"]) if "foreign" in entry else None for entry in document["classes"]] == [
        ["config", "different"], None
    ]  # fmt: skip
    assert Certificate.from_json(document) == certificate
    alone = run(ExactKernel(chunks=(0,)), kernel.config())
    assert ClassResult.from_json(json.loads(json.dumps(alone.to_json()))) == alone


class Mixed(MoeGemm):
    """Multiplies floats, as its other class does, where a launch has more than a tile's rows."""

    def launch(self, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
        if route.tokens > 16:
            config = self.default(weights.gemm, 1, cpu_environment(), like=config.with_params(dot="fma"))
        super().launch(config, weights, route, operands)


@pytest.mark.skipif(not host_isa().byte_pairs, reason="this CPU has no integer products of 16 bits")
@pytest.mark.parametrize("form", ["int8_channel", "awq_g64"])
def test_the_generators_integer_sums_are_proven_and_floats_among_them_caught(form: str) -> None:
    here, gemm, sound, mixed = cpu_environment(), gemm_of("down", weight_format=form), MoeGemm(), Mixed()
    config = sound.default(gemm, 1, here)
    assert config["dot"] == "int16"
    for kernel, verdict in ((sound, "equal"), (mixed, "different")):
        known = Registry((kernel,))
        (result,) = certify(gemm, [config], here, known, inputs=FEW).classes
        assert result.verdict == verdict, result.reason
        verifier = ClassVerifier(here, known)
        assert (verifier.verify(gemm, config, BUCKET) is None) == (kernel is sound)
        assert verifier.control(gemm, config) is None


@pytest.mark.parametrize("form", ["int8_channel", "int4_g64", "awq_g128"])
def test_rows_differ_in_magnitude_only_where_all_of_k_may_be_exact(form: str) -> None:
    for hidden, loud in ((128 if form == "awq_g128" else 64, True), (512, False)):
        gemm = replace(LAYER, hidden=hidden, weight_format=form).up
        rows = wide_operands(gemm, 0, tokens=64).rows.float()
        exponents = torch.frexp(rows.abs().amax(-1)).exponent
        assert len(exponents.unique()) >= 4 if loud else len(exponents.unique()) <= 2
