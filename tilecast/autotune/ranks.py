"""How fast ranks are beside each other: one that is slower than the rest slows every layer of every token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from tilecast.evidence import Measurement

MIN_COMMON = 8
"""Configs that ranks must have in common before they are compared."""
SLOWER = 0.05
"""Less than this, and less than four standard errors, is not spoken of."""


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank whose times are `slower` (a fraction) than the median rank's, on `configs` that both measured."""

    rank: int
    slower: float
    noise: float
    configs: int

    def __str__(self) -> str:
        """Return the warning."""
        return (
            f"rank {self.rank} is {self.slower:.0%} slower than the others (noise {self.noise:.1%}, "
            f"{self.configs} configs): every token will wait for it"
        )


def slow_ranks(measurements: Iterable[Measurement]) -> list[SlowRank]:
    """Return the ranks that are slower than the median rank by more than the noise, by rank.

    Each (GEMM, tokens, config, round) that all ranks measured is one comparison: of equal work at the same time.
    """
    times: dict[tuple[object, ...], dict[int, float]] = {}
    size = 1
    for m in measurements:
        if m.status == "ok":
            size = max(size, m.world_size)
            times.setdefault((m.gemm, m.tokens, m.config, m.run, m.round, m.world_size), {})[m.rank] = m.p50_us
    whole = [by_rank for key, by_rank in times.items() if len(by_rank) == size == key[-1]]
    if size < 2 or len(whole) < MIN_COMMON:
        return []
    found = []
    for rank in range(size):
        others = [median(us for other, us in by_rank.items() if other != rank) for by_rank in whole]
        ratios = sorted(math.log(by_rank[rank] / other) for by_rank, other in zip(whole, others, strict=True))
        middle = median(ratios)
        spread = median(abs(ratio - middle) for ratio in ratios) * 1.4826
        noise = 4 * 1.2533 * spread / math.sqrt(len(ratios))
        if middle > max(noise, math.log1p(SLOWER)):
            found.append(SlowRank(rank=rank, slower=math.expm1(middle), noise=noise, configs=len(whole)))
    return found
