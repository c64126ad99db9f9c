"""`compare` names the layer and the operation of faults that are planted, and finds none where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from tests.tiny_models import NAMED_FAMILIES, save_tiny, tiny_model
from tilecast.engine import compare as compare_module
from tilecast.engine.adapted import adapted_of
from tilecast.engine.agreement import process_group
from tilecast.engine.compare import Request, check_expected, compare, unmet
from tilecast.engine.compare_capture import Prompts, alone, digests, run
from tilecast.engine.compare_invariance import (
    arrangements,
    check_arrangements,
    compare_digests,
    random_prompts,
)
from tilecast.engine.compare_operations import operations
from tilecast.engine.compare_reference import Reference, ReferenceReport, compare_to, exact_experts, reference_of
from tilecast.engine.runtime import forget_table
from tilecast.engine.transformers import experts_modules
from tilecast.errors import ModelError, UsageError

PROMPTS = random_prompts(97, lengths=(9, 6, 7))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Before all fixtures: the number of threads decides about bits.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


class Alone(nn.Module):
    """Stands in for a kernel that chooses by the number of tokens: more than `above` get other bits."""

    def __init__(self, module: nn.Module, above: int) -> None:
        super().__init__()
        self.inner, self.above = module.forward, above

    def forward(self, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(hidden, *rest)
        return result * (1 + 2**-20) if len(hidden) > self.above else result


def row_by_row(model: Any) -> Any:
    """Make the parts of a tiny model free of the batch, so that only what a test plants depends on it."""

    def linear(module: nn.Linear) -> Any:
        def forward(rows: torch.Tensor) -> torch.Tensor:
            return (rows[..., None, :] * module.weight).sum(-1)

        return forward

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = linear(module)
    model.set_attn_implementation("eager")
    for op, module in operations(model):
        if op.kind == "experts":
            module.forward = RowWise(module)
        if op.kind == "router":
            reroute_row_by_row(module)
    return model


class RowWise:
    def __init__(self, module: Any) -> None:
        self.inner = module.forward

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = [self.inner(hidden[t : t + 1], index[t : t + 1], weights[t : t + 1]) for t in range(len(hidden))]
        return torch.cat(rows)


def reroute_row_by_row(router: Any) -> None:
    inner = router.forward

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = [inner(rows[t : t + 1]) for t in range(len(rows))]
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    router.forward = forward


def test_a_batch_dependent_operation_is_named() -> None:
    model = row_by_row(model_of())
    assert check_arrangements(model, PROMPTS, "batch").verdict == "equal"
    experts = part(model, 1, "experts")
    experts.forward = Alone(experts, above=6).forward
    found = check_arrangements(model, PROMPTS, "batch")
    assert found.verdict == "differs"
    assert found.first is not None
    assert (found.first.operation.layer, found.first.operation.kind) == (1, "experts")
    assert [(cause.operation.layer, cause.operation.kind) for cause in found.causes] == [(1, "experts")]
    assert found.causes[0].rows == found.causes[0].of_rows


def test_a_cause_behind_another_is_named_too() -> None:
    model = row_by_row(model_of())
    for layer, kind in ((0, "experts"), (1, "experts")):
        module = part(model, layer, kind)
        module.forward = Alone(module, above=6).forward
    found = check_arrangements(model, PROMPTS, "batch")
    assert [(cause.operation.layer, cause.operation.kind) for cause in found.causes] == [(0, "experts"), (1, "experts")]


def test_an_operation_that_depends_on_a_buckets_edge_is_named() -> None:
    model = row_by_row(model_of())
    experts = part(model, 0, "experts")
    experts.forward = Alone(experts, above=12).forward
    assert check_arrangements(model, PROMPTS, "buckets", (8,)).causes == ()
    found = check_arrangements(model, PROMPTS, "buckets", (9,))
    assert found.verdict == "differs"
    assert [cause.operation.kind for cause in found.causes] == ["experts"]


def test_an_operation_that_looks_at_the_rows_order_is_named() -> None:
    model = row_by_row(model_of())
    norm = part(model, 1, "norm")
    inner = norm.forward
    norm.forward = lambda rows: inner(rows) + (rows * 0).add(torch.arange(len(rows))[:, None, None] * 2**-20)
    found = check_arrangements(model, PROMPTS, "order")
    assert [(cause.operation.layer, cause.operation.kind) for cause in found.causes] == [(1, "norm")]


def test_what_a_model_cannot_run_is_unknown_with_the_reason() -> None:
    model = model_of()
    forward = model.forward

    def no_cache(*args: Any, **kwargs: Any) -> Any:
        if kwargs["use_cache"]:
            raise ValueError("takes no cache")
        return forward(*args, **kwargs)

    model.forward = no_cache
    found = check_arrangements(model, PROMPTS, "decode")
    assert found.verdict == "unknown"
    assert "takes no cache" in found.detail


def test_rows_of_all_arrangements_are_the_same_tokens() -> None:
    model = model_of()
    whole = run(model, PROMPTS, alone(PROMPTS))
    for check in ("batch", "order", "padding", "decode", "chunked", "buckets"):
        for arrangement in arrangements(check, PROMPTS, (4, 16)):
            trace = run(model, PROMPTS, arrangement.passes)
            for name, record in trace.items():
                if record.operation.kind in ("embedding", "lm_head"):
                    seen = record.seen
                    assert seen.any()
                    ours, theirs = record.outputs[0][seen], whole[name].outputs[0][seen]
                    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_digests_of_two_runs_name_the_first_operation() -> None:
    trace = run(model_of(), PROMPTS, alone(PROMPTS))
    own = digests(trace)
    assert compare_digests("restart", "", PROMPTS, trace, own, own).verdict == "equal"
    names = list(own)
    changed = {name: list(rows) for name, rows in own.items()}
    changed[names[5]][10] = "0" * 16
    found = compare_digests("restart", "", PROMPTS, trace, own, changed)
    assert found.first is not None
    assert (found.first.operation.name, found.first.prompt, found.first.position) == (names[5], 1, 1)
    del changed[names[0]]
    assert compare_digests("restart", "", PROMPTS, trace, own, changed).verdict == "unknown"


# The whole ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "mixtral"
    save_tiny("mixtral", path, torch.float32, 0)
    return path


def test_tilecasts_experts_are_never_the_cause(folder: Path) -> None:
    checks = ("batch", "order", "padding", "decode", "restart", "policy", "ranks")
    found = compare(Request(folder=str(folder), checks=checks, prompts=PROMPTS))
    assert found.reference is not None
    assert found.reference.first_fault is None
    assert unmet(found, ["close", "tokens", "routing", "restart"]) is None
    by_name = {one.check: one for one in found.invariance}
    assert by_name["restart"].verdict == "equal"
    assert by_name["ranks"].verdict == "unknown"
    causes = {cause.operation.kind for one in found.invariance for cause in one.causes}
    assert "experts" not in causes
    json.dumps(found.to_json(), allow_nan=False)


def test_expectations_say_what_does_not_hold(folder: Path) -> None:
    found = compare(Request(folder=str(folder), checks=("ranks",), prompts=PROMPTS))
    assert unmet(found, ["close"]) is None
    assert "experts" in (unmet(found, ["close", "equal"]) or "")
    assert "ranks" in (unmet(found, ["invariant"]) or "")
    request = Request(folder=str(folder), against=None, checks=("ranks",))
    for names, words in ((["batch"], "not asked for"), (["nothing"], "some of close"), (["equal"], "no reference")):
        with pytest.raises(UsageError, match=words):
            check_expected(request, names)


def test_prompts_outside_of_the_vocabulary_are_refused(folder: Path) -> None:
    for ids in ((5, 97), (-1, 3)):
        with pytest.raises(ModelError, match="expected ids from 0 to 96"):
            compare(Request(folder=str(folder), experts="eager", against=None, checks=(), prompts=Prompts((ids,))))
    with pytest.raises(UsageError, match="no token"):
        compare(Request(folder=str(folder), experts="eager", against=None, checks=(), prompts=Prompts(((),))))
    with pytest.raises(UsageError, match="expected some of batch"):
        Request(folder=str(folder), checks=("speed",))


def test_reproducible_takes_attention_that_a_model_writes_out(tmp_path: Path) -> None:
    folder = save_tiny("gpt_oss", tmp_path)
    checks = ("padding", "restart")
    found = compare(Request(folder=str(folder), against=None, prompts=PROMPTS, reproducible=True, checks=checks))
    assert found.uncovered == ()
    assert [check.verdict for check in found.invariance] == ["equal"] * 2, found.invariance


def test_what_loading_does_is_not_named_as_uncovered(tmp_path: Path) -> None:
    request = Request(
        folder=str(save_tiny("mixtral", tmp_path)), against=None, prompts=PROMPTS, reproducible=True, checks=("policy",)
    )
    found = compare(request)
    assert found.uncovered == ()
    assert [check.verdict for check in found.invariance] == ["equal"]


def test_experts_of_many_classes_are_named_as_uncovered(tmp_path: Path) -> None:
    folder = str(save_tiny("mixtral", tmp_path))
    request = Request(folder=folder, against=None, prompts=PROMPTS, reproducible=True, policy="fastest", checks=())
    assert compare(request).uncovered == ("experts under the policy fastest",)


def test_reproducible_holds_for_the_experts_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TM_GEMM_POLICY", "fastest")
    folder = save_tiny("mixtral", tmp_path)
    for reproducible, policy in ((True, "reproducible"), (False, "fastest")):
        forget_table()
        request = Request(folder=folder, reproducible=reproducible)
        loaded = compare_module._load(request, "tilecast", process_group())
        state = adapted_of(experts_modules(loaded.model)[0][1])
        assert state is not None and state.runtime is not None and state.runtime.policy == policy
    forget_table()
