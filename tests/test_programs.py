"""Forked programs act as fresh ones: process, folder, environment, files, threads and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import programs
from tests.programs import run, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are forked on Linux")

REPORT = """
import json, os, signal, sys
seen = {
    "pid": os.getpid(), "folder": os.getcwd(), "path": sys.path[0], "name": __name__, "words": sys.argv[1:],
    "variables": dict(os.environ), "given": sys.stdin.read(), "files": sorted(os.listdir("/proc/self/fd")),
    "interrupted": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "processes": [os.getpgid(0) == os.getpgid(os.getppid()), os.getsid(0)],
}
import torch
(torch.ones(1 << 20) + 1).sum()
seen["threads"] = [torch.get_num_threads(), len(os.listdir("/proc/self/task"))]
print(json.dumps(seen))
sys.stderr.write("a word")
"""
ENDINGS = """
import atexit, os, signal, sys, time
atexit.register(print, "at exit")
match sys.argv[1]:
    case "error": raise ValueError("no")
    case "message": sys.exit("why")
    case "code": sys.exit(7)
    case "interrupt": os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
    case "crash": os.kill(os.getpid(), signal.SIGSEGV)
    case "wait": print("begun", flush=True); time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.py").write_text(REPORT)
    (tmp_path / "endings.py").write_text(ENDINGS)
    return tmp_path


def variables(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(programs.READ_LATE)}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def fresh(module: str, *words: str, folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=variables(TM_GEMM_MISS="error"), input=text,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_forked_program_sees_what_a_fresh_one_sees(folder: Path) -> None:
    own = fresh("report", "a", "b c", folder=folder, text="1\n2")
    forked = [
        run("report", "a", "b c", environment=variables(TM_GEMM_MISS="error"), folder=folder, text="1\n2") for _ in "ab"
    ]
    seen = [json.loads(one.stdout) for one in (own, *forked)]
    assert len({one.pop("pid") for one in (*seen, {"pid": os.getpid()})}) == 4
    # The descriptor of the listing itself is one more than there are.
    assert seen[1] == seen[2] == seen[0]
    assert seen[0]["threads"] == [1, 1] and seen[0]["variables"]["TM_GEMM_MISS"] == "error"
    assert {(one.returncode, one.stderr) for one in (own, *forked)} == {(0, "a word")}


@pytest.mark.parametrize("ending", ["error", "message", "code", "interrupt", "crash"])
def test_a_forked_program_ends_as_a_fresh_one(folder: Path, ending: str) -> None:
    own = fresh("endings", ending, folder=folder)
    forked = run("endings", ending, environment=variables(), folder=folder)
    assert (forked.returncode, forked.stdout) == (own.returncode, own.stdout)
    assert forked.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]
    assert own.returncode == {"error": 1, "message": 1, "code": 7, "interrupt": -2, "crash": -11}[ending]


def test_signals_reach_the_program_itself(folder: Path) -> None:
    killed, late = (start("endings", "wait", environment=variables(), folder=folder) for _ in "ab")
    assert killed.poll() is late.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.ended(10).returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        late.ended(0.2)
    assert late.poll() == -signal.SIGKILL


def test_what_may_be_read_at_import_gets_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(programs, "_servers", {})
    monkeypatch.setattr(programs, "_Server", lambda environment: started.append(environment) or object())
    plain = programs._server_for(variables())
    assert programs._server_for(variables(TM_GEMM_TUNE="1", RANK="1", MASTER_PORT="2")) is plain
    assert programs._server_for(variables(TRITON_CACHE_DIR="elsewhere")) is not plain
    assert [environment.get("TRITON_CACHE_DIR") for environment in started] == [None, "elsewhere"]
    assert "RANK" not in started[0]


def test_other_threads_and_gpus_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert programs._may_fork(variables()) is not torch.cuda.is_available()
    assert not programs._may_fork(variables(OMP_NUM_THREADS="2"))
    assert not programs._may_fork({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not programs._may_fork(variables())
