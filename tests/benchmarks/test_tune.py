"""The report on tuning twice: how choices are compared, and one small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.head_to_head import head_to_head
from benchmarks.tune import Run, compared
from tests.autotune.fake_times import FakeTimes, Times
from tests.autotune.shared import HERE, LAYER
from tests.cli.conftest import SPEC
from tests.torch_kernel import TorchKernel
from tilecast.autotune.plan import make_plan
from tilecast.autotune.tuner import tune
from tilecast.cache_store.memory import MemoryStore
from tilecast.evidence import TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.settings import child_environment

ROOT = Path(__file__).parents[2]


def tuned(up_us: float, noise: float, stages: int = 2) -> dict[str, object]:
    def choice(us: float) -> dict[str, object]:
        return {"p50_us": us, "noise": noise, "config": {"kernel": "k", "params": {"stages": stages}}}

    return {"table": {"decisions": [{"layer": "E4", "tokens": 8, "up": choice(up_us), "down": choice(5.0)}]}}


def test_choices_of_two_runs_are_compared_by_time_and_noise() -> None:
    up, down = compared([tuned(10.0, 0.02), tuned(10.3, 0.01, stages=3)])
    assert (up["difference"], up["noise"], up["within_noise"]) == (pytest.approx(0.03), 0.02, False)  # type: ignore[call-overload, index]
    assert up["chosen_us"] == [10.0, 10.3] and not up["same_config"]  # type: ignore[call-overload, index]
    assert (down["difference"], down["within_noise"]) == (0.0, True)  # type: ignore[call-overload, index]
    assert compared([tuned(10.0, 0.02)])[0]["same_config"]  # type: ignore[call-overload, index]
    assert Run(forecast_s=10.0, limits="probe", real_s=12.0, tuned={}).to_json()["ratio"] == pytest.approx(1.2)


PLAN = make_plan([LAYER], [4, 16], HERE)
REGISTRY = Registry((TorchKernel(),))


def ascending(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    return 3000.0 + 5 * config.integer("row_block")


def descending(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    return 3000.0 - 5 * config.integer("row_block")


def table_of(times: Times) -> TuningTable:
    return tune(PLAN, MemoryStore(), REGISTRY, measurer=FakeTimes(times, noise=0.005), verify=False)


def test_what_two_runs_chose_differently_is_measured_side_by_side() -> None:
    tables = [table_of(ascending), table_of(descending)]
    measurer = FakeTimes(ascending, noise=0.005)
    up, up_16, down, down_16 = head_to_head(tables, measurer)
    assert [(found["gemm"], found["tokens"]) for found in (up, up_16, down, down_16)] == [
        ("up", 4), ("up", 16), ("down", 4), ("down", 16),
    ]  # fmt: skip
    assert measurer.held == [], "every GEMM that was prepared is released"
    for found in (up, up_16, down, down_16):
        first, second = found["chosen_us"]
        assert first < second and not found["within_noise"]
    # Both are as fast: nothing that was chosen differently makes a difference.
    assert all(found["within_noise"] for found in head_to_head(tables, FakeTimes(lambda *_: 3000.0, noise=0.005)))
    assert head_to_head([tables[0]] * 2, measurer) == []


@pytest.mark.long
def test_a_small_layer_is_forecast_and_tuned(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    line = ["-m", "benchmarks.tune", SPEC, "--tokens", "1", "--efforts", "quick", "--runs", "1", "--out", str(out)]
    subprocess.run(
        [sys.executable, *line], cwd=ROOT, check=True, timeout=900, env=child_environment({}), stdout=subprocess.DEVNULL
    )
    report = json.loads(out.read_text())
    (run,) = report["quick"]["runs"]
    assert (
        run["forecast_s"] > 0
        and run["limits"] in ("probe", "mixed", "nominal")
        and run["ratio"] == pytest.approx(run["real_s"] / run["forecast_s"])
    )
    assert [(c["tokens"], c["gemm"]) for c in report["quick"]["choices"]] == [(1, "up"), (1, "down")]
    assert report["environment"]["device"] and report["command"][:3] == ["python", "-m", "benchmarks.tune"]
