"""Naming ranks that are slower than the others."""

from __future__ import annotations

import random

from tests.autotune.shared import measured
from tilecast.autotune.ranks import slow_ranks
from tilecast.evidence import Measurement
from tilecast.problem import TileConfig


def as_ranks(factors: list[float], *, configs: int = 20, noise: float = 0.01, seed: int = 0) -> list[Measurement]:
    rng = random.Random(seed)
    return [
        measured(
            TileConfig("fake.kernel", {"block": c}), 100.0 * (1 + c) * factor * (1 + noise * rng.gauss(0, 1)),
            rank=rank, world_size=len(factors), round=c % 3,
        )
        for c in range(configs)
        for rank, factor in enumerate(factors)
    ]  # fmt: skip


def test_a_slow_rank_is_named_with_its_figure() -> None:
    (slow,) = slow_ranks(as_ranks([1.0, 1.0, 1.2, 1.01]))
    assert slow.rank == 2 and abs(slow.slower - 0.2) < 0.02 and slow.configs == 20
    assert str(slow).startswith("rank 2 is 20% slower than the others")


def test_equal_ranks_and_noise_are_not() -> None:
    for seed in range(30):
        assert slow_ranks(as_ranks([1.0, 1.0, 1.0], noise=0.2, seed=seed)) == []
    assert slow_ranks(as_ranks([1.0, 1.03])) == []


def test_ranks_with_little_in_common_are_not_compared() -> None:
    assert slow_ranks(as_ranks([1.0, 3.0], configs=4)) == []
    halves = [m for m in as_ranks([1.0, 3.0]) if m.config.integer("block") % 2 == m.rank]
    assert slow_ranks(halves) == []
    assert slow_ranks(as_ranks([1.0])) == [] and slow_ranks([]) == []
