"""Few configs start: those that the cost model and the neighbours expect most of. Then elimination, and more like them.

After each round the expectation is corrected by what ran, and configs that it now holds to be as good as the best join:
a local search, as configs that differ little have corrections in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

from tilecast.autotune.search.base import Turn, View
from tilecast.autotune.search.elimination import survivors
from tilecast.autotune.select import NOISE_FLOOR, fastest, noise
from tilecast.problem import TileConfig

LITTLE_DOUBT = 0.1
"""Below this standard deviation of the expectation, no config runs just to see."""


@dataclass(frozen=True)
class Ranked:
    """Model-ranked start, elimination, refinement.

    start: configs of the first round besides those that must run, more while little is known (`share` of the
    candidates at most). joining: how many may join in each of the next rounds. finalists: how many go on at most.
    samples: of each config in the first, second and every later round. rounds: the most rounds.
    """

    start: int = 6
    share: float = 0.25
    joining: tuple[int, ...] = (3, 2)
    finalists: tuple[int, ...] = (5, 4, 3)
    samples: tuple[int, ...] = (1, 1, 2, 2)
    rounds: int = 7
    explore: int = 1

    def turn(self, view: View) -> Turn | None:
        """Return the next round."""
        if view.round == 0:
            return Turn(configs=self._first(view), samples=self.samples[0])
        if view.round >= self.rounds:
            return None
        alive = [c for c in view.candidates if c.config in view.measured]
        most = self.finalists[min(view.round, len(self.finalists)) - 1]
        kept = [c.config for c in survivors(alive, view.timings, policy=view.policy, at_most=most)]
        joining = self._joining(view, kept)
        if not kept or (not joining and _settled(view, kept)):
            return None
        return Turn(
            configs=tuple(dict.fromkeys([*kept, *joining])),
            samples=self.samples[min(view.round, len(self.samples) - 1)],
        )

    def _first(self, view: View) -> tuple[TileConfig, ...]:
        ranked = sorted(view.drawn, key=lambda config: view.expected[config])
        most = max(1, math.ceil(self.share * len(view.candidates)))
        wanted = min(most, math.ceil(self.start * (0.5 + view.doubt / 0.25)))
        chosen = dict.fromkeys([*view.must, *view.hints, *ranked[:wanted]])
        if view.doubt > LITTLE_DOUBT:
            chosen |= dict.fromkeys(islice((c for c in view.drawn if c not in chosen), self.explore))
        return tuple(chosen)

    def _joining(self, view: View, kept: list[TileConfig]) -> list[TileConfig]:
        if view.round > len(self.joining) or not view.timings:
            return []
        leader = fastest(view.timings.values())
        bar = view.expected[leader.config] + view.doubt / 2
        fresh = [c for c in view.drawn if c not in view.measured and c not in view.failed and view.expected[c] <= bar]
        return sorted(fresh, key=lambda c: view.expected[c])[: self.joining[view.round - 1]]


def _settled(view: View, kept: list[TileConfig]) -> bool:
    """Whether more samples would decide nothing: all that is left is well known to be as fast, or slower."""
    timings = [view.timings[config] for config in kept if config in view.timings]
    best = fastest(timings)
    others = [t for t in timings if t.config != best.config]
    known = all(2 * math.hypot(t.error, best.error) <= 2 * NOISE_FLOOR for t in others)
    apart = all(t.p50_us > best.p50_us * (1 + noise(t, best)) for t in others)
    return known or apart
