"""Few configs start: those that the cost model and the neighbours expect most of. Then elimination, and more like them.

After each round the expectation is corrected by what ran, and configs that it now holds to be as good as the best join:
a local search, as configs that differ little have corrections in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

from tilecast.autotune.search.base import Turn, View
from tilecast.autotune.search.elimination import GROUP_WITHIN, survivors
from tilecast.autotune.timing import NOISE_FLOOR, fastest, noise
from tilecast.problem import TileConfig

LITTLE_DOUBT = 0.1
"""Below this standard deviation of the expectation, no config runs just to see."""
LAST_GROUP_WITHIN = 1.06
"""In the last rounds, groups whose best is farther behind are known well enough."""


SETTLED_SAMPLES = 6
"""Before so many, nothing is settled: a burst that hit two samples of one config looks like a fact."""


@dataclass(frozen=True)
class Ranked:
    """Model-ranked start, elimination, refinement, and a duel of the last few with the default.

    samples_each: samples to spend, for each candidate there is, and their bounds. start: the part of them that goes
    into the first round, one each. joining: how many may join in each of the next rounds. finalists: how many go on
    at most, round by round. rounds: the most rounds.
    """

    samples_each: float = 1.15
    least: int = 24
    most: int = 150
    start: float = 0.2
    joining: tuple[int, ...] = (2, 2, 2)
    finalists: tuple[int, ...] = (4, 3, 2, 2)
    rounds: int = 16
    explore: int = 1

    def turn(self, view: View) -> Turn | None:
        """Return the next round."""
        budget = max(self.least, min(self.most, math.ceil(self.samples_each * len(view.candidates))))
        if view.round == 0:
            return Turn(configs=self._first(view, budget), samples=1)
        spent = sum(timing.samples for timing in view.timings.values())
        if view.round >= self.rounds or spent >= budget:
            return None
        measured = view.measured
        alive = [c for c in view.candidates if c.config in measured]
        last = view.round >= len(self.finalists)
        few = self.finalists[min(view.round, len(self.finalists)) - 1]
        within = LAST_GROUP_WITHIN if last else GROUP_WITHIN
        timings, policy = view.timings, view.policy
        kept = [c.config for c in survivors(alive, timings, policy=policy, at_most=few, group_within=within)]
        joining = self._joining(view)
        if not kept or (not joining and _settled(view, kept)):
            return None
        configs = tuple(dict.fromkeys([*kept, *joining]))
        return Turn(configs=configs, samples=1 if not last else max(1, min(3, (budget - spent) // len(configs))))

    def _first(self, view: View, budget: int) -> tuple[TileConfig, ...]:
        ranked = sorted(view.drawn, key=lambda config: view.expected[config])
        chosen = dict.fromkeys([*view.must, *view.hints])
        wanted = max(len(chosen) + 3, round(self.start * budget))
        # Where much is in doubt more of the budget goes into seeing more configs once.
        wanted = round(wanted * (1 + min(1.0, view.doubt / 0.25)) / 1.5)
        chosen |= dict.fromkeys(islice((c for c in ranked if c not in chosen), max(0, wanted - len(chosen))))
        if view.doubt > LITTLE_DOUBT:
            chosen |= dict.fromkeys(islice((c for c in view.drawn if c not in chosen), self.explore))
        return tuple(chosen)

    def _joining(self, view: View) -> list[TileConfig]:
        if view.round > len(self.joining) or not view.timings:
            return []
        leader = fastest(view.timings.values())
        bar = view.expected[leader.config] + view.doubt / 2
        measured = view.measured
        fresh = [c for c in view.drawn if c not in measured and c not in view.failed and view.expected[c] <= bar]
        return sorted(fresh, key=lambda c: view.expected[c])[: self.joining[view.round - 1]]


def _settled(view: View, kept: list[TileConfig]) -> bool:
    """Whether more samples would decide nothing: all that is left is well known to be as fast, or slower."""
    timings = [view.timings[config] for config in kept if config in view.timings]
    best = fastest(timings)
    others = [t for t in timings if t.config != best.config]
    if any(t.samples < SETTLED_SAMPLES for t in timings):
        return False
    known = all(2 * math.hypot(t.error, best.error) <= 2 * NOISE_FLOOR for t in others)
    apart = all(t.p50_us > best.p50_us * (1 + noise(t, best)) for t in others)
    return known or apart
