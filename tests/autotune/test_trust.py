"""A tuning among candidates that hang, crash and lie, and among busy neighbours: right, and on record."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.autotune.test_tuner import by_block
from tests.torch_kernel import TorchKernel
from tilecast.autotune.decide import decide
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.plan import make_plan
from tilecast.autotune.sandbox import SandboxMeasurer
from tilecast.autotune.tuner import measure_plan
from tilecast.autotune.watches import CpuContention
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.kernels.spec import Registry

REGISTRY = Registry((TorchKernel(),))


@pytest.mark.slow
def test_hanging_crashing_and_lying_candidates_cost_time_and_nothing_else() -> None:
    here = cpu_environment()
    registry = Registry((TorchKernel("zeros", "off_by_one", "hangs", "crashes"),))
    plan, store = make_plan([LAYER], [4], here), MemoryStore()
    factory = partial(DeviceMeasurer, here, registry)
    with SandboxMeasurer(factory, check_limit_s=4.0, sample_limit_s=4.0) as measurer:
        measure_plan(plan, store, registry, measurer=measurer, strategy="halving")
        assert measurer.started > 1
    found = {(m.gemm.name, m.config["variant"]): m for m in store.measurements() if m.config["variant"] != "ordered"}
    for name in ("up", "down"):
        assert found[name, "zeros"].status == found[name, "off_by_one"].status == "wrong_result"
        assert found[name, "hangs"].status == "timeout"
        assert found[name, "crashes"].status == "runtime_error" and "SIGSEGV" in found[name, "crashes"].detail
    (decision,) = decide(plan, store, registry).decisions
    assert decision.up.config["variant"] == decision.down.config["variant"] == "ordered"
    assert decision.certificate == "hardware"


class Disturbed:
    """A watch that sees a disturbance in its first `times` looks."""

    def __init__(self, times: int) -> None:
        self.times = times

    def read(self) -> None:
        return None

    def disturbed(self, start: object, end: object) -> str | None:
        self.times -= 1
        return "a neighbour was busy" if self.times >= 0 else None


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.stretch.PAUSE_S", 0.0)


@pytest.mark.usefixtures("no_pause")
def test_what_was_disturbed_is_measured_again() -> None:
    plan = make_plan([LAYER], [4], HERE)
    quiet, store = MemoryStore(), MemoryStore()
    measure_plan(plan, quiet, REGISTRY, measurer=FakeTimes(by_block), strategy="halving")
    measurer = FakeTimes(by_block)
    run = measure_plan(plan, store, REGISTRY, measurer=measurer, strategy="halving", watch=Disturbed(3))
    assert run.disturbed == 3 and measurer.batches > run.measured
    assert {m.key for m in store.measurements()} == {m.key for m in quiet.measurements()}
    assert not any(m.detail for m in store.measurements())


@pytest.mark.usefixtures("no_pause")
def test_what_stays_disturbed_is_kept_with_the_reason() -> None:
    plan, store = make_plan([LAYER], [4], HERE), MemoryStore()
    run = measure_plan(plan, store, REGISTRY, measurer=FakeTimes(by_block), strategy="quick", watch=Disturbed(10**9))
    assert {m.detail for m in store.measurements()} == {"a neighbour was busy"}
    assert {m.status for m in store.measurements()} == {"ok"}
    # Trying again is given up, however many stretches follow: 5, 2 and 1 times, and never more.
    assert run.disturbed == 8


@pytest.mark.usefixtures("no_pause")
def test_a_quiet_stretch_gives_all_tries_back() -> None:
    plan, store = make_plan([LAYER], [4], HERE), MemoryStore()
    # Three stretches stay disturbed, with 6, 3 and 2 looks; the next is quiet, and then they are disturbed for good.
    looks = iter([True] * 11 + [False])

    class Returning(Disturbed):
        def disturbed(self, start: object, end: object) -> str | None:
            return "a neighbour was busy" if next(looks, True) else None

    run = measure_plan(plan, store, REGISTRY, measurer=FakeTimes(by_block), strategy="quick", watch=Returning(0))
    assert run.disturbed == 16
    assert "" in {m.detail for m in store.measurements()}


@pytest.fixture
def busy() -> Iterator[None]:
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(2)]
    time.sleep(0.5)
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("busy", "no_pause")
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_a_real_neighbour_is_seen() -> None:
    here = cpu_environment()
    plan, store = make_plan([LAYER], [4], here), MemoryStore()
    measurer = DeviceMeasurer(here, REGISTRY)
    run = measure_plan(plan, store, REGISTRY, measurer=measurer, strategy="halving", watch=CpuContention())
    assert run.disturbed > 0
    assert any(m.detail.startswith("others used ") for m in store.measurements())
    assert decide(plan, store, REGISTRY, verify=False).decisions
