"""Arrangements of one model compared: which operation's bits depend on the batch, on padding, on chunks or buckets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.engine.test_compare import PROMPTS, model_of, part
from tests.tiny_models import save_tiny
from tilecast.engine import compare as compare_module
from tilecast.engine.adapted import adapted_of
from tilecast.engine.agreement import process_group
from tilecast.engine.compare import Request, check_expected, compare, unmet
from tilecast.engine.compare_capture import Prompts, alone, digests, run
from tilecast.engine.compare_invariance import arrangements, check_arrangements, compare_digests
from tilecast.engine.compare_operations import operations
from tilecast.engine.runtime import forget_table
from tilecast.engine.transformers import experts_modules
from tilecast.errors import ModelError, UsageError

# The number of threads decides about bits.
pytestmark = pytest.mark.usefixtures("one_thread")


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
