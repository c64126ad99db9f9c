"""What all tasks of one tuning share: where measurements are kept, who measures, and what is known so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tilecast.autotune.measure import Measurer
from tilecast.autotune.peers import Peers
from tilecast.autotune.plan import Plan
from tilecast.autotune.watches import Watch
from tilecast.evidence import Measurement
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.store import Store


class Ahead(Protocol):
    """Compiles configs while others are measured."""

    def submit(self, gemm: ExpertGemm, configs: Iterable[TileConfig]) -> None:
        """Have configs compiled, in this order."""
        ...

    def wait(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Wait until a config is; return why it cannot be, None if it can or nothing is known."""
        ...

    def code(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Return what configs have in common whose launches are one and the same; None where that is not known."""
        ...


TRIES = 5
"""How often a disturbed stretch of measurements is made again at most (`stretch`)."""
TaskKey = tuple[ExpertGemm, int]


@dataclass
class Session:
    """What all tasks of one tuning share.

    `known` holds this run's measurements of all ranks, by key; `broken` the configs that failed a class check.
    `watch` sees what else uses the device, `disturbed` counts the stretches measured again for that, `tries` is how
    often the next one may be; `ahead` compiles what is measured next. With `split`, ranks share the configs of the
    first rounds out among themselves.
    """

    plan: Plan
    store: Store
    measurer: Measurer
    peers: Peers
    run: int
    known: dict[TaskKey, dict[str, Measurement]] = field(default_factory=dict)
    broken: dict[ExpertGemm, set[TileConfig]] = field(default_factory=dict)
    made: int = 0
    watch: Watch | None = None
    ahead: Ahead | None = None
    split: bool = False
    disturbed: int = 0
    tries: int = TRIES

    def learn(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """Remember measurements of this run and return the ones that are new."""
        new = []
        for m in measurements:
            of_task = self.known.setdefault((m.gemm, m.tokens), {})
            if m.run == self.run and m.key not in of_task:
                of_task[m.key] = m
                new.append(m)
        return new

    def keep(self, measurement: Measurement) -> None:
        """Store a measurement the moment it is made."""
        self.store.add_measurements([measurement])
        self.learn([measurement])
        self.made += 1

    def exchange(self, measurements: Sequence[Measurement], stop: bool) -> bool:
        """Merge a round with the other ranks', keep what is theirs, return whether any rank stops."""
        merged, stop = self.peers.merge(measurements, stop)
        new = self.learn(merged)
        if new:
            self.store.add_measurements(new)
        return stop
