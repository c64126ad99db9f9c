"""What a search strategy is: it sees what a task's rounds have shown so far, and says who runs in the next one.

A strategy is a pure function of its view. So ranks that hold the same measurements take the same steps, a tuning that
was interrupted goes on as if it had not been, and a replay of recorded times takes the steps that measuring would.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.timing import Timing
from tilecast.problem import ExpertGemm, TileConfig


@dataclass(frozen=True, kw_only=True)
class View:
    """One task before its round `round`.

    `candidates` are all that may run, the default first; `must` those that selection cannot do without (the default
    and the anchors); `hints` the best of neighbouring tasks, best first. `expected` gives the log of each candidate's
    expected time relative to the others, from the cost model and what is known of neighbours, `doubt` the standard
    deviation of its error. `ran` are the configs of each earlier round, `timings` what is known of those that ran well,
    `failed` those that did not. `drawn` orders the candidates at random, by the seed.
    """

    gemm: ExpertGemm
    tokens: int
    policy: str
    round: int
    candidates: tuple[Candidate, ...]
    must: tuple[TileConfig, ...]
    hints: tuple[TileConfig, ...]
    expected: Mapping[TileConfig, float]
    doubt: float
    ran: tuple[Collection[TileConfig], ...]
    timings: Mapping[TileConfig, Timing]
    failed: Collection[TileConfig]
    drawn: Sequence[TileConfig]

    @property
    def measured(self) -> set[TileConfig]:
        """Every config that ran or failed so far."""
        return {config for configs in self.ran for config in configs}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Who runs in a round, in this order, and how many samples each of them takes."""

    configs: tuple[TileConfig, ...]
    samples: int


class Strategy(Protocol):
    """Decides round by round; see `View`."""

    @property
    def rounds(self) -> int:
        """The most rounds there can be."""
        ...

    def turn(self, view: View) -> Turn | None:
        """Return the next round, None when enough is known. The first round holds all of `must`."""
        ...
