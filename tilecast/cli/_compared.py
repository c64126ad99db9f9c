"""A comparison as tables: layers against operations, routers, what is predicted, and the checks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tilecast.cli._output import Output, add_row, plural, table

if TYPE_CHECKING:
    from tilecast.engine.compare import Comparison
    from tilecast.engine.compare_invariance import Place
    from tilecast.engine.compare_reference import OperationReport, ReferenceReport
    from tilecast.engine.compare_routing import RoutingReport

ORDER = ("equal", "carried", "rounding", "fault")


def show_comparison(output: Output, found: Comparison) -> None:
    """Print what a comparison found, for people."""
    if found.reference is not None:
        _show_operations(output, found, found.reference)
        _show_routers(output, found.reference.routers)
        _show_outcome(output, found)
    if found.invariance:
        _show_checks(output, found)
    if found.uncovered:
        output.warn(f"not known to be free of the batch: {', '.join(found.uncovered)}")


def _show_operations(output: Output, found: Comparison, report: ReferenceReport) -> None:
    from tilecast.engine.compare_operations import KINDS

    kinds = [kind for kind in KINDS if any(one.operation.kind == kind for one in report.operations)]
    title = f"{found.experts} against {found.against}, {found.dtype}: operations on the reference's inputs"
    shown = table(title, ("layer", *kinds))
    layers = list(dict.fromkeys(one.operation.layer for one in report.operations))
    for layer in sorted(layers, key=lambda number: (number is None, number or 0)):
        own = [one for one in report.operations if one.operation.layer == layer]
        cells = [_cell([one for one in own if one.operation.kind == kind]) for kind in kinds]
        bad = any(one.verdict == "fault" for one in own)
        add_row(shown, "outside" if layer is None else str(layer), *cells, style="bold red" if bad else None)
    output.show(shown)
    output.show("  = equal bits · ← only its input differed · a number: largest difference, relative to a row's size")
    first = report.first_difference
    if first is None:
        output.show("All bits are equal to the reference's.")
        return
    output.show(f"Bits first differ at {first.operation.label}: {_extent(first)}.")
    for one in report.operations:
        if one.verdict == "fault":
            against = "" if one.error is None else f"; error {_number(one.error)}, {_rival(one)}"
            output.show(f"FAULT at {one.operation.label}: {one.reason}{against}.")
    if report.first_fault is None:
        output.show("No operation is beyond rounding: orders of sums differ, or where results are rounded.")


def _cell(reports: list[OperationReport]) -> str:
    if not reports:
        return ""
    worst = max(reports, key=lambda one: (ORDER.index(one.verdict), one.given_equal.max_relative))
    number = _number(worst.given_equal.max_relative)
    return {"equal": "=", "carried": "←", "rounding": number, "fault": f"FAULT {number}"}[worst.verdict]


def _extent(one: OperationReport) -> str:
    apart = one.free
    return (
        f"{apart.values - apart.equal_values} of {apart.values} values, {apart.rows - apart.equal_rows} of "
        f"{apart.rows} tokens, by up to {_number(apart.max_absolute)} ({_number(apart.max_relative)} of a row's size)"
    )


def _rival(one: OperationReport) -> str:
    return "" if one.reference_error is None else f"the reference's own {_number(one.reference_error)}"


def _show_routers(output: Output, routers: Iterable[RoutingReport]) -> None:
    shown = table(
        "Routers",
        ("layer", "other experts", "on equal input", "than in a wider dtype", "closest call", "sum of weights"),
    )
    routers = list(routers)
    for one in routers:
        wider = "—" if one.others_in_float32 is None else f"{one.others_in_float32} ({one.reference_others_in_float32})"
        sums = _span(one.sums)
        if sums != _span(one.reference_sums):
            sums += f" ({_span(one.reference_sums)})"
        add_row(
            shown, str(one.layer), f"{one.others} of {one.tokens}", str(one.others_given_equal), wider,
            _number(one.smallest_margin), sums, style="bold" if one.others else None,
        )  # fmt: skip
    if not routers:
        return
    output.show(shown)
    output.show("  in brackets: the reference's")
    for one in routers:
        for other in one.examples:
            output.line(
                f"  layer {one.layer}: token {other.position} of prompt {other.prompt} chose "
                f"{_list(other.chosen)} instead of {_list(other.reference)}, a call of {_number(other.margin)}"
            )


def _show_outcome(output: Output, found: Comparison) -> None:
    outcome = found.reference.outcome if found.reference is not None else None
    if outcome is None:
        return
    wide = "" if outcome.wide_loss is None else f", {outcome.wide_loss:.6f} in {found.wide}"
    output.show(
        f"Loss {outcome.loss:.6f}, the reference's {outcome.reference_loss:.6f}{wide}. The next token is the same "
        f"after {outcome.agreeing} of {plural(outcome.tokens, 'token')}."
    )
    if outcome.error is not None and outcome.reference_error is not None:
        times = outcome.error / outcome.reference_error if outcome.reference_error else math.inf
        ratio = f" ({times:.2f}×)" if math.isfinite(times) else ""
        output.show(
            f"Error of the logits against {found.wide}: {_number(outcome.error)}, the reference's "
            f"{_number(outcome.reference_error)}{ratio}."
        )


def _show_checks(output: Output, found: Comparison) -> None:
    from tilecast.engine.compare_invariance import CHECKS

    around = " inside invariant()" if found.reproducible else ""
    shown = table(
        f"Does a token's result depend on how it is run{around}?",
        ("check", "compares", "bits", "first at", "caused by"),
        left=("check", "compares", "bits", "first at", "caused by"),
    )
    for one in found.invariance:
        first = (
            "" if one.first is None else f"{one.first.operation.label}, {one.first.rows} of {one.first.of_rows} tokens"
        )
        style = {"equal": None, "differs": "bold", "unknown": "dim"}[one.verdict]
        words = one.verdict if one.verdict == "equal" else f"{one.verdict}: {one.detail}"
        add_row(shown, one.check, CHECKS[one.check], words, first, _causes(one.causes), style=style)
    output.show(shown)


def _causes(causes: Iterable[Place]) -> str:
    """Write causes by kind: `attention of 32 layers (3e-07), lm_head (1e-06)`."""
    by_kind: dict[str, list[Place]] = {}
    for cause in causes:
        by_kind.setdefault(cause.operation.kind, []).append(cause)
    parts = []
    for kind, places in by_kind.items():
        layers = list(dict.fromkeys(place.operation.layer for place in places if place.operation.layer is not None))
        where = f" of layer {layers[0]}" if len(layers) == 1 else f" of {len(layers)} layers" if layers else ""
        parts.append(f"{kind}{where} ({_number(max(place.max_relative or 0.0 for place in places))})")
    return ", ".join(parts)


def _span(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.3f}" for end in ends)
    return low if low == high else f"{low}…{high}"


def _list(numbers: Iterable[int]) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.3g}"
