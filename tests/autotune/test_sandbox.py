from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.autotune.misbehaving import Misbehaving, behaving
from tests.cases import ODD, SMALL
from tilecast.autotune.contention import CpuWatch
from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import MeasurementTimeout, WorkerDied, failure
from tilecast.autotune.sandbox import MIN_LIMIT_S, SandboxMeasurer, expected_launch_s
from tilecast.errors import DeviceError, UsageError
from tilecast.problem import ExpertLayer, TileConfig
from tilecast.settings import child_environment

GOOD = behaving("well")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sandbox")


@pytest.fixture(scope="module")
def measurer(folder: Path) -> Iterator[SandboxMeasurer]:
    with SandboxMeasurer(partial(Misbehaving, str(folder)), check_limit_s=1.0, sample_limit_s=1.0) as made:
        made.prepare(SMALL.up)
        yield made


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def raised(measurer: SandboxMeasurer, config: TileConfig) -> Exception:
    with pytest.raises(Exception) as caught:
        measurer.check(SMALL.up, 4, config)
    return caught.value


def test_it_returns_what_the_measurer_returns(measurer: SandboxMeasurer) -> None:
    assert measurer.check(SMALL.up, 4, GOOD) == Verdict(error_ratio=0.5)
    assert measurer.sample(SMALL.up, 4, GOOD, round=2, count=3) == (420.0, 421.0, 422.0)


def test_configs_are_sampled_together_in_one_call(measurer: SandboxMeasurer) -> None:
    found = measurer.sample_together(SMALL.up, 4, [GOOD, behaving("well", 2)], round=2, count=2)
    assert found == [(420.0, 421.0), (420.0, 421.0)]
    with pytest.raises(WorkerDied, match="SIGSEGV during sample_together"):
        measurer.sample_together(SMALL.up, 4, [GOOD, behaving("segfault")], round=0, count=1)


def test_the_worker_is_another_process_with_as_many_threads(measurer: SandboxMeasurer) -> None:
    threads, pid = measurer.sample(SMALL.up, 4, behaving("threads"), round=0, count=1)
    assert threads == torch.get_num_threads()
    assert (int(pid),) == measurer.pids() != (os.getpid(),)
    # Another session would be scheduled by itself, without regard to priorities.
    assert (os.getsid(int(pid)), os.getpgid(int(pid))) == (os.getsid(0), int(pid))


def test_what_a_kernel_raises_keeps_its_name_message_and_worker(measurer: SandboxMeasurer) -> None:
    before = measurer.pids()
    wrong = raised(measurer, behaving("key"))
    assert (type(wrong).__name__, str(wrong)) == ("KeyError", "'block_m'")
    assert failure(wrong) == failure(KeyError("block_m"))
    assert failure(raised(measurer, behaving("memory")))[0] == "resource"
    assert measurer.pids() == before


def test_an_error_of_ours_stays_one(measurer: SandboxMeasurer, folder: Path) -> None:
    with pytest.raises(DeviceError, match="no room for three"):
        measurer.prepare(ExpertLayer(hidden=8, intermediate=8, experts=3, top_k=1).up)
    measurer.prepare(SMALL.up)


def test_a_warning_in_the_worker_is_logged_here(measurer: SandboxMeasurer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        measurer.check(SMALL.up, 4, behaving("log"))
    assert ("tilecast.test", logging.WARNING, "slow clock: 120 MHz") in caplog.record_tuples


@pytest.mark.parametrize(
    ("does", "status", "said"),
    [
        ("segfault", "runtime_error", "SIGSEGV during check"),
        ("oom", "resource", "SIGKILL"),
        ("exit", "runtime_error", "exit code 7 during check (the library gave up)"),
    ],
)
def test_a_crash_costs_the_worker_only(
    measurer: SandboxMeasurer, folder: Path, does: str, status: str, said: str
) -> None:
    started = measurer.started
    error = raised(measurer, behaving(does))
    assert isinstance(error, WorkerDied)
    found, detail = failure(error)
    assert (found, "\n" in detail) == (status, False)
    assert said in detail
    assert measurer.sample(SMALL.up, 4, GOOD, round=0, count=1) == (400.0,)
    assert measurer.started == started + 1
    assert log(folder)[-2:] == ["started", "prepared up"], "the fresh worker is not prepared for the GEMM"


def test_a_hang_is_ended_with_its_children(measurer: SandboxMeasurer, folder: Path) -> None:
    pids = measurer.pids()
    error = raised(measurer, behaving("hang"))
    assert isinstance(error, MeasurementTimeout)
    assert failure(error)[0] == "timeout"
    assert measurer.pids() == ()
    children = [int(line.split()[1]) for line in log(folder) if line.startswith("child")]
    assert children
    assert all(gone(pid) for pid in (*pids, *children))
    assert measurer.check(SMALL.up, 4, GOOD).status == "ok"


def test_a_lost_device_is_lost_to_the_worker_only(measurer: SandboxMeasurer) -> None:
    measurer.check(SMALL.up, 4, GOOD)
    (before,) = measurer.pids()
    assert failure(raised(measurer, behaving("lost")))[0] == "runtime_error"
    assert gone(before)
    assert measurer.restarts
    assert measurer.check(SMALL.up, 4, GOOD).status == "ok"


def test_ctrl_c_ends_both(measurer: SandboxMeasurer) -> None:
    measurer.check(SMALL.up, 4, GOOD)
    (pid,) = measurer.pids()
    # A shell starts what runs in its background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            measurer.check(SMALL.up, 4, behaving("hang"))
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(pid)


def test_a_worker_without_a_parent_ends_itself(tmp_path: Path) -> None:
    code = (
        "import sys, time, functools\n"
        "from tests.autotune.misbehaving import Misbehaving, behaving\n"
        "from tests.cases import SMALL\n"
        "from tilecast.autotune.sandbox import SandboxMeasurer\n"
        "made = SandboxMeasurer(functools.partial(Misbehaving, sys.argv[1]))\n"
        "made.prepare(SMALL.up)\n"
        "print(made.pids()[0], flush=True)\n"
        "made.check(SMALL.up, 4, behaving('hang'))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = child_environment({"PYTHONPATH": path})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    assert gone(pid)


def test_release_reaches_the_worker(measurer: SandboxMeasurer, folder: Path) -> None:
    measurer.check(SMALL.up, 4, GOOD)
    measurer.release(SMALL.up)
    assert log(folder)[-1] == "released up"
    measurer.prepare(SMALL.up)


def test_a_factory_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(UsageError, match="use a function"):
        SandboxMeasurer(lambda: Misbehaving("."))


def test_a_factory_that_fails_says_why(tmp_path: Path) -> None:
    with (
        SandboxMeasurer(partial(Misbehaving, str(tmp_path / "absent"))) as made,
        pytest.raises(Exception, match="No such file"),
    ):
        made.prepare(SMALL.up)


def test_limits_follow_what_is_expected() -> None:
    plain = SandboxMeasurer(partial(Misbehaving, "."))
    assert plain._limit_s("sample", SMALL.up, 4, 1) == MIN_LIMIT_S
    assert plain._limit_s("check", SMALL.up, 4, 1) > MIN_LIMIT_S
    told = SandboxMeasurer(partial(Misbehaving, "."), expected_s=lambda gemm, tokens: 1.0)
    assert told._limit_s("sample", SMALL.up, 4, 6) == pytest.approx(500, rel=0.01)
    assert expected_launch_s(ODD.up, 1 << 20) > expected_launch_s(ODD.up, 1) > 0


def test_the_workers_time_is_our_own(measurer: SandboxMeasurer) -> None:
    measurer.check(SMALL.up, 4, GOOD)
    alone, both = CpuWatch(), CpuWatch(pids=measurer.pids)
    first, second = alone.read(), both.read()
    assert first is not None and second is not None
    # The worker imported torch, which takes far more than the moment between the two readings.
    assert second.own_s > first.own_s + 0.2
