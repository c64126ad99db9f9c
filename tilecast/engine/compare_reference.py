"""A model against a reference model: every operation on equal inputs, judged by the error the reference has itself.

Three runs of one operation on the reference's input are compared: ours, the reference's (same dtype), and a wide one
(the reference's code in a wider dtype; for experts a float64 computation of their weights). An operation is at fault
where it is much farther from the wide result than the reference is. So neither an earlier operation's fault nor the
rounding that any order of sums has is held against it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilecast.canonical import Json
from tilecast.engine.compare_capture import CANNOT, Prompts, Record, Trace, alone, run
from tilecast.engine.compare_difference import (
    BLIND_FLOOR_EPS,
    FLOOR_EPS,
    SLACK,
    Difference,
    comparable,
    difference,
    finite,
    not_guilty,
    precision,
    routing,
    row_errors,
)
from tilecast.engine.compare_operations import Operation, operations
from tilecast.engine.compare_routing import RoutingReport, routing_reports

logger = logging.getLogger(__name__)

VERDICTS = ("equal", "carried", "rounding", "fault")
"""Bits are equal; they differ only because the input did; within rounding on equal input; beyond it."""


@dataclass(frozen=True, kw_only=True)
class OperationReport:
    """One operation: its results in free runs, and on the reference's inputs.

    `error` and `reference_error` are the largest relative errors against the wide result, None where there is none.
    """

    operation: Operation
    free: Difference
    given_equal: Difference
    error: float | None
    reference_error: float | None
    verdict: str
    reason: str = ""

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "operation": self.operation.name, "kind": self.operation.kind, "layer": self.operation.layer,
            "verdict": self.verdict, "reason": self.reason, "free": self.free.to_json(),
            "given_equal_input": self.given_equal.to_json(),
            "error": None if self.error is None else finite(self.error),
            "reference_error": None if self.reference_error is None else finite(self.reference_error),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the models predict: mean loss of the next token, ours and theirs; tokens on whose successor they agree.

    Errors are of the logits against the wide model's, relative to their size; None without one.
    """

    loss: float
    reference_loss: float
    wide_loss: float | None
    tokens: int
    agreeing: int
    error: float | None
    reference_error: float | None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        wide = None if self.wide_loss is None else finite(self.wide_loss)
        return {
            "loss": finite(self.loss), "reference_loss": finite(self.reference_loss), "wide_loss": wide,
            "tokens": self.tokens, "same_next_token": self.agreeing,
            "logits_error": None if self.error is None else finite(self.error),
            "reference_logits_error": None if self.reference_error is None else finite(self.reference_error),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReferenceReport:
    """A model against a reference: all operations, in the order in which they end, the routers, and the outcome."""

    operations: tuple[OperationReport, ...]
    routers: tuple[RoutingReport, ...]
    outcome: Outcome | None

    @property
    def first_difference(self) -> OperationReport | None:
        """The first operation whose bits differ in a free run."""
        return next((one for one in self.operations if not one.free.equal), None)

    @property
    def first_fault(self) -> OperationReport | None:
        """The first operation that is beyond rounding on equal inputs."""
        return next((one for one in self.operations if one.verdict == "fault"), None)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        first, fault = self.first_difference, self.first_fault
        return {
            "first_difference": None if first is None else first.operation.name,
            "first_fault": None if fault is None else {"operation": fault.operation.name, "reason": fault.reason},
            "operations": [one.to_json() for one in self.operations],
            "routers": [one.to_json() for one in self.routers],
            "outcome": None if self.outcome is None else self.outcome.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is kept of the reference: its trace, the exact experts on its inputs, and the wide model's two traces."""

    prompts: Prompts
    trace: Trace
    exact_experts: dict[str, torch.Tensor]
    wide_free: Trace | None
    wide_forced: Trace | None


def reference_of(
    prompts: Prompts, model: nn.Module, wide: Callable[[], nn.Module] | None, *, sharded: bool = False
) -> Reference:
    """Run the reference model, and the wide one that `wide` gives, over the prompts, each on its own.

    The experts of a `sharded` model are a part of their layer, whose exact result no rank can compute alone.
    """
    trace = run(model, prompts, alone(prompts))
    exact = {} if sharded else _exact_experts(model, trace)
    if wide is None:
        return Reference(prompts=prompts, trace=trace, exact_experts=exact, wide_free=None, wide_forced=None)
    wide_model = wide()
    try:
        free = run(wide_model, prompts, alone(prompts))
        forced = run(wide_model, prompts, alone(prompts), forced=trace)
    except CANNOT as error:
        # Code that names its dtypes may refuse a wider one; the reference then stands in for the exact result.
        logger.warning("the reference cannot run in a wider dtype: %s: %s", type(error).__name__, error)
        return Reference(prompts=prompts, trace=trace, exact_experts=exact, wide_free=None, wide_forced=None)
    # Of the free run only the logits are asked for, and of the forced one no input: it is the reference's.
    free = {name: record for name, record in free.items() if record.operation.kind == "lm_head"}
    for record in (*free.values(), *forced.values()):
        record.inputs.clear()
    return Reference(prompts=prompts, trace=trace, exact_experts=exact, wide_free=free, wide_forced=forced)


def compare_to(reference: Reference, model: nn.Module) -> ReferenceReport:
    """Run a model over the reference's prompts, free and on the reference's inputs, and judge every operation."""
    prompts, theirs = reference.prompts, reference.trace
    ours = run(model, prompts, alone(prompts))
    forced = run(model, prompts, alone(prompts), forced=theirs)
    common = [name for name in ours if name in theirs and _same_form(ours[name], theirs[name])]
    judged = [_judged(reference, ours[name], theirs[name], forced[name]) for name in common]
    differing = [one.operation.name for one in judged if not one.given_equal.equal]
    innocent = not_guilty(forced, theirs, differing)
    return ReferenceReport(
        operations=tuple(
            replace(one, verdict="carried", reason="") if one.operation.name in innocent else one for one in judged
        ),
        routers=routing_reports(prompts, ours, theirs, forced, reference.wide_forced),
        outcome=_outcome(prompts, ours, theirs, reference.wide_free),
    )


def _same_form(ours: Record, theirs: Record) -> bool:
    """Whether two collectives do the same: one model may gather what the other reduces, and no bits compare then."""
    if ours.operation.kind != "collective":
        return True
    return [out.shape for out in ours.outputs] == [out.shape for out in theirs.outputs]


def _exact_experts(model: nn.Module, trace: Trace) -> dict[str, torch.Tensor]:
    found = {}
    for operation, module in operations(model):
        record = trace.get(operation.name)
        if operation.kind == "experts" and record is not None and len(record.inputs) == 3:
            exact = exact_experts(module, *record.inputs)
            if exact is not None:
                found[operation.name] = exact
    return found


def exact_experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """Return the experts' result [T, H] in float64 for hidden [T, H], indices and weights [T, k].

    Gate and activation are the module's own code, on float64 operands, whatever its family does in between its two
    GEMMs. None where the module's weights are not laid out as transformers' experts interface says.
    """
    up, down = getattr(module, "gate_up_proj", getattr(module, "up_proj", None)), getattr(module, "down_proj", None)
    if not hasattr(module, "is_transposed") or up is None or down is None or index.dtype.is_floating_point:
        return None
    if getattr(module, "has_post_expert_norm", False) and up.device.type != "cpu":
        return None  # the norm's own weights would have to move to the host
    result = torch.zeros(len(hidden), hidden.shape[1], dtype=torch.float64)
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < len(up):
            continue
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        value = _linear(module, up, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", expert, hidden[tokens])
        value = module._apply_gate(value) if module.has_gate else module.act_fn(value)
        value = _linear(module, down, "down_proj_bias", expert, value)
        if getattr(module, "has_post_expert_norm", False):
            value = module.post_expert_norm(value)
        result.index_add_(0, tokens, value * weights[tokens, slots, None].double())
    return result


def _linear(module: Any, weight: torch.Tensor, bias: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    own = weight[expert].detach().cpu().double()
    added = getattr(module, bias)[expert].detach().cpu().double() if module.has_bias else None
    return F.linear(rows.double(), own.T if module.is_transposed else own, added)


def _judged(reference: Reference, ours: Record, theirs: Record, forced: Record) -> OperationReport:
    """Judge one operation; see the module's docstring."""
    name = ours.operation.name
    free, given = difference(ours, theirs), difference(forced, theirs)
    exact = _exact(reference, ours)
    bad, error, own_error = _beyond_rounding(forced, theirs, exact)
    unlike = "fault" if bad.any() else "rounding"
    verdict = unlike if not given.equal else "equal" if free.equal else "carried"
    reason = _reason(forced, theirs, bad) if verdict == "fault" else ""
    blind = exact is None or name not in {**(reference.wide_forced or {}), **reference.exact_experts}
    return OperationReport(
        operation=ours.operation, free=free, given_equal=given, verdict=verdict, reason=reason,
        error=None if blind else error, reference_error=None if blind else own_error,
    )  # fmt: skip


def _exact(reference: Reference, record: Record) -> list[torch.Tensor] | None:
    """Return what the operation should give on the reference's input, or None if nothing wider was computed."""
    name = record.operation.name
    if name in reference.exact_experts:
        return [reference.exact_experts[name]]
    wide = reference.wide_forced
    return comparable(wide[name]) if wide is not None and name in wide else None


def _beyond_rounding(
    forced: Record, theirs: Record, exact: Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, float, float]:
    """Return which rows are beyond rounding, and the largest error of ours and of the reference."""
    bad = torch.zeros(len(theirs.seen), dtype=torch.bool)
    worst = worst_reference = 0.0
    routed = (routing(forced), routing(theirs))
    for number, (mine, other) in enumerate(zip(comparable(forced), comparable(theirs), strict=False)):
        if mine.shape != other.shape:
            return torch.ones_like(bad), float("inf"), 0.0
        known = exact is not None and exact[number].shape == mine.shape
        target = exact[number] if exact is not None and known else other
        errors, reference_errors = row_errors(mine, target), row_errors(other, target)
        allowed = SLACK * _largest(reference_errors) + (FLOOR_EPS if known else BLIND_FLOOR_EPS) * precision(mine.dtype)
        if number == 1 and routed[0] is not None and routed[1] is not None:
            # Another choice of experts is no fault where the logits are right and the call was close.
            closer = _close_calls(routed[0], routed[1], allowed)
            errors = torch.where(closer, 0.0, errors)
        bad |= errors > allowed
        worst, worst_reference = max(worst, _largest(errors)), max(worst_reference, _largest(reference_errors))
    return bad & theirs.seen, worst, worst_reference


def _close_calls(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], allowed: float) -> torch.Tensor:
    """Return the tokens that chose other experts, all within `allowed` of the reference's logits for its choice."""
    logits = theirs[0].double()
    size = logits.square().mean(1).sqrt()
    apart = logits.gather(1, theirs[2]).min(1).values - logits.gather(1, ours[2]).min(1).values
    changed = (ours[2].sort(1).values != theirs[2].sort(1).values).any(1)
    return changed & (apart.abs() <= 2 * allowed * size)


def _largest(errors: torch.Tensor) -> float:
    return float(errors.max()) if len(errors) else 0.0


def _reason(forced: Record, theirs: Record, bad: torch.Tensor) -> str:
    """Say what is wrong with an operation on equal inputs, as far as its results tell."""
    kind = theirs.operation.kind
    rows = f"{int(bad.sum())} of {int(theirs.seen.sum())} tokens"
    if kind == "router":
        return f"{_router_reason(forced, theirs)}; {rows}"
    if kind == "experts" and len(theirs.inputs) == 3 and (experts := _bad_experts(theirs.inputs[1].long(), bad)):
        return f"only tokens of {'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))}; {rows}"
    return rows


def _router_reason(forced: Record, theirs: Record) -> str:
    ours, other = routing(forced), routing(theirs)
    if ours is None or other is None:
        return "logits differ"
    for narrow in (torch.bfloat16, torch.float16):
        rounded = ours[0].to(narrow).to(ours[0].dtype)
        if ours[0].dtype.itemsize > 2 and torch.equal(rounded, ours[0]) and not torch.equal(ours[0], other[0]):
            return f"logits are rounded to {str(narrow).removeprefix('torch.')}"
    if float(row_errors(ours[0], other[0]).max()) > BLIND_FLOOR_EPS * precision(ours[0].dtype):
        return "logits differ"
    sums, reference_sums = ours[1].double().sum(1), other[1].double().sum(1)
    if float((sums - reference_sums).abs().max()) > 0.01:
        told = f"sum to {float(sums.min()):.3g}…{float(sums.max()):.3g}"
        expected = f"{float(reference_sums.min()):.3g}…{float(reference_sums.max()):.3g}"
        return f"logits agree, but weights {told} instead of {expected}: look at renormalisation and scaling"
    if bool((ours[2].sort(1).values != other[2].sort(1).values).any()):
        return "logits agree, but other experts are chosen"
    return "logits and choices agree, but weights differ"


def _bad_experts(index: torch.Tensor, bad: torch.Tensor) -> list[int]:
    """Return the experts to whose tokens the fault is confined; none if every expert's tokens have it."""
    experts = torch.unique(index).tolist()
    guilty = [expert for expert in experts if bool(bad[(index == expert).any(1)].all())]
    explained = torch.isin(index, torch.tensor(guilty, dtype=index.dtype)).any(1)
    return guilty if 0 < len(guilty) < len(experts) and not bool((bad & ~explained).any()) else []


def _outcome(prompts: Prompts, ours: Trace, theirs: Trace, wide: Trace | None) -> Outcome | None:
    """Compare the logits of the head; None for a model without one."""
    name = next((name for name, record in theirs.items() if record.operation.kind == "lm_head"), None)
    if name is None or name not in ours:
        return None
    mine, other = ours[name].outputs[0], theirs[name].outputs[0]
    exact = None if wide is None or name not in wide else wide[name].outputs[0]
    return Outcome(
        loss=_loss(prompts, mine), reference_loss=_loss(prompts, other),
        wide_loss=None if exact is None else _loss(prompts, exact),
        tokens=len(mine), agreeing=int((mine.argmax(1) == other.argmax(1)).sum()),
        error=None if exact is None else _largest(row_errors(mine, exact)),
        reference_error=None if exact is None else _largest(row_errors(other, exact)),
    )  # fmt: skip


def _loss(prompts: Prompts, logits: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of each prompt's tokens after its first."""
    likelihood = torch.log_softmax(logits.double(), 1)
    lost = []
    for start, ids in zip(prompts.starts, prompts.ids, strict=True):
        lost += [-float(likelihood[start + place, token]) for place, token in enumerate(ids[1:])]
    return sum(lost) / len(lost) if lost else 0.0
