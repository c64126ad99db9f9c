"""The report on the cost model: the correlation by hand, and a sweep whose order is known."""

import pytest

from benchmarks.ranking import judge, ranks, spearman, table
from tests.autotune.shared import HERE, LAYER
from tilecast.autotune.calibrate import nominal
from tilecast.autotune.rank import CostModel
from tilecast.autotune.replay import Recorded, Sweep
from tilecast.errors import InputError
from tilecast.kernels.spec import Registry
from tilecast.problem import TileConfig


def test_ranks_share_ties() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 Σd² / (n (n² - 1)) without ties.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(InputError):
        spearman([1, 2], [1])


def test_a_model_that_is_wrong_about_the_first_finds_the_best_among_four(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [TileConfig("k", {"n": n}) for n in range(5)]
    measured = dict(zip(configs, (12.0, 10.0, 15.0, 20.0, 30.0), strict=True))
    sweep = Sweep(
        environment=HERE, gemm=LAYER.up, tokens=4,
        recorded=(
            *(Recorded(config=config, samples_us=(time,)) for config, time in measured.items()),
            Recorded(config=TileConfig("k", {"n": 9}), status="runtime_error"),
        ),
    )  # fmt: skip
    model = CostModel(HERE, nominal(HERE))
    predicted = dict(zip(configs, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    monkeypatch.setattr(model, "rank", lambda gemm, tokens, given, registry, routing: {c: predicted[c] for c in given})
    found = judge(sweep, model, Registry())
    assert found.spearman == pytest.approx(0.9)
    assert found.regret == pytest.approx({1: 0.2, 4: 0.0, 8: 0.0})
    assert found.ratio == pytest.approx(0.2)
    text = table([found], {"x": model.calibration})
    assert "| 5 | 0.90 | +20.0% | +0.0% | +0.0% | 0.20 |" in text
    assert "1 of 1 sweeps; calibration: nominal" in text
