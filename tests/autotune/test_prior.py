"""What is expected of configs: the model, corrected by what neighbouring tasks have shown."""

from __future__ import annotations

import math

import pytest

from tilecast.autotune.prior import DOUBT_OF_MODEL, Neighbour, expect
from tilecast.problem import TileConfig


def config(block: int, stages: int = 2, kernel: str = "fake.kernel") -> TileConfig:
    return TileConfig(kernel, {"block": block, "stages": stages})


BLOCKS = [config(block, stages) for block in (16, 32, 64, 128) for stages in (2, 4)]


def order(found: dict[TileConfig, float]) -> list[TileConfig]:
    return sorted(found, key=lambda c: found[c])


def test_without_neighbours_the_model_decides_and_is_doubted() -> None:
    predicted = {c: 100.0 / c.integer("block") for c in BLOCKS}
    found = expect(BLOCKS, predicted, [])
    assert found.doubt == DOUBT_OF_MODEL
    assert {c.integer("block") for c in order(found.log_time)[:2]} == {128}


def test_configs_that_the_model_does_not_know_stand_in_the_middle() -> None:
    other = config(16, kernel="fake.unknown")
    predicted = {c: float(c.integer("block")) for c in BLOCKS}
    found = expect([*BLOCKS, other], predicted, []).log_time
    assert min(found[c] for c in BLOCKS) < found[other] < max(found[c] for c in BLOCKS)
    assert set(expect(BLOCKS, {}, []).log_time.values()) == {0.0}


def test_neighbours_correct_the_model_and_configs_alike_follow() -> None:
    """The model says blocks do not matter; a neighbour shows 64 to be twice as fast, at two stages only."""
    predicted = dict.fromkeys(BLOCKS, 100.0)
    seen = {c: 50.0 if c.integer("block") == 64 else 100.0 for c in BLOCKS if c.integer("stages") == 2}
    found = expect(BLOCKS, predicted, [Neighbour(times=seen, predicted=predicted, weight=1.0)])
    assert [c.integer("block") for c in order(found.log_time)[:2]] == [64, 64]
    assert found.log_time[config(64, 2)] < found.log_time[config(64, 4)] < found.log_time[config(16, 4)]
    assert found.doubt < DOUBT_OF_MODEL


def test_only_comparisons_count_not_how_long_a_neighbour_takes() -> None:
    predicted = {c: float(c.integer("block")) for c in BLOCKS}
    slow = {c: 1e6 * predicted[c] for c in BLOCKS}
    found = expect(BLOCKS, predicted, [Neighbour(times=slow, predicted=predicted, weight=1.0)])
    plain = expect(BLOCKS, predicted, [])
    for c in BLOCKS:
        assert found.log_time[c] == pytest.approx(plain.log_time[c], abs=1e-9)


def test_a_far_neighbour_says_less() -> None:
    predicted = dict.fromkeys(BLOCKS, 100.0)
    seen = {c: 30.0 if c == BLOCKS[0] else 100.0 for c in BLOCKS}
    near, far = (
        expect(BLOCKS, predicted, [Neighbour(times=seen, predicted=predicted, weight=w)]).log_time[BLOCKS[0]]
        for w in (1.0, 0.05)
    )
    assert near < far < math.log(100.0)


def test_another_kernel_learns_nothing() -> None:
    other = config(16, kernel="fake.other")
    seen = {c: 50.0 + i for i, c in enumerate(BLOCKS)}
    found = expect([other], {other: 7.0}, [Neighbour(times=seen, predicted={}, weight=1.0)])
    assert found.log_time[other] == pytest.approx(math.log(7.0))
