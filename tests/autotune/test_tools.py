"""What a tuning on this device works with, put together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.autotune.shared import LAYER
from tilecast.autotune.device_lock import device_lock
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.plan import make_plan
from tilecast.autotune.sandbox import SandboxMeasurer
from tilecast.autotune.tools import device_tools
from tilecast.autotune.tuner import tune
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError
from tilecast.kernels import registry

HERE = cpu_environment()
PLAN = make_plan([LAYER], [3], HERE)


def test_a_tuning_in_a_process_of_its_own_decides(tmp_path: Path) -> None:
    store = MemoryStore()
    with device_tools(PLAN, registry, folder=tmp_path) as tools:
        assert isinstance(tools.measurer, SandboxMeasurer) and tools.watch is not None and tools.ahead is None
        table = tune(
            PLAN, store, registry, measurer=tools.measurer, ranker=tools.ranker, watch=tools.watch, strategy="quick"
        )
        (worker,) = tools.measurer.pids()
        assert worker != os.getpid()
    assert tools.measurer.pids() == ()
    (decision,) = table.decisions
    assert decision.certificate == "hardware"
    assert {m.status for m in store.measurements()} == {"ok"}


def test_the_device_is_held_while_it_is_measured(tmp_path: Path) -> None:
    with device_tools(PLAN, registry, folder=tmp_path, sandbox=False) as tools:
        assert isinstance(tools.measurer, DeviceMeasurer)
        with pytest.raises(DeviceError), device_lock(HERE, timeout_s=0.1, job="another"):
            pass
    with device_lock(HERE, timeout_s=120.0, job="another"):
        pass


def test_ranks_of_one_cpu_are_not_each_others_disturbance(tmp_path: Path) -> None:
    with device_tools(PLAN, registry, folder=tmp_path, ranks=2, sandbox=False) as tools:
        assert tools.watch is None
