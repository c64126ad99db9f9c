"""A measurer over given times: a device whose truth is known, for tests of what is done with times."""

from __future__ import annotations

import random
from collections.abc import Callable

from tilecast.autotune.gate import Verdict
from tilecast.problem import ExpertGemm, TileConfig

Times = Callable[[ExpertGemm, int, TileConfig], float]


class FakeTimes:
    """Times of `times(gemm, tokens, config)` µs with relative Gaussian noise; every (round, config) its own draw.

    `on_sample` is called before each batch of samples with the number of batches so far; it may raise.
    """

    def __init__(
        self,
        times: Times,
        *,
        noise: float = 0.0,
        seed: int = 0,
        verdicts: dict[TileConfig, Verdict] | None = None,
        on_sample: Callable[[int], None] | None = None,
    ) -> None:
        self.times = times
        self.noise = noise
        self.seed = seed
        self.verdicts = verdicts or {}
        self.on_sample = on_sample
        self.batches = 0
        self.checks = 0
        self.log: list[tuple[str, int, TileConfig, int]] = []
        self.held: list[str] = []

    def prepare(self, gemm: ExpertGemm) -> None:
        self.held.append(gemm.name)

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        self.checks += 1
        return self.verdicts.get(config, Verdict(error_ratio=0.5))

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        if self.on_sample is not None:
            self.on_sample(self.batches)
        self.batches += 1
        self.log.append((gemm.name, tokens, config, round))
        generator = random.Random(f"{self.seed} {gemm.name} {tokens} {config.label} {round}")
        true_us = self.times(gemm, tokens, config)
        return tuple(true_us * max(0.1, 1 + self.noise * generator.gauss(0, 1)) for _ in range(count))

    def release(self, gemm: ExpertGemm) -> None:
        self.held.remove(gemm.name)
