"""How a budget is shared out among tasks."""

from __future__ import annotations

import math

import pytest

from tests.autotune.shared import LAYER
from tilecast.autotune.budget import CHECK_SHARE, EVEN_SHARE, Budget, expected_gains, time_shares
from tilecast.errors import InputError
from tilecast.problem import Bucket


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_tasks_that_use_their_shares_end_with_the_budget(clock: list[float]) -> None:
    budget = Budget(50.0, (1.0, 2.0, 40.0, 7.0))
    for task in range(4):
        clock[0] = budget.deadline(task)
    assert clock[0] == pytest.approx(100 + 50 * (1 - CHECK_SHARE))
    assert budget.fraction(3, 1.0) == pytest.approx(1)


def test_the_cheapest_task_has_time_for_what_costs_all_tasks_alike(clock: list[float]) -> None:
    budget = Budget(100.0, (1e-9, 1.0, 9.0))
    assert budget.deadline(0) - 100 == pytest.approx(100 * (1 - CHECK_SHARE) * EVEN_SHARE / 3)


def test_time_that_one_task_leaves_goes_to_the_later_ones(clock: list[float]) -> None:
    budget = Budget(100.0, (1.0, 1.0))
    assert budget.deadline(1) == pytest.approx(100 + 100 * (1 - CHECK_SHARE))


def test_a_spent_budget_gives_no_time_and_no_budget_no_limit(clock: list[float]) -> None:
    budget, unlimited = Budget(1.0, (1.0, 1.0)), Budget(None, (1.0, 3.0))
    clock[0] += 5
    assert budget.deadline(0) == clock[0]
    assert budget.remaining_s(0, 0.5) == 0
    assert unlimited.deadline(0) == math.inf
    assert unlimited.fraction(1, 0.0) == pytest.approx(0.25)
    assert unlimited.remaining_s(1, 0.0) == pytest.approx(15)
    assert Budget(1.0, ()).elapsed_s == 0


SHORT, LONG = Bucket(above=0, tokens=1), Bucket(above=1, tokens=64)
TASKS = [(LAYER.up, SHORT), (LAYER.up, LONG), (LAYER.down, SHORT), (LAYER.down, LONG)]
TIMES = [2.0, 30.0, 1.0, 10.0]
DOUBT = [0.25] * 4


def test_a_task_may_win_its_share_of_the_serving_time_as_far_as_it_is_in_doubt() -> None:
    # 90 calls of 2 + 1 µs, and 10 of 30 + 10.
    gains = expected_gains(TASKS, TIMES, DOUBT, {1: 90, 33: 10, 64: 0})
    assert [gain / sum(gains) for gain in gains] == pytest.approx([180 / 670, 300 / 670, 90 / 670, 100 / 670])
    settled = expected_gains(TASKS, TIMES, [0.25, 0.05, 0.25, 0.25], {1: 90, 33: 10})
    assert settled[1] == pytest.approx(gains[1] / 5) and settled[0] == pytest.approx(gains[0])


def test_without_weights_every_bucket_may_win_as_much() -> None:
    up_short, up_long, down_short, down_long = expected_gains(TASKS, TIMES, DOUBT, None)
    assert up_short + down_short == pytest.approx(up_long + down_long)
    assert up_short == pytest.approx(2 * down_short) and up_long == pytest.approx(3 * down_long)


def test_weights_that_no_task_has_a_share_of_are_refused() -> None:
    with pytest.raises(InputError, match="no share"):
        expected_gains(TASKS, TIMES, DOUBT, {65: 1.0})
    assert expected_gains([], [], [], {65: 1.0}) == ()


def test_no_other_shares_lose_less_to_measuring_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.budget.EVEN_SHARE", 0.0)
    costs, gains = [1.0, 4.0, 9.0, 2.0], [5.0, 1.0, 2.0, 0.5]

    def loss(shares: list[float]) -> float:
        return sum(gain * cost / share for gain, cost, share in zip(gains, costs, shares, strict=True))

    best = list(time_shares(costs, gains))
    assert sum(best) == pytest.approx(1)
    for one in range(4):
        for other in range(4):
            moved = best.copy()
            moved[one] += 0.01
            moved[other] -= 0.01
            assert loss(best) <= loss(moved) * (1 + 1e-9)


def test_what_promises_more_gets_more_of_the_budget(clock: list[float]) -> None:
    costs = (1.0, 1.0)
    more, less = (Budget(100.0, costs, gains).deadline(0) - 100 for gains in ((9.0, 1.0), (1.0, 9.0)))
    assert more == pytest.approx(94 * (0.5 * EVEN_SHARE + 0.75 * (1 - EVEN_SHARE)))
    assert more + less == pytest.approx(94)
    assert Budget(100.0, costs, (0.0, 0.0)).deadline(0) - 100 == pytest.approx(47), "nothing to win anywhere: evenly"
