"""Who goes on after a round: those that may still be the best, and those that selection needs whatever they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.select import Group, group_of
from tilecast.autotune.timing import Timing
from tilecast.problem import TileConfig

GROUP_WITHIN = 1.5
"""The best config of a group and order goes on within this factor: one group must serve all buckets."""
CONFIDENCE = 2.0
"""Standard errors of a comparison that a config may be behind and still be the best."""


def survivors(
    alive: Sequence[Candidate],
    timings: Mapping[TileConfig, Timing],
    *,
    policy: str,
    within: float | None = None,
    at_most: int | None = None,
    group_within: float = GROUP_WITHIN,
) -> list[Candidate]:
    """Return who goes on, in the order given: who may be the best, at most `at_most` of them.

    Who may be is told by the comparison's standard error, or by the factor `within`. That holds for each order of the
    intermediate by itself, if its best is not far behind: the layer's other GEMM may be much faster in that order.
    The default goes on as long as it runs at all; so does each group's best in each order within `group_within`.
    """
    timed = sorted((c for c in alive if c.config in timings), key=lambda c: timings[c.config].p50_us)
    if not timed:
        return []
    best = timings[timed[0].config].p50_us
    kept: set[TileConfig] = set()
    for order in sorted({c.order for c in timed}):
        of_order = [c for c in timed if c.order == order]
        leader = timings[of_order[0].config]
        if leader.p50_us > best * group_within:
            continue
        near = [c for c in of_order if _may_be_best(timings[c.config], leader, within)]
        kept |= {c.config for c in near[:at_most]}
    leaders: dict[tuple[Group, str], Candidate] = {}
    for c in timed:
        if (group := group_of(c, policy)) is not None:
            leaders.setdefault((group, c.order), c)
    kept |= {c.config for c in leaders.values() if timings[c.config].p50_us <= best * group_within}
    kept |= {c.config for c in timed if c.is_default}
    return [c for c in alive if c.config in kept]


def _may_be_best(timing: Timing, leader: Timing, within: float | None) -> bool:
    if within is not None:
        return timing.p50_us <= leader.p50_us * within
    error = math.hypot(timing.error, leader.error)
    return timing.p50_us <= leader.p50_us * (1 + CONFIDENCE * error)
