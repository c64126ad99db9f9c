"""Which token counts to write, so that an engine's lookup of the nearest one picks what was meant for every count.

Both engines take the row whose token count is nearest, by absolute difference, at any distance. A row at both ends of
a span of counts keeps all of the span's counts nearer to it than to any other span, so no count at all is left to
chance. Outside the tuned range the rows say what the engine runs without a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tilecast.problem import Bucket

T = TypeVar("T")


@dataclass(frozen=True)
class Span(Generic[T]):
    """Token counts from `low` to `high`, both included (None: all above), that are to get one value."""

    low: int
    high: int | None
    value: T


def spans(chosen: Sequence[tuple[Bucket, T]], defaults: Sequence[Span[T]]) -> list[Span[T]]:
    """Return spans that cover every count from 1: the chosen buckets', which ascend, and the defaults' elsewhere.

    `defaults` cover every count themselves.
    """
    found: list[Span[T]] = []
    position = 1
    for bucket, value in chosen:
        found += _between(position, bucket.above, defaults)
        found.append(Span(bucket.above + 1, bucket.tokens, value))
        position = bucket.tokens + 1
    return [*found, *_between(position, None, defaults)]


def _between(low: int, high: int | None, defaults: Sequence[Span[T]]) -> list[Span[T]]:
    """Return the parts of the defaults from `low` to `high`."""
    found = []
    for span in defaults:
        first = max(low, span.low)
        last = min((end for end in (high, span.high) if end is not None), default=None)
        if last is None or first <= last:
            found.append(Span(first, last, span.value))
    return found


def pinned(covering: Sequence[Span[T]]) -> list[tuple[int, T]]:
    """Return (token count, value) rows, ascending: each span's end, and its start where the value changes there.

    Of rows of one value in a row only the first and the last are left: those between change nothing.
    """
    rows: list[tuple[int, T]] = []
    for span in covering:
        if rows and rows[-1][1] != span.value and span.low != span.high:
            rows.append((span.low, span.value))
        if span.high is not None:
            rows.append((span.high, span.value))
    values = [value for _, value in rows]
    inner = range(1, len(rows) - 1)
    idle = {index for index in inner if values[index - 1] == values[index] == values[index + 1]}
    return [row for index, row in enumerate(rows) if index not in idle]
