"""How a budget is shared out among tasks."""

from __future__ import annotations

import math

import pytest

from tilecast.autotune.budget import CHECK_SHARE, EVEN_SHARE, Budget


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
