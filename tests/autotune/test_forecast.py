"""What a tuning is expected to measure, against what it then measures."""

from __future__ import annotations

import pytest

from tests.autotune.shared import LAYER
from tilecast.autotune.calibrate import nominal
from tilecast.autotune.forecast import Rehearsal, forecast, overhead_s
from tilecast.autotune.plan import make_plan
from tilecast.autotune.rank import CostModel, ModelRanker
from tilecast.autotune.tuner import measure_plan
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.kernels import registry
from tilecast.problem import ExpertLayer

HERE = cpu_environment()
RANKER = ModelRanker(CostModel(HERE, nominal(HERE)), registry)
TOKENS = (1, 16)


@pytest.mark.parametrize("effort", ["quick", "standard", "exhaustive"])
def test_the_rehearsal_takes_the_steps_of_the_tuning(effort: str) -> None:
    plan = make_plan([LAYER], TOKENS, HERE)
    found = forecast(plan, MemoryStore(), registry, RANKER, effort)
    assert [(task.gemm, task.tokens) for task in found] == [(gemm, b.tokens) for gemm, b in plan.tasks]
    store, rehearsal = MemoryStore(), Rehearsal(RANKER, registry)
    run = measure_plan(plan, store, registry, measurer=rehearsal, strategy=effort, ranker=RANKER)
    for task, report in zip(found, run.tasks, strict=True):
        assert (task.started, task.samples, task.eligible) == (report.started, report.samples, report.candidates)
        assert task.space >= task.valid >= task.eligible >= task.started > 0
        assert task.seconds > 0


def test_more_effort_and_larger_layers_take_longer() -> None:
    def seconds(layer: ExpertLayer, effort: str) -> float:
        return sum(
            t.seconds for t in forecast(make_plan([layer], TOKENS, HERE), MemoryStore(), registry, RANKER, effort)
        )

    layer, large = (ExpertLayer(hidden=size, intermediate=size, experts=8, top_k=2) for size in (1024, 4096))
    assert seconds(layer, "quick") < seconds(layer, "standard") < seconds(layer, "exhaustive")
    assert seconds(layer, "quick") < seconds(large, "quick")


def test_nothing_to_tune_takes_no_time() -> None:
    plan = make_plan([], TOKENS, HERE)
    assert forecast(plan, MemoryStore(), registry, RANKER, "quick") == []
    assert overhead_s(plan, RANKER) == 0
    assert overhead_s(make_plan([LAYER], TOKENS, HERE), RANKER) > overhead_s(
        make_plan([LAYER], TOKENS, HERE, policy="fastest"), RANKER
    )
