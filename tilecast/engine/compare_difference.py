"""How far two traces of one operation are apart: bits, largest difference, and the rows that are beyond rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tilecast.canonical import Json
from tilecast.engine.compare_capture import Record, Trace, bits

SLACK = 4.0
"""An operation may be so many times as far from the exact result as the reference is …"""
FLOOR_EPS = 4.0
"""… plus so many units of its dtype's precision, where the exact result is known;"""
BLIND_FLOOR_EPS = 64.0
"""so many where it is not, and the reference itself stands in for it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two results of an operation have in common, over the rows that both have.

    `max_relative` is the largest difference of any value as a share of the size (root mean square) of its row.
    Both are infinite where one result has a value that is no number and the other does not.
    """

    values: int
    equal_values: int
    rows: int
    equal_rows: int
    max_absolute: float
    max_relative: float
    first_row: int | None

    @property
    def equal(self) -> bool:
        """Whether all bits are equal."""
        return self.first_row is None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form; a difference that is no finite number is null."""
        return {
            "values": self.values, "equal_values": self.equal_values, "rows": self.rows, "equal_rows": self.equal_rows,
            "max_absolute": finite(self.max_absolute), "max_relative": finite(self.max_relative),
        }  # fmt: skip


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


def difference(ours: Record, theirs: Record) -> Difference:
    """Compare two records' outputs. Routers are compared as `comparable` says."""
    rows = torch.nonzero(ours.seen & theirs.seen).flatten()
    values = equal_values = 0
    unequal = torch.zeros(len(rows), dtype=torch.bool)
    absolute = relative = 0.0
    for mine, other in zip(comparable(ours), comparable(theirs), strict=False):
        a, b = mine[rows], other[rows]
        if a.shape != b.shape:
            values, unequal, absolute, relative = values + a.numel(), torch.ones_like(unequal), math.inf, math.inf
            continue
        same = bits(a) == bits(b) if a.dtype == b.dtype else a.double() == b.double()
        values, equal_values = values + same.numel(), equal_values + int(same.sum())
        unequal |= ~same.all(1)
        if not same.all():
            absolute = max(absolute, float(_apart(a, b).max()))
            relative = max(relative, float(row_errors(a, b).max()))
    first = int(rows[unequal.nonzero()[0, 0]]) if unequal.any() else None
    return Difference(
        values=values, equal_values=equal_values, rows=len(rows), equal_rows=len(rows) - int(unequal.sum()),
        max_absolute=absolute, max_relative=relative, first_row=first,
    )  # fmt: skip


def same_inputs(ours: Record, theirs: Record) -> bool:
    """Whether two records' inputs have equal bits, over the rows that both have."""
    rows = ours.seen & theirs.seen
    return len(ours.inputs) == len(theirs.inputs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a[rows]), bits(b[rows]))
        for a, b in zip(ours.inputs, theirs.inputs, strict=True)
    )


def not_guilty(ours: Trace, theirs: Trace, differing: Iterable[str]) -> set[str]:
    """Return which of the operations that differ in a forced run do so because of a collective, or are none's cause.

    A collective's inputs are not forced: where ranks' shares differ, it is the operation around it that does; where
    they are equal and the result is not, it is the collective, and the operation around it only hands that on.
    """
    innocent = set()
    for name in differing:
        if ours[name].operation.kind == "collective":
            guilty = same_inputs(ours[name], theirs[name])
            innocent.add(name.partition("#")[0].removesuffix(".collective") if guilty else name)
    return innocent


def comparable(record: Record) -> list[torch.Tensor]:
    """Return a record's outputs for comparing: a router's weights spread over all experts, as their order is free."""
    routed = routing(record)
    if routed is None:
        return record.outputs
    logits, weights, index = routed
    spread = torch.zeros(len(index), logits.shape[1], dtype=weights.dtype)
    # Experts of other ranks may be written as an index beyond the last.
    inside = index.clamp(max=logits.shape[1] - 1)
    return [logits, spread.scatter(1, inside, weights * (index < logits.shape[1]))]


def routing(record: Record) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return a router's logits [T, E], weights and indices [T, k]; None for what is no such router."""
    if record.operation.kind != "router":
        return None
    index = next((out for out in record.outputs if not out.dtype.is_floating_point), None)
    floating = [out for out in record.outputs if out.dtype.is_floating_point]
    if index is None or len(floating) != 2:
        return None
    # Logits come first in all families; where k is the number of experts, the shapes do not tell.
    logits, weights = floating if floating[1].shape == index.shape else floating[::-1]
    return (logits, weights, index.long()) if weights.shape == index.shape else None


def row_errors(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return each row's largest difference as a share of its size; infinite where only one is a number."""
    size = exact.double().nan_to_num(0.0, 0.0, 0.0).square().mean(1).sqrt()
    whole = float(size.square().mean().sqrt()) if len(size) else 0.0
    size = torch.where(size > 0, size, whole if whole > 0 else 1.0)
    apart = _apart(ours, exact)
    return (apart.max(1).values if apart.shape[1] else apart.sum(1)) / size


def _apart(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return |ours - exact|; zero where both are the same infinity or both no number, infinite where one is."""
    a, b = ours.double(), exact.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(math.inf, math.inf, math.inf))


def precision(dtype: torch.dtype) -> float:
    """Return a dtype's unit of precision; 0 for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
