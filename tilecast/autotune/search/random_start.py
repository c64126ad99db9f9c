"""A random few start: what a ranking is worth shows against this one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilecast.autotune.search.base import Turn, View
from tilecast.autotune.search.elimination import survivors


@dataclass(frozen=True)
class RandomStart:
    """A random `share` of the candidates, then elimination by confidence."""

    share: float = 0.25
    rounds: int = 6
    samples: tuple[int, ...] = (1, 1, 2)

    def turn(self, view: View) -> Turn | None:
        """Return the next round."""
        samples = self.samples[min(view.round, len(self.samples) - 1)]
        if view.round == 0:
            count = max(1, math.ceil(self.share * len(view.candidates)))
            return Turn(configs=tuple(dict.fromkeys([*view.must, *view.drawn[:count]])), samples=samples)
        if view.round >= self.rounds:
            return None
        alive = [c for c in view.candidates if c.config in view.ran[-1]]
        kept = survivors(alive, view.timings, policy=view.policy, at_most=max(2, 6 - view.round))
        return Turn(configs=tuple(c.config for c in kept), samples=samples) if kept else None
