"""Does a token's result depend on how its prompt is run: alone or in a batch, padded, whole or in pieces, restarted?

Each check runs the same prompts in two or more arrangements and compares every operation's bits, row by row. Where
they differ, a second run gives every operation the inputs that it had in the first arrangement: the operations that
differ even so are the causes, the others only carry on what they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tilecast.canonical import Json
from tilecast.engine.compare_capture import CANNOT, Pass, Prompts, Trace, alone, run
from tilecast.engine.compare_difference import difference, not_guilty
from tilecast.engine.compare_operations import Operation
from tilecast.problem import tokens_text

CHECKS = {
    "batch": "alone, or beside others of the same length",
    "order": "the rows of a batch in another order",
    "padding": "alone, or padded on the left in a batch of different lengths",
    "decode": "a prompt at once, or token by token through a cache",
    "chunked": "a prompt at once, or in chunks through a cache",
    "buckets": "token counts at and above the edges of buckets",
    "restart": "this process, or a new one",
    "policy": "the policy reproducible, or fastest",
    "ranks": "rank 0, or the other ranks",
}
"""Checks by name, and what each runs in two ways."""

ARRANGED = ("batch", "order", "padding", "decode", "chunked", "buckets")
"""Checks that need nothing but the model and the prompts."""

EDGES = (1, 2, 4, 8, 16, 32, 64)
"""Token counts for `buckets` where no table names others."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """An operation, how many of its rows differ, and the first of them."""

    operation: Operation
    rows: int
    of_rows: int
    prompt: int
    position: int
    max_relative: float | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "operation": self.operation.name, "kind": self.operation.kind, "layer": self.operation.layer,
            "rows": self.rows, "of_rows": self.of_rows, "prompt": self.prompt, "position": self.position,
            "max_relative": self.max_relative,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Invariance:
    """What a check found: `equal`, `differs`, or `unknown` with the reason in `detail`.

    `first` is the first operation whose bits differ; `causes` are all that differ on equal inputs, where the check
    can force them (`restart`, `policy` and `ranks` compare finished runs, and cannot).
    """

    check: str
    verdict: str
    detail: str = ""
    first: Place | None = None
    causes: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "check": self.check, "verdict": self.verdict, "detail": self.detail,
            "first": None if self.first is None else self.first.to_json(),
            "causes": [cause.to_json() for cause in self.causes],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Passes, in words, and the passes that they must agree with."""

    words: str
    passes: tuple[Pass, ...]
    baseline: tuple[Pass, ...]


def arrangements(check: str, prompts: Prompts, edges: Sequence[int] = EDGES) -> list[Arrangement]:
    """Return the arrangements that a check of `ARRANGED` compares with their baselines."""
    lengths = [len(ids) for ids in prompts.ids]
    everyone, shortest = tuple(range(len(lengths))), min(lengths)
    whole, cut = tuple(alone(prompts)), tuple(alone(prompts, shortest))
    together = Pass(prompts=everyone, length=shortest)
    if check == "batch":
        first = Arrangement(words=f"{len(everyone)} together", passes=(together,), baseline=cut)
        fuller = Pass(prompts=(everyone * 3)[: 2 * len(everyone) + 1], length=shortest)
        return [first, Arrangement(words=f"{len(fuller.prompts)} together", passes=(fuller,), baseline=cut)]
    if check == "order":
        turned = (("reversed", everyone[::-1]), ("turned", (*everyone[1:], everyone[0])))
        return [
            Arrangement(words=words, passes=(Pass(prompts=order, length=shortest),), baseline=(together,))
            for words, order in turned
        ]
    if check == "padding":
        return [Arrangement(words="padded", passes=(Pass(prompts=everyone),), baseline=whole)]
    if check in ("decode", "chunked"):
        sizes = (1,) if check == "decode" else tuple(sorted({2, max(2, max(lengths) // 2)}))
        return [
            Arrangement(
                words="token by token" if size == 1 else f"{size} tokens at a time",
                passes=tuple(Pass(prompts=(prompt,), chunk=size) for prompt in everyone),
                baseline=whole,
            )
            for size in sizes
        ]
    return _around_edges(lengths, edges)


def _around_edges(lengths: Sequence[int], edges: Sequence[int]) -> list[Arrangement]:
    """Cut, or copy, the longest prompt so that the model meets token counts at and right above each edge."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    baseline = (Pass(prompts=(longest,)),)
    found = {}
    for count in sorted({count for edge in edges for count in (edge, edge + 1)}):
        if count < lengths[longest]:
            found[count] = Pass(prompts=(longest,), length=count)
        else:
            copies = -(-count // lengths[longest])
            found[copies * lengths[longest]] = Pass(prompts=(longest,) * copies, last_only=True)
    return [
        Arrangement(words=tokens_text(count), passes=(single,), baseline=baseline) for count, single in found.items()
    ]


def check_arrangements(
    model: nn.Module,
    prompts: Prompts,
    check: str,
    edges: Sequence[int] = EDGES,
    anywhere: Callable[[bool], bool] = lambda here: here,
) -> Invariance:
    """Run one check of `ARRANGED` on a model.

    `anywhere` tells whether what is so here is so on any rank: all must run the same forwards.
    """
    if len(prompts.ids) < 2 and check in ("batch", "order"):
        return Invariance(check=check, verdict="unknown", detail="needs at least two prompts")
    baselines: dict[tuple[Pass, ...], Trace] = {}
    tried = arrangements(check, prompts, edges)
    for arrangement in tried:
        try:
            if arrangement.baseline not in baselines:
                baselines[arrangement.baseline] = run(model, prompts, arrangement.baseline)
            baseline = baselines[arrangement.baseline]
            differing = places(prompts, baseline, run(model, prompts, arrangement.passes))
            if anywhere(bool(differing)):
                forced = run(model, prompts, arrangement.passes, forced=baseline)
                causes = tuple(_causes(prompts, baseline, forced))
                words, first = arrangement.words, differing[0] if differing else None
                return Invariance(check=check, verdict="differs", detail=words, first=first, causes=causes)
        except CANNOT as error:
            reason = f"{arrangement.words}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return Invariance(check=check, verdict="unknown", detail=reason)
    return Invariance(check=check, verdict="equal", detail="; ".join(one.words for one in tried))


def places(prompts: Prompts, expected: Trace, found: Trace) -> list[Place]:
    """Return the operations whose bits differ, in the order in which they end."""
    result = []
    for name, record in expected.items():
        if name not in found:
            continue
        apart = difference(found[name], record)
        if apart.first_row is not None:
            prompt, position = prompts.place(apart.first_row)
            result.append(
                Place(
                    operation=record.operation, rows=apart.rows - apart.equal_rows, of_rows=apart.rows,
                    prompt=prompt, position=position,
                    max_relative=apart.max_relative if apart.max_relative != float("inf") else None,
                )
            )  # fmt: skip
    return result


def _causes(prompts: Prompts, expected: Trace, forced: Trace) -> list[Place]:
    """Return the operations whose bits differ in a forced run by their own doing."""
    differing = places(prompts, expected, forced)
    innocent = not_guilty(forced, expected, [place.operation.name for place in differing])
    return [place for place in differing if place.operation.name not in innocent]


def check_traces(check: str, detail: str, prompts: Prompts, expected: Trace, found: Trace) -> Invariance:
    """Compare two finished runs of the same passes."""
    differing = places(prompts, expected, found)
    verdict = "differs" if differing else "equal"
    return Invariance(check=check, verdict=verdict, detail=detail, first=differing[0] if differing else None)


def compare_digests(
    check: str,
    detail: str,
    prompts: Prompts,
    trace: Trace,
    expected: Mapping[str, Sequence[str]],
    found: Mapping[str, Sequence[str]],
) -> Invariance:
    """Compare the digests of two finished runs, in processes or on ranks apart; `trace` knows the operations."""
    for name, own in expected.items():
        other = found.get(name)
        if other is None or len(other) != len(own):
            return Invariance(check=check, verdict="unknown", detail=f"{detail}: has no {name}")
        rows = [row for row, (a, b) in enumerate(zip(own, other, strict=True)) if a != b]
        if rows:
            prompt, position = prompts.place(rows[0])
            first = Place(
                operation=trace[name].operation, rows=len(rows), of_rows=len(own), prompt=prompt, position=position
            )
            return Invariance(check=check, verdict="differs", detail=detail, first=first)
    return Invariance(check=check, verdict="equal", detail=detail)


def random_prompts(vocabulary: int, *, seed: int = 0, lengths: Sequence[int] = (24, 9, 17, 5)) -> Prompts:
    """Return prompts of ids drawn at random, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return Prompts(
        tuple(
            tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist()) for length in lengths
        )
    )  # fmt: skip
