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
from tilecast.autotune.select import pick
from tilecast.autotune.timing import NOISE_FLOOR, Timing, fastest
from tilecast.problem import TileConfig

LITTLE_DOUBT = 0.1
"""Below this standard deviation of the expectation, no config runs just to see."""
LAST_GROUP_WITHIN = 1.06
"""In the last rounds, groups whose best is farther behind are known well enough."""

SETTLED_SAMPLES = 6
"""Before so many, nothing is settled: a burst that hit two samples of one config looks like a fact."""
LITTLE_LOSS = NOISE_FLOOR
"""Part of the time that a choice may be expected to lose: no more than what counts as a difference."""


@dataclass(frozen=True)
class Ranked:
    """Model-ranked start, elimination, refinement, and a duel of the last few with the default.

    samples_each: samples to spend, for each candidate there is, and their bounds. start: the part of them that goes
    into the first round, one each. joining: how many may join in each of the next rounds. finalists: how many go on
    at most, round by round. rounds: the most rounds.
    """

    samples_each: float = 1.25
    least: int = 24
    most: int = 150
    start: float = 0.2
    joining: tuple[int, ...] = (2, 2, 2)
    finalists: tuple[int, ...] = (5, 4, 3, 2, 1)
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
    """Whether more samples would win little: what the choice of now is expected to lose against any other left."""
    timings = [view.timings[config] for config in kept if config in view.timings]
    if any(t.samples < SETTLED_SAMPLES for t in timings):
        return False
    chosen = pick(timings, view.candidates[0].config)
    return all(expected_loss(chosen, t) <= LITTLE_LOSS for t in timings if t.config != chosen.config)


def expected_loss(chosen: Timing, other: Timing) -> float:
    """Return the mean of how much slower than `other` `chosen` is, where it is, for normal errors.

    That is the "expected opportunity cost" of Chick and Inoue, "New two-stage and sequential procedures for selecting
    the best simulated system", Operations Research 49 (2001).
    """
    error = math.hypot(chosen.error, other.error)
    slower = chosen.p50_us / other.p50_us - 1
    if error == 0:
        return max(0.0, slower)
    z = slower / error
    below = 0.5 * math.erfc(-z / math.sqrt(2))
    return error * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) + z * below)
