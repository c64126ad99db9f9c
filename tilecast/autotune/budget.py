"""How the time that a user grants is shared out among tasks."""

from __future__ import annotations

import math
import time

from tilecast.problem import ExpertGemm

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
    layer = gemm.layer
    missed = (1 - layer.top_k / layer.global_experts) ** tokens
    active_bytes = gemm.weight_bytes() * (1 - missed)
    flops = gemm.flops(tokens * layer.top_k * layer.experts // layer.global_experts)
    launch = 5e-5 + max(active_bytes / NOMINAL_BYTES_PER_S, flops / NOMINAL_FLOPS_PER_S)
    oracle = layer.experts * gemm.n * gemm.k / ORACLE_ELEMENTS_PER_S
    return oracle + candidates * (CANDIDATE_COST_S + LAUNCHES_PER_CANDIDATE * launch)


class Budget:
    """A deadline for the whole, from which each task gets its share of what is left."""

    def __init__(self, seconds: float | None, costs: tuple[float, ...]) -> None:
        """Start the clock. `costs` are the tasks' expected costs in their order; `seconds` None is no limit."""
        self._start = time.monotonic()
        self._end = math.inf if seconds is None else self._start + seconds * (1 - CHECK_SHARE)
        even = 0.0 if seconds is None or not costs else EVEN_SHARE / (1 - EVEN_SHARE) * sum(costs) / len(costs)
        self._costs = tuple(cost + even for cost in costs)

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
