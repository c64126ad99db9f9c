from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.autotune.fake_nvml import FakeNvml
from tests.fake_gpus import H200, Gpus
from tilecast.autotune.contention import CpuWatch, Reading
from tilecast.autotune.watches import Blind, CpuContention, NvmlWatch, watch_for
from tilecast.environment import cpu_environment
from tilecast.kernels.gpu.target import parse_target

US = os.getpid()
OTHER = US + 1


def after(fake: FakeNvml, watch: NvmlWatch, seconds: float = 1.0, **changes: object) -> str | None:
    """What is said of a stretch of `seconds`, at whose end the GPU has changed."""
    start = watch.read()
    for name, value in changes.items():
        setattr(fake, name, value)
    end = watch.read()
    return watch.disturbed(start, replace(end, at_s=start.at_s + seconds))


def test_a_quiet_gpu_disturbs_nothing() -> None:
    fake = FakeNvml(running=(US,), used={US: 97})
    assert after(fake, NvmlWatch(fake)) is None
    assert after(fake, NvmlWatch(fake), clock_mhz=1900, reasons=0x04) is None, "the power cap is the normal state"


def test_a_clock_far_below_the_runs_highest_is_told() -> None:
    fake = FakeNvml()
    watch = NvmlWatch(fake)
    assert after(fake, watch, clock_mhz=120) == "the SM clock fell to 120 MHz, 6% of the run's highest"
    assert after(fake, watch) is not None, "the best is the run's, not the stretch's"
    assert after(fake, watch, reasons=0x01) is None, "an idle GPU lowers its clock"
    assert after(fake, watch, clock_mhz=1960, reasons=0) is None


@pytest.mark.parametrize("bit", [0x08, 0x20, 0x40, 0x80])
def test_a_slowdown_is_told_at_either_end(bit: int) -> None:
    fake = FakeNvml()
    watch = NvmlWatch(fake)
    said = after(fake, watch, reasons=bit)
    assert said is not None and said.startswith("the GPU was slowed down: ")
    assert after(fake, watch, reasons=0) == said
    assert after(fake, watch) is None


def test_a_slowdown_between_the_readings_is_told() -> None:
    fake = FakeNvml()
    watch = NvmlWatch(fake)
    assert after(fake, watch, violation_ns=300_000_000) == "its temperature held the GPU back for 30% of the time"
    assert after(fake, watch, seconds=100.0, violation_ns=600_000_000) is None
    assert after(fake, watch) is None


def test_another_process_that_computes_is_told_and_one_that_waits_is_not() -> None:
    fake = FakeNvml(running=(US, OTHER), used={US: 90})
    watch = NvmlWatch(fake)
    assert after(fake, watch) is None
    again = fake.time_us + 1
    assert after(fake, watch, used={US: 60, OTHER: 38}, time_us=again) == f"process {OTHER} used 38% of the GPU's SMs"
    assert after(fake, watch) is None, "what was told before the stretch is not of it"
    worker = NvmlWatch(FakeNvml(running=(US, OTHER), used={OTHER: 90}), pids=lambda: (OTHER,))
    assert worker.disturbed(worker.read(), worker.read()) is None


def test_in_a_container_one_of_those_that_compute_is_ours() -> None:
    fake = FakeNvml(used={1 << 30: 90})
    watch = NvmlWatch(fake)
    assert after(fake, watch, time_us=fake.time_us + 1) is None
    said = after(fake, watch, used={1 << 30: 60, 1 << 29: 30}, time_us=fake.time_us + 1)
    assert said == f"process {1 << 29} used 30% of the GPU's SMs"


def test_what_a_gpu_does_not_tell_disturbs_nothing() -> None:
    fake = FakeNvml(silent=frozenset({"clock", "reasons", "violation", "running", "utilization"}))
    assert after(fake, NvmlWatch(fake), clock_mhz=1, reasons=0xFF, used={OTHER: 99}) is None


def test_cpu_contention_is_told_with_its_share() -> None:
    watch = CpuContention(CpuWatch(cpus=frozenset({0, 1})))
    start = Reading(0.0, 0.0, 0.0)
    assert watch.disturbed(start, Reading(1.0, 1.5, 1.0)) == "others used 25% of the CPUs"
    assert watch.disturbed(start, Reading(1.0, 1.01, 1.0)) is None
    assert watch.disturbed(start, Reading(0.01, 0.02, 0.0)) is None, "too short to tell"
    assert watch.disturbed(None, start) is None


def test_the_time_of_our_other_processes_is_not_contention(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  0\ncpu0 100 0 0 0 0 0 0\n")
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "stat").write_text("77 (a b) c) S " + " ".join(["0"] * 10) + " 40 10 0 0 0")
    counted = CpuWatch(tmp_path / "stat", frozenset({0}), pids=lambda: (77, 78)).read()
    plain = CpuWatch(tmp_path / "stat", frozenset({0})).read()
    assert counted is not None and plain is not None
    assert counted.own_s - plain.own_s == pytest.approx(50 / os.sysconf("SC_CLK_TCK"), abs=0.1)


def test_every_environment_has_a_watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    h100 = parse_target("cuda:90").environment()
    assert isinstance(watch_for(cpu_environment()), CpuContention)
    assert isinstance(watch_for(parse_target("hip:gfx942").environment()), Blind)
    gpus = Gpus(monkeypatch, H200, H200)
    gpus.current = 1
    fake = FakeNvml()
    assert isinstance(watch_for(h100, nvml=fake), NvmlWatch)
    known = type("Known", (), {"uuid": "3fb0"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    watch_for(h100, nvml=fake)
    assert fake.handles == [1, "GPU-3fb0"]
    with caplog.at_level(logging.WARNING):
        assert isinstance(watch_for(h100, nvml=FakeNvml(silent=frozenset({"init"}))), Blind)
    assert "not watched: Not Supported" in caplog.text
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    blind = watch_for(h100)
    assert isinstance(blind, Blind)
    assert blind.disturbed(blind.read(), blind.read()) is None


def test_the_cpu_time_of_children_is_our_own_once_they_ended() -> None:
    watch = CpuWatch()
    before = watch.read()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"], check=True)
    after = watch.read()
    if before is None or after is None:
        pytest.skip("the system does not tell")
    assert after.own_s - before.own_s >= 0.3
