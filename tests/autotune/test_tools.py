"""What a tuning on this device works with, put together."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.autotune.shared import LAYER
from tilecast.autotune import tools
from tilecast.autotune.calibrate import Calibration, nominal, save_calibration
from tilecast.autotune.device_lock import device_lock
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.plan import make_plan
from tilecast.autotune.sandbox import SandboxMeasurer
from tilecast.autotune.tools import device_tools, limits_for_forecast
from tilecast.autotune.tuner import tune
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError
from tilecast.kernels import registry

HERE = cpu_environment()
PLAN = make_plan([LAYER], [3], HERE)


def test_a_tuning_in_a_process_of_its_own_decides(tmp_path: Path) -> None:
    store = MemoryStore()
    with device_tools(PLAN, registry, folder=tmp_path) as made:
        assert isinstance(made.measurer, SandboxMeasurer) and made.watch is not None and made.ahead is None
        table = tune(
            PLAN, store, registry, measurer=made.measurer, ranker=made.ranker, watch=made.watch, strategy="quick"
        )
        (worker,) = made.measurer.pids()
        assert worker != os.getpid()
    assert made.measurer.pids() == ()
    (decision,) = table.decisions
    assert decision.certificate == "hardware"
    assert {m.status for m in store.measurements()} == {"ok"}


def test_the_device_is_held_while_it_is_measured(tmp_path: Path) -> None:
    with device_tools(PLAN, registry, folder=tmp_path, sandbox=False) as made:
        assert isinstance(made.measurer, DeviceMeasurer)
        with pytest.raises(DeviceError), device_lock(HERE, timeout_s=0.1, job="another"):
            pass
    with device_lock(HERE, timeout_s=120.0, job="another"):
        pass


def test_ranks_of_one_cpu_are_not_each_others_disturbance(tmp_path: Path) -> None:
    with device_tools(PLAN, registry, folder=tmp_path, ranks=2, sandbox=False) as made:
        assert made.watch is None


def held() -> bool:
    with suppress(DeviceError), device_lock(HERE, timeout_s=0.0, job="another"):
        return False
    return True


def test_the_device_is_held_while_its_limits_are_probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []

    def probe(*_: object) -> Calibration:
        seen.append(held())
        return nominal(HERE)

    with device_tools(PLAN, registry, calibrate=probe, sandbox=False):
        pass
    monkeypatch.setattr("tilecast.autotune.calibrate.calibrate", probe)
    monkeypatch.setattr(tools, "PROBE_TIMEOUT_S", 120.0)
    limits_for_forecast(HERE, registry, folder=tmp_path)
    assert seen == [True, True]


def test_a_forecast_neither_disturbs_another_tuning_nor_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tools, "PROBE_TIMEOUT_S", 0.0)
    with device_lock(HERE, timeout_s=120.0, job="another"):
        assert limits_for_forecast(HERE, registry, folder=tmp_path).source == "nominal"
        assert "nominal limits" in caplog.text and not list(tmp_path.rglob("*.json"))
        kept = replace(nominal(HERE), source="probe", launch_us=7.0)
        save_calibration(tmp_path, HERE, kept)
        assert limits_for_forecast(HERE, registry, folder=tmp_path) == kept
