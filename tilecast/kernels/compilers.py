"""Processes that compile: started when needed, fed one build at a time, replaced when one dies."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from tilecast.canonical import Json
from tilecast.errors import DeviceError
from tilecast.settings import child_environment

MODULE = "tilecast.kernels._compile"
READY = "ready"
COMPILE_TIMEOUT_S = 600.0
"""A kernel takes about a second; one that takes this long would hold up everything behind it."""

CRASHES = (signal.SIGABRT, signal.SIGSEGV)
"""How a compiler ends that meets what it was not made for: it would again."""

Answer = tuple[int, dict[str, Any], bool]


class _Ended(Exception):
    """The process ended without an answer; `crashed` if by the compiler's own fault, not killed from outside."""

    def __init__(self, message: str, *, crashed: bool) -> None:
        super().__init__(message)
        self.crashed = crashed


class _Compiler:
    """One process, with a folder of its own that goes with it."""

    def __init__(self, folder: Path, *, ahead: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self._errors = self.folder / "errors"
        cache = self.folder / "triton"
        # The same modules as here, whatever put them on the path; -P keeps the working folder from going first.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        analysing = {} if ahead else {"TRITON_CACHE_DIR": str(cache), "TRITON_DUMP_PTXAS_LOG": "1"}
        environment = child_environment(
            {"PYTHONPATH": path, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1", **analysing},
            without=("TRITON_INTERPRET",),
        )
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(self._errors), *([] if ahead else [str(cache)])],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Raise DeviceError unless the process can compile."""
        try:
            answer = self._answer()
        except _Ended as ended:
            raise DeviceError(f"Triton cannot compile here: {ended}") from None
        if answer.strip() != READY:
            raise DeviceError(f"Triton cannot compile here: the compiling process said {answer!r:.200}")

    def compile(self, job: Json) -> dict[str, Any]:
        """Return the report's fields. Raises _Ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        late = threading.Timer(COMPILE_TIMEOUT_S, self._process.kill)
        late.daemon = True
        late.start()
        try:
            facts: dict[str, Any] = json.loads(self._answer())
            return facts
        finally:
            late.cancel()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        return line

    def _ended(self) -> _Ended:
        code = self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = f" ({lines[-1].strip()[:200]})" if lines else ""
        return _Ended(f"the compiling process {how}{said}", crashed=-code in CRASHES)

    def kill(self) -> None:
        """End the process at once; whoever waits for its answer learns of it."""
        self._process.kill()

    def end(self) -> None:
        """End the process, at once, and remove its folder."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # What is left to write for a process that is gone does not matter.
            try:
                stream.close()
            except OSError:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)


class Compilers:
    """Compiling processes behind one `run`. A context manager: leaving it ends them all."""

    def __init__(self, count: int) -> None:
        """Prepare `count` processes; they start with the first `run`."""
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="tilecast-compile-"))
        self._lock = threading.Lock()
        self._alive: set[_Compiler] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Compilers:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process, whatever it is doing, and remove all they wrote."""
        with self._lock:
            self._closed = True
            alive = tuple(self._alive)
        for compiler in alive:
            compiler.kill()
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, jobs: Sequence[Json]) -> Iterator[Answer]:
        """Yield (index, report fields, whether they would be the same again) as jobs are done, in any order.

        A job whose process dies gets a report that says so, and the next job another process. Raises DeviceError
        if a process cannot start compiling at all.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        for index in range(len(jobs)):
            waiting.put(index)
        for _ in range(self._count):
            thread = threading.Thread(target=self._serve, args=(jobs, waiting, answers), daemon=True)
            self._threads.append(thread)
            thread.start()
        for _ in jobs:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def _serve(
        self,
        jobs: Sequence[Json],
        waiting: queue.SimpleQueue[int],
        answers: queue.SimpleQueue[Answer | BaseException],
    ) -> None:
        compiler: _Compiler | None = None
        try:
            while True:
                index = waiting.get_nowait()
                compiler = compiler or self._start()
                try:
                    answers.put((index, compiler.compile(jobs[index]), True))
                except _Ended as ended:
                    self._stop(compiler)
                    compiler = None
                    answers.put((index, {"error": str(ended)}, ended.crashed))
        except queue.Empty:
            pass
        except BaseException as error:  # `run` raises it where it can be seen
            answers.put(error)
        finally:
            if compiler is not None:
                self._stop(compiler)

    def _start(self) -> _Compiler:
        with self._lock:
            if self._closed:
                raise queue.Empty
            compiler = _Compiler(self._folder)
            self._alive.add(compiler)
        try:
            compiler.wait_ready()
        except BaseException:
            self._stop(compiler)
            raise
        return compiler

    def _stop(self, compiler: _Compiler) -> None:
        with self._lock:
            self._alive.discard(compiler)
        compiler.end()


class AheadCompilers:
    """Processes that compile for launches to come, into Triton's own cache; they stay until `close`."""

    def __init__(self, count: int) -> None:
        """Prepare `count` processes; each starts when there is work for it."""
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="tilecast-ahead-"))
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Json, Future[dict[str, Any]]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._alive: set[_Compiler] = set()
        self._closed = False

    def submit(self, job: Json) -> Future[dict[str, Any]]:
        """Queue a job: a build, and the arguments of Triton's GPUTarget. The result has `error` where it failed
        or crashed the compiler.

        A result raises DeviceError if a process cannot start compiling at all.
        """
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
                return future
            self._waiting.put((job, future))
            if len(self._threads) < self._count:
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()
        return future

    def close(self) -> None:
        """End every process, whatever it is doing; what waited is cancelled."""
        with self._lock:
            self._closed = True
            alive = tuple(self._alive)
        for compiler in alive:
            compiler.kill()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        compiler: _Compiler | None = None
        while (item := self._waiting.get()) is not None:
            job, future = item
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                compiler = compiler or self._start()
                future.set_result(compiler.compile(job))
            except _Ended as ended:
                if compiler is not None:
                    self._end(compiler)
                compiler = None
                # Killed from outside says nothing about the build.
                future.set_result({"error": str(ended)} if ended.crashed else {})
            except BaseException as error:  # The future raises it where it can be seen.
                future.set_exception(error)
        if compiler is not None:
            self._end(compiler)

    def _start(self) -> _Compiler:
        with self._lock:
            if self._closed:
                raise _Ended("compiling was ended", crashed=False)
            compiler = _Compiler(self._folder, ahead=True)
            self._alive.add(compiler)
        try:
            compiler.wait_ready()
        except BaseException:
            self._end(compiler)
            raise
        return compiler

    def _end(self, compiler: _Compiler) -> None:
        with self._lock:
            self._alive.discard(compiler)
        compiler.end()
