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


def spans(chosen: Sequence[tuple[Bucket, T]], *, few: T, many: T, experts: int) -> list[Span[T]]:
    """Return spans that cover every count from 1: the chosen buckets', which ascend, and defaults everywhere else.

    `few` is the default up to `experts` tokens, `many` the one above.
    """
    found: list[Span[T]] = []
    position = 1
    for bucket, value in chosen:
        found += _defaults(position, bucket.above, few, many, experts)
        found.append(Span(bucket.above + 1, bucket.tokens, value))
        position = bucket.tokens + 1
    return [*found, *_defaults(position, None, few, many, experts)]


def _defaults(low: int, high: int | None, few: T, many: T, experts: int) -> list[Span[T]]:
    if high is not None and low > high:
        return []
    if low > experts:
        return [Span(low, high, many)]
    if high is not None and high <= experts:
        return [Span(low, high, few)]
    return [Span(low, experts, few), Span(experts + 1, high, many)]


def pinned(covering: Sequence[Span[T]]) -> list[tuple[int, T]]:
    """Return (token count, value) rows, ascending: each span's end, and its start where the value changes there."""
    rows: list[tuple[int, T]] = []
    for span in covering:
        if rows and rows[-1][1] != span.value and span.low != span.high:
            rows.append((span.low, span.value))
        if span.high is not None:
            rows.append((span.high, span.value))
    return rows
