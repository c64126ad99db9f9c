from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from tests.fake_gpus import H200, Gpus
from tilecast.autotune.device_lock import device_lock, device_name, job_name, runtime_folder
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError, UsageError
from tilecast.kernels.gpu.target import parse_target
from tilecast.settings import Launcher, child_environment

HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from tilecast.autotune.device_lock import device_lock\n"
    "with device_lock(sys.argv[2], folder=Path(sys.argv[1]), timeout_s=0.3):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)
JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@contextmanager
def process(folder: Path, device: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = child_environment({"PYTHONPATH": path, **variables})
    made = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), device], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def said(made: subprocess.Popen[str]) -> str:
    assert made.stdout is not None
    return made.stdout.readline().strip()


def taken(folder: Path, job: str = "another", device: str = "cpu") -> bool:
    with suppress(DeviceError), device_lock(device, folder=folder, job=job, timeout_s=0):
        return False
    return True


def test_two_jobs_never_hold_a_device_at_once(tmp_path: Path) -> None:
    with device_lock("cpu", folder=tmp_path, job="one"):
        assert taken(tmp_path)
        assert not taken(tmp_path, device="gpu-1"), "another device is free"
    assert not taken(tmp_path)


def test_ranks_of_a_job_hold_a_device_together_until_the_last_lets_go(tmp_path: Path) -> None:
    with device_lock("cpu", folder=tmp_path, job="one"):
        with device_lock("cpu", folder=tmp_path, job="one", timeout_s=0):
            assert taken(tmp_path)
        assert taken(tmp_path)
    assert not taken(tmp_path)


def test_processes_of_one_launcher_share_and_others_wait_until_they_die(tmp_path: Path) -> None:
    with process(tmp_path, "cpu", **JOB) as first, process(tmp_path, "cpu", **JOB) as second:
        assert (said(first), said(second)) == ("held", "held")
        assert taken(tmp_path)
        with process(tmp_path, "cpu", **{**JOB, "MASTER_PORT": "29512"}) as third:
            _, errors = third.communicate(timeout=60)
        assert f"another tuning, process {min(first.pid, second.pid)}" in errors or str(second.pid) in errors
        first.kill()
        first.wait()
        assert taken(tmp_path), "the second rank still holds it"
        second.kill()
        second.wait()
        assert not taken(tmp_path)


def test_waiting_is_told_once_and_ends_when_the_device_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()

    def hold() -> None:
        with device_lock("cpu", folder=tmp_path, job="one"):
            started.set()
            free.wait(10)

    started = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    started.wait(10)
    timer = threading.Timer(0.7, free.set)
    timer.start()
    with caplog.at_level(logging.WARNING), device_lock("cpu", folder=tmp_path, job="two"):
        assert free.is_set()
    thread.join()
    assert [r.getMessage() for r in caplog.records] == [f"waiting for another tuning on cpu, process {os.getpid()}"]


def test_a_timeout_is_one_line_that_names_the_holder(tmp_path: Path) -> None:
    with device_lock("gpu-7", folder=tmp_path, job="one"):
        start = time.monotonic()
        with (
            pytest.raises(DeviceError, match=rf"process {os.getpid()}, has used gpu-7 for the 0.1 s") as caught,
            device_lock("gpu-7", folder=tmp_path, job="two", timeout_s=0.1),
        ):
            pytest.fail("the device is held by two")
        assert time.monotonic() - start >= 0.1
    assert "\n" not in str(caught.value)


def test_a_note_that_is_damaged_lets_nobody_in(tmp_path: Path) -> None:
    with device_lock("cpu", folder=tmp_path, job="one"):
        (tmp_path / "cpu.lock").write_bytes(b"\xff{")
        assert taken(tmp_path, job="one")


def test_without_a_folder_to_write_tuning_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), device_lock("cpu", folder=tmp_path / "file"):
        pass
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("cannot lock cpu (")


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    assert runtime_folder(tmp_path) == tmp_path / f"tilecast-{os.getuid()}"
    assert runtime_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir()
    runtime_folder(tmp_path).rmdir()
    (tmp_path / f"tilecast-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="not a folder of this user's"):
        runtime_folder(tmp_path)


def test_containers_name_the_folder_they_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILECAST_LOCK_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / f"tilecast-{os.getuid()}"
    with (
        device_lock("cpu"),
        pytest.raises(DeviceError, match="another tuning"),
        device_lock("cpu", job="b", timeout_s=0),
    ):
        pass
    monkeypatch.setenv("TILECAST_LOCK_DIR", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"TILECAST_LOCK_DIR is .*missing', expected a folder"), device_lock("cpu"):
        pass


def test_devices_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = parse_target("cuda:90").environment()
    gpus = Gpus(monkeypatch, H200, H200)
    numbered = set()
    for gpus.current in (0, 1):
        numbered.add(device_name(gpu))
    assert len({device_name(cpu_environment()), *numbered}) == 3
    known = type("Known", (), {"uuid": "3fb0-../1"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    assert device_name(gpu) == "gpu-3fb0-.._1"


def test_ranks_of_a_job_have_one_name_and_processes_without_a_launcher_their_own() -> None:
    def launcher(rank: int, port: int) -> Launcher:
        return Launcher(rank=rank, world_size=2, local_rank=rank, master_addr="a", master_port=port)

    assert job_name(launcher(0, 1)) == job_name(launcher(1, 1)) != job_name(launcher(0, 2))
    assert job_name() == job_name()
    assert str(os.getpid()) in job_name()
