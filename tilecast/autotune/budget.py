"""How the time that a user grants is shared out among tasks: more to those that cost more, and that promise more."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from tilecast.autotune.plan import Task
from tilecast.autotune.select import bucket_weights
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer

CHECK_SHARE = 0.06
"""Part of the budget that is left for the class check, which follows the measuring."""
NOMINAL_BYTES_PER_S = 3e10
NOMINAL_FLOPS_PER_S = 1e11
"""A small CPU's rates. Only ratios between tasks matter: they say what share of the budget each gets."""
CANDIDATE_COST_S = 0.05
"""What a candidate costs besides its launches: compiling, packing, comparing."""
ORACLE_ELEMENTS_PER_S = 2e8
"""Weights that the float64 oracle converts and multiplies in a second."""
LAUNCHES_PER_CANDIDATE = 6
EVEN_SHARE = 0.3
"""Part of a budget that is shared evenly: making and packing weights costs a task of one token as much as others."""


def expected_cost_s(gemm: ExpertGemm, tokens: int, candidates: int) -> float:
    """Return a rough estimate of what measuring one task takes, in seconds."""
    oracle = gemm.layer.experts * gemm.n * gemm.k / ORACLE_ELEMENTS_PER_S
    return oracle + candidates * (CANDIDATE_COST_S + LAUNCHES_PER_CANDIDATE * nominal_launch_s(gemm, tokens))


def nominal_launch_s(gemm: ExpertGemm, tokens: int) -> float:
    """Return a rough estimate of the seconds of one launch."""
    layer = gemm.layer
    missed = (1 - layer.top_k / layer.global_experts) ** tokens
    active_bytes = gemm.weight_bytes() * (1 - missed)
    flops = gemm.flops(tokens * layer.top_k * layer.experts // layer.global_experts)
    return 5e-5 + max(active_bytes / NOMINAL_BYTES_PER_S, flops / NOMINAL_FLOPS_PER_S)


def expected_gains(
    tasks: Sequence[Task], times_us: Sequence[float], doubts: Sequence[float], weights: Mapping[int, float] | None
) -> tuple[float, ...]:
    """Return how much of the serving time each task's tuning may still win, up to a common factor.

    That is its share of the serving time × the doubt about its configs that is left, the standard deviation of the
    log of what is expected of them. `times_us` are launches of the default; `weights` are token counts' shares of the
    calls, without which, as in selecting, every bucket of every layer counts alike. Raises as `bucket_weights` does.
    """
    if not tasks:
        return ()
    buckets = tuple(dict.fromkeys(bucket for _, bucket in tasks))
    if weights is not None:
        share = dict(zip(buckets, bucket_weights(weights, buckets), strict=True))
        return tuple(share[bucket] * us * doubt for (_, bucket), us, doubt in zip(tasks, times_us, doubts, strict=True))
    whole: dict[tuple[ExpertLayer, Bucket], float] = defaultdict(float)
    for (gemm, bucket), us in zip(tasks, times_us, strict=True):
        whole[gemm.layer, bucket] += us
    return tuple(
        us / whole[gemm.layer, bucket] * doubt
        for (gemm, bucket), us, doubt in zip(tasks, times_us, doubts, strict=True)
    )


def time_shares(costs: Sequence[float], gains: Sequence[float]) -> tuple[float, ...]:
    """Return the part of the time that each task gets: an even one, and one in proportion to √(cost × gain).

    What a task loses by measuring too little falls with its time as gain × cost / time, as the variance of an estimate
    does; the sum over tasks is then smallest for these shares (Neyman's allocation of samples to strata whose samples
    cost unequally, Cochran, "Sampling Techniques", 5.5). Gains that are proportional to costs share by cost.
    """
    parts = [math.sqrt(cost * gain) for cost, gain in zip(costs, gains, strict=True)]
    whole = sum(parts)
    if whole <= 0:
        return (1 / len(parts),) * len(parts) if parts else ()
    return tuple(EVEN_SHARE / len(parts) + (1 - EVEN_SHARE) * part / whole for part in parts)


class Budget:
    """A deadline for the whole, from which each task gets its share of what is left."""

    def __init__(self, seconds: float | None, costs: tuple[float, ...], gains: Sequence[float] | None = None) -> None:
        """Start the clock; `seconds` None is no limit.

        `costs` are the tasks' expected costs in their order, `gains` what they may win, by default as much as they
        cost.
        """
        self._start = time.monotonic()
        self._end = math.inf if seconds is None else self._start + seconds * (1 - CHECK_SHARE)
        self._costs = costs if seconds is None else time_shares(costs, costs if gains is None else gains)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def deadline(self, task: int) -> float:
        """Return the monotonic time at which a task that starts now has to end: infinity without a limit."""
        if math.isinf(self._end):
            return math.inf
        now = time.monotonic()
        share = self._costs[task] / sum(self._costs[task:])
        return now + max(0.0, self._end - now) * share

    def fraction(self, task: int, done: float) -> float:
        """Return the part (0 to 1) of the expected work that is over, `done` of the current task being so."""
        return (sum(self._costs[:task]) + self._costs[task] * done) / sum(self._costs)

    def remaining_s(self, task: int, done: float) -> float | None:
        """Return the seconds still to be expected, `done` (0 to 1) of the current task being over; None at first."""
        fraction = self.fraction(task, done)
        if fraction <= 0:
            return None if math.isinf(self._end) else self._end - self._start
        expected = self.elapsed_s * (1 - fraction) / fraction
        return min(expected, max(0.0, self._end - time.monotonic()))
