"""Every candidate in every round: what others do, and what the cheaper strategies are judged by."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.autotune.search.base import Turn, View


@dataclass(frozen=True)
class Exhaustive:
    """`rounds` rounds of `samples` samples of every candidate that runs."""

    rounds: int = 10
    samples: int = 2

    def turn(self, view: View) -> Turn | None:
        """Return the next round."""
        if view.round >= self.rounds:
            return None
        order = dict.fromkeys([*view.must, *view.hints, *view.drawn])
        configs = tuple(config for config in order if config not in view.failed)
        return Turn(configs=configs, samples=self.samples) if configs else None
