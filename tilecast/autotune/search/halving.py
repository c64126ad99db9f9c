"""All candidates start; after each round the slow half of those that are measurably slower leaves."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.autotune.search.base import Turn, View
from tilecast.autotune.search.elimination import survivors

SAMPLES = (1, 2, 3)
"""Samples per config in round 0, 1 and every later one."""
KEEP_WITHIN = (1.5, 1.2)
"""After round 0 and 1, configs within this factor of the best go on."""
KEEP_BEST = 6
"""From round 2 on, at most this many go on, besides the default and the groups' best."""


@dataclass(frozen=True)
class Halving:
    """Successive halving from every candidate."""

    rounds: int = 7

    def turn(self, view: View) -> Turn | None:
        """Return the next round."""
        if view.round == 0:
            order = dict.fromkeys([*view.must, *view.hints, *view.drawn])
            return Turn(configs=tuple(order), samples=SAMPLES[0])
        if view.round >= self.rounds:
            return None
        alive = [c for c in view.candidates if c.config in view.ran[-1]]
        last = view.round - 1
        within = KEEP_WITHIN[last] if last < len(KEEP_WITHIN) else None
        most = None if last == 0 else KEEP_BEST
        kept = survivors(alive, view.timings, policy=view.policy, within=within or 10.0, at_most=most)
        samples = SAMPLES[min(view.round, len(SAMPLES) - 1)]
        return Turn(configs=tuple(c.config for c in kept), samples=samples) if kept else None
