"""Forks a process per request out of one that has imported what is slow to import; `tests.programs` asks for them.

A request is one message on the socket: the module, its arguments, the environment and the folder, and with it the
files that become standard input, output and error, and a pipe. The child's process id is written to that pipe at
once, and how it ended when it has. Both are numbers of eight bytes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

SLOW_TO_IMPORT = (
    "torch",
    "torch.distributed.tensor",
    "tilecast.cli.app",
    "tilecast.autotune.tuner",
    "tilecast.engine.agreement",
    "tilecast.engine.parallel",
    "transformers.models.mixtral.modeling_mixtral",
    "tilecast.engine.compare",
    "tilecast.engine.generate",
    "tilecast.engine.transformers",
)
"""What most programs under test import. Nothing here computes: threads that a region of OpenMP started stay behind."""

MAX_REQUEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """What a child is to become; `files` are descriptors of its standard input, output and error."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: tuple[int, int, int]


@dataclass(frozen=True)
class Child:
    """A child under way, and the pipe on which to say how it ended."""

    pid: int
    told: int


def say(told: int, number: int) -> None:
    # Whoever asked may have stopped listening.
    with contextlib.suppress(BrokenPipeError):
        os.write(told, number.to_bytes(8, "little", signed=True))


class Server:
    """Children by the descriptor that becomes readable when they end."""

    def __init__(self, asked: socket.socket) -> None:
        self.asked = asked
        self.ready = selectors.DefaultSelector()
        self.ready.register(asked, selectors.EVENT_READ)
        self.children: dict[int, Child] = {}

    def serve(self) -> Request | None:
        """Fork and reap until nobody can ask any more: None, with all children killed. In a child: what it is to be."""
        while True:
            for key, _ in self.ready.select():
                if key.fd != self.asked.fileno():
                    self.reap(key.fd)
                    continue
                message, files, _, _ = socket.recv_fds(self.asked, MAX_REQUEST_BYTES, 4)
                if not message:
                    return self.end()
                request = self.fork(json.loads(message), files)
                if request is not None:
                    return request

    def fork(self, asked: dict[str, Any], files: list[int]) -> Request | None:
        *standard, told = files
        # Of several threads a child has only one, and whatever the others held stays held.
        assert len(os.listdir("/proc/self/task")) == 1
        pid = os.fork()
        if pid == 0:
            for fd in (told, *self.children, *(child.told for child in self.children.values())):
                os.close(fd)
            self.ready.close()
            self.asked.close()
            return Request(**asked, files=(standard[0], standard[1], standard[2]))
        for fd in standard:
            os.close(fd)
        ended = os.pidfd_open(pid)
        self.children[ended] = Child(pid, told)
        self.ready.register(ended, selectors.EVENT_READ)
        say(told, pid)
        return None

    def reap(self, ended: int) -> None:
        child = self.children.pop(ended)
        _, status = os.waitpid(child.pid, 0)
        self.ready.unregister(ended)
        say(child.told, os.waitstatus_to_exitcode(status))
        os.close(ended)
        os.close(child.told)

    def end(self) -> None:
        for child in self.children.values():
            os.kill(child.pid, signal.SIGKILL)
        for ended in list(self.children):
            self.reap(ended)


def become(request: Request) -> None:
    """Be the process that `python -m MODULE ARGUMENTS` is in that folder and environment."""
    for number, fd in enumerate(request.files):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = request.folder
    sys.argv = ["-m", *request.arguments]
    gc.enable()
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def main() -> None:
    # Ctrl-C reaches all processes of a terminal: this one ends with whoever asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in SLOW_TO_IMPORT:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
