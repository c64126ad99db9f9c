"""`compare` names the layer and the operation of faults that are planted, and finds none where there is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from tests.tiny_models import NAMED_FAMILIES, tiny_model
from tilecast.engine.compare_capture import alone, run
from tilecast.engine.compare_invariance import random_prompts
from tilecast.engine.compare_operations import operations
from tilecast.engine.compare_reference import Reference, ReferenceReport, compare_to, exact_experts, reference_of

# The number of threads decides about bits.
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = random_prompts(97, lengths=(9, 6, 7))


def model_of(family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    # Loaded checkpoints keep buffers in float32; a model that is cast as a whole is just as good here.
    model: Any = tiny_model(family, torch.float32)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def reference(family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Reference:
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    return reference_of(PROMPTS, model_of(family, dtype), lambda: model_of(family, dtype).to(wide))


@pytest.fixture(scope="module")
def mixtral() -> Reference:
    return reference()


def part(model: nn.Module, layer: int, kind: str) -> Any:
    return next(module for op, module in operations(model) if (op.layer, op.kind) == (layer, kind))


def faults(report: ReferenceReport) -> list[tuple[int | None, str]]:
    return [(one.operation.layer, one.operation.kind) for one in report.operations if one.verdict == "fault"]


def reroute(router: Any, *, narrow: bool = False, renormalise: bool = True) -> None:
    """Plant what gates got wrong elsewhere: logits in a narrow dtype, or no renormalisation."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        logits = logits.bfloat16().to(logits.dtype) if narrow else logits
        values, index = torch.topk(logits.float().softmax(-1), router.top_k, dim=-1)
        return logits, values / values.sum(-1, keepdim=True) if renormalise else values, index

    router.forward = forward


def test_a_model_against_itself_is_equal_everywhere(mixtral: Reference) -> None:
    report = compare_to(mixtral, model_of())
    assert report.first_difference is None
    assert {one.verdict for one in report.operations} == {"equal"}
    assert report.outcome is not None
    assert report.outcome.agreeing == report.outcome.tokens == PROMPTS.rows
    assert report.outcome.loss == report.outcome.reference_loss
    assert all(router.others == 0 for router in report.routers)
    assert [one.operation.kind for one in report.operations[:9]] == [
        "embedding", "norm", "attention", "norm", "router", "experts", "moe", "block", "norm",
    ]  # fmt: skip


def test_a_router_in_a_narrow_dtype_is_named(mixtral: Reference) -> None:
    model = model_of()
    reroute(part(model, 1, "router"), narrow=True)
    report = compare_to(mixtral, model)
    assert faults(report) == [(1, "router")]
    assert report.first_fault is not None
    assert "rounded to bfloat16" in report.first_fault.reason
    assert report.first_difference is report.first_fault
    # What comes after it got another input, and does nothing wrong itself.
    assert {one.verdict for one in report.operations if one.operation.layer is None} <= {"equal", "carried"}


def test_a_missing_renormalisation_is_named(mixtral: Reference) -> None:
    model = model_of()
    reroute(part(model, 0, "router"), renormalise=False)
    report = compare_to(mixtral, model)
    assert faults(report) == [(0, "router")]
    assert report.first_fault is not None
    assert "renormalisation" in report.first_fault.reason
    router = report.routers[0]
    assert router.sums[1] < 0.999
    assert router.reference_sums == pytest.approx((1, 1), abs=1e-6)
    assert router.others_given_equal == 0


def test_swapped_halves_of_one_expert_are_named(mixtral: Reference) -> None:
    model = model_of()
    experts = part(model, 1, "experts")
    with torch.no_grad():
        experts.gate_up_proj[2] = experts.gate_up_proj[2].roll(experts.intermediate_dim, 0)
    report = compare_to(mixtral, model)
    assert faults(report) == [(1, "experts")]
    assert report.first_fault is not None
    assert "only tokens of expert 2;" in report.first_fault.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_wrong_activation_is_named(dtype: torch.dtype) -> None:
    model = model_of("qwen2_moe", dtype)
    part(model, 0, "experts").act_fn = nn.GELU()
    report = compare_to(reference("qwen2_moe", dtype), model)
    assert faults(report) == [(0, "experts")]
    assert report.first_fault is not None
    assert "only tokens of" not in report.first_fault.reason
    assert report.first_fault.reference_error is not None
    assert report.first_fault.error is not None
    assert report.first_fault.error > 4 * report.first_fault.reference_error


def test_a_fault_in_a_sum_between_operations_is_the_blocks(mixtral: Reference) -> None:
    model = model_of()
    block = part(model, 0, "block")
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01
    assert faults(compare_to(mixtral, model)) == [(0, "block")]


def test_no_number_is_a_fault_and_not_a_number_in_json(mixtral: Reference) -> None:
    model = model_of()
    with torch.no_grad():
        part(model, 1, "experts").down_proj[0, 0, 0] = float("nan")
    report = compare_to(mixtral, model)
    assert faults(report) == [(1, "experts")]
    json.dumps(report.to_json(), allow_nan=False)


def test_reordered_choices_of_a_router_are_no_difference(mixtral: Reference) -> None:
    model = model_of()
    router = part(model, 0, "router")
    forward = router.forward

    def flipped(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = forward(hidden)
        return logits, weights.flip(1), index.flip(1)

    router.forward = flipped
    report = compare_to(mixtral, model)
    assert {one.verdict for one in report.operations if one.operation.kind == "router"} <= {"equal", "carried"}
    assert report.routers[0].others == 0


def test_other_choices_are_listed_with_how_close_they_were(mixtral: Reference) -> None:
    model = model_of()
    with torch.no_grad():
        part(model, 0, "router").weight[1] += 0.5
    router = compare_to(mixtral, model).routers[0]
    assert 0 < router.others_given_equal == router.others <= router.tokens
    example = router.examples[0]
    assert example.chosen != example.reference
    assert example.margin >= router.smallest_margin >= 0


def test_a_bfloat16_router_is_asked_whether_float32_chooses_otherwise() -> None:
    found = reference("mixtral", torch.bfloat16)
    report = compare_to(found, model_of("mixtral", torch.bfloat16))
    for router in report.routers:
        assert router.logits_dtype == "bfloat16"
        assert router.others_in_float32 == router.reference_others_in_float32
    # Logits that tie in bfloat16 and not in float32 decide for another expert.
    model, wide = model_of("mixtral", torch.bfloat16), model_of("mixtral", torch.bfloat16).float()
    for one in (model, wide):
        with torch.no_grad():
            weight = part(one, 0, "router").weight
            weight[:] = weight[0] * (1 + torch.arange(len(weight), dtype=torch.float32)[:, None] * 2**-9).to(weight)
            weight[:, 0] += torch.arange(len(weight)).to(weight) * 0.001
    tied = reference_of(PROMPTS, model, lambda: wide)
    assert sum(one.reference_others_in_float32 or 0 for one in compare_to(tied, model).routers) > 0


@pytest.mark.parametrize("family", NAMED_FAMILIES)
def test_in_every_family_only_what_is_wrong_is_at_fault(family: str) -> None:
    found, model = reference(family), model_of(family)
    model.set_experts_implementation("batched_mm")
    report = compare_to(found, model)
    assert faults(report) == []
    assert report.first_difference is None or report.first_difference.operation.kind == "experts"
    assert {"embedding", "norm", "attention", "router", "experts", "moe", "block", "lm_head"} <= {
        one.operation.kind for one in report.operations
    }
    layer = next(op.layer for op, _ in operations(model) if op.kind == "experts")
    assert layer is not None
    with torch.no_grad():
        down = part(model, layer, "experts").down_proj
        down[:] = down.roll(1, 1)
    assert faults(compare_to(found, model)) == [(layer, "experts")]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_exact_experts_are_what_eager_ones_approximate(family: str) -> None:
    model = model_of(family)
    trace = run(model, PROMPTS, alone(PROMPTS))
    op, module = next((op, module) for op, module in operations(model) if op.kind == "experts")
    exact = exact_experts(module, *trace[op.name].inputs)
    assert exact is not None
    assert exact.dtype == torch.float64
    torch.testing.assert_close(trace[op.name].outputs[0].double(), exact, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_run_wider_is_judged_by_its_reference(caplog: pytest.LogCaptureFixture) -> None:
    def wide() -> nn.Module:
        model = model_of().double()
        experts = part(model, 1, "experts")
        experts.forward = lambda *args: F.linear(args[0], experts.down_proj[0].float())
        return model

    found = reference_of(PROMPTS, model_of(), wide)
    assert "cannot run in a wider dtype" in caplog.text
    assert found.wide_forced is None
    assert compare_to(found, model_of()).first_difference is None
    model = model_of()
    reroute(part(model, 1, "router"), narrow=True)
    report = compare_to(found, model)
    assert faults(report) == [(1, "router")]
    assert report.outcome is not None
    assert report.outcome.error is None
    assert report.routers[0].others_in_float32 is None


# Invariance ---------------------------------------------------------------------------------------------------
