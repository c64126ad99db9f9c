"""Runs modules as programs in processes of their own, forked where possible from one that has imported torch.

A fresh Python takes three seconds of CPU time to import torch and eight to import a transformers model, most of what
many programs under test take at all. A forked child has its own process id, folder, environment and standard files,
and ends as a fresh process does. It differs in that modules are there that it did not import, and in that sets have
the same order in all children of a server. So whatever is said of imports and of starting, and commands over ranks as
a user types them, are tested in fresh processes, with `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).parents[1]
START_S = 120.0
READ_LATE = ("TM_GEMM_", "TILECAST_", "MASTER_", "TORCHELASTIC_", "PYTEST_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables whose names start so are read when they are needed. Any other may be read by what a server imports: it
forks only children that have the same value there."""


class _Server:
    """The process that forks, for one set of those variables; it ends with this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the server
        with answering:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(answering.fileno())], pass_fds=(answering.fileno(),),
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
            )  # fmt: skip
        atexit.register(self.close)

    def ask(self, request: dict[str, object], files: tuple[int, ...]) -> None:
        socket.send_fds(self._asking, [json.dumps(request).encode()], files)

    def ended(self) -> str:
        code = self._process.wait(10)
        self._errors.seek(0)
        return f"the server that forks programs ended with {code}: {self._errors.read()[-2000:]}"

    def close(self) -> None:
        self._asking.close()
        self._process.wait(10)
        self._errors.close()


class _Forked:
    """A child of a server, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, server: _Server, request: dict[str, object], files: tuple[int, ...]) -> None:
        self._server = server
        self._heard, told = os.pipe()
        try:
            server.ask(request, (*files, told))
        finally:
            os.close(told)
        self._code: int | None = None
        self.pid = self._number(START_S)

    def _number(self, timeout: float | None) -> int:
        if not select.select([self._heard], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
        told = os.read(self._heard, 8)
        if len(told) < 8:
            raise ChildProcessError(self._server.ended())
        return int.from_bytes(told, "little", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = self._number(timeout)
            os.close(self._heard)
        return self._code

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Program:
    """A program under way, or ended. What it writes waits in files, so it is never held up by who does not read."""

    def __init__(self, process: _Forked | subprocess.Popen[str], out: IO[str], err: IO[str]) -> None:
        self._process, self._out, self._err = process, out, err
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return how it ended, a signal as a negative number; None as long as it runs."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait and return how it ended and what it wrote; kill it and raise TimeoutExpired where it takes too long."""
        with self._out, self._err:
            try:
                code = self._process.wait(timeout)
            finally:
                self.send_signal(signal.SIGKILL)
                self._process.wait(timeout)
            self._out.seek(0)
            self._err.seek(0)
            return subprocess.CompletedProcess([], code, self._out.read(), self._err.read())


_servers: dict[frozenset[tuple[str, str]], _Server] = {}
_lock = threading.Lock()


def _server_for(environment: Mapping[str, str]) -> _Server:
    fixed = {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}
    with _lock:
        key = frozenset(fixed.items())
        if key not in _servers:
            _servers[key] = _Server(fixed)
        return _servers[key]


def _may_fork(environment: Mapping[str, str]) -> bool:
    # More threads are started by some libraries as they are imported, and a process that saw a GPU cannot be forked.
    return sys.platform == "linux" and environment.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available()


def start(
    module: str, *arguments: object, environment: Mapping[str, str], folder: Path = ROOT, text: str = ""
) -> Program:
    """Start `python -m MODULE ARGUMENTS` in `folder` with exactly this environment and `text` as standard input."""
    out = tempfile.TemporaryFile("w+", errors="backslashreplace")  # noqa: SIM115  # read and closed when it has ended
    err = tempfile.TemporaryFile("w+", errors="backslashreplace")  # noqa: SIM115  # as above
    words = list(map(str, arguments))
    with tempfile.TemporaryFile("w+") as given:
        given.write(text)
        given.seek(0)
        if not _may_fork(environment):
            return Program(
                subprocess.Popen(
                    [sys.executable, "-m", module, *words], cwd=folder, env=dict(environment), text=True,
                    stdin=given, stdout=out, stderr=err,
                ), out, err,
            )  # fmt: skip
        request = {"module": module, "arguments": words, "environment": dict(environment), "folder": str(folder)}
        files = (given.fileno(), out.fileno(), err.fileno())
        return Program(_Forked(_server_for(environment), request, files), out, err)


def run(
    module: str,
    *arguments: object,
    environment: Mapping[str, str],
    folder: Path = ROOT,
    text: str = "",
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` to its end; see `start`."""
    return start(module, *arguments, environment=environment, folder=folder, text=text).ended(timeout)
