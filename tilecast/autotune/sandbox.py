"""Measuring in a process of its own: a candidate that hangs or crashes costs that process, never the tuning.

The worker is started once and runs the real measurer; it is replaced only when it had to be killed or died. It is
fed one call at a time over a pair of sockets, and gets as many threads as this process has: as one of the two always
waits for the other, they never compete. Closing its standard input ends it, so it does not outlive this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, cast

import torch

from tilecast import errors
from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import MeasurementTimeout, Measurer, WorkerDied, device_lost
from tilecast.errors import DeviceError, UsageError
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.settings import child_environment

logger = logging.getLogger(__name__)

MODULE = "tilecast.autotune._worker"
MIN_LIMIT_S = 20.0
LIMIT_FACTOR = 50.0
"""A call may take this many times what is expected of it, and at least the seconds above."""
COMPILE_S = 40.0
"""The gate launches a config for the first time, which compiles it."""
START_LIMIT_S = 300.0
"""A worker imports and opens the device, on a machine that may be busy with other ranks' workers."""
END_S = 10.0
SLOW_FLOPS, SLOW_BYTES = 1e11, 4e9
"""Per second, of a device that is slow: what is expected where nobody says better, before the factor."""
LAUNCHES = {"check": 8, "sample": 4}
"""Launches that a call makes besides the ones asked for: the gate's variants, warm-up and calibration."""


class RemoteError(Exception):
    """What a kernel raised in the worker, under the name it had there."""


class SandboxMeasurer:
    """A `Measurer` that runs another in a worker process. A context manager: leaving it ends the worker.

    What the other raises is raised here under the same name and with the same message. A call that takes too long
    raises MeasurementTimeout, a worker that ends by itself WorkerDied; either way the next call gets a fresh worker,
    prepared for the same GEMM, and so it does after an error that leaves the device unusable to the worker.
    """

    restarts = True
    """A lost device is lost to the worker only: the tuning need not end."""

    def __init__(
        self,
        factory: Callable[[], Measurer],
        *,
        check_limit_s: float | None = None,
        sample_limit_s: float | None = None,
        start_limit_s: float = START_LIMIT_S,
        expected_s: Callable[[ExpertGemm, int], float] | None = None,
    ) -> None:
        """Measure with what `factory`, a module's function or a partial of one, returns in the worker.

        Limits are per call, by default `LIMIT_FACTOR` times what is expected; `expected_s(gemm, tokens)` says how
        long one launch takes where a model knows. Raises UsageError for a factory that cannot be sent.
        """
        try:
            self._factory = pickle.dumps(factory)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(f"the measurer's factory cannot be sent to a process: {error}; use a function") from error
        self._limits = {"check": check_limit_s, "sample": sample_limit_s}
        self._start_limit_s = start_limit_s
        self._expected_s = expected_s or expected_launch_s
        self._worker: _Worker | None = None
        self._gemm: ExpertGemm | None = None
        self.started = 0

    def __enter__(self) -> SandboxMeasurer:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker."""
        self.close()

    def close(self) -> None:
        """End the worker; the next call would start another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def pids(self) -> tuple[int, ...]:
        """Return the worker's process id, for whoever counts this tuning's own use of the device; () if none runs."""
        return () if self._worker is None else (self._worker.pid,)

    def prepare(self, gemm: ExpertGemm) -> None:
        """Get the worker ready for `gemm`; raises DeviceError if it cannot be measured here at all."""
        self._gemm = None
        self._call("prepare", (gemm,), {}, self._start_limit_s)
        self._gemm = gemm

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Run the correctness gate in the worker."""
        limit_s = self._limit_s("check", gemm, tokens, 0)
        return cast(Verdict, self._call("check", (gemm, tokens, config), {}, limit_s))

    def compile(self, gemm: ExpertGemm, configs: Sequence[TileConfig]) -> None:
        """Have what the launches of `configs` need compiled in the worker. Raises what the measurer raises there."""
        self._call("compile", (gemm, tuple(configs)), {}, len(configs) * COMPILE_S + self._limit_s("check", gemm, 1, 0))

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return `count` times in µs, taken in the worker."""
        limit_s = self._limit_s("sample", gemm, tokens, count)
        numbers = {"round": round, "count": count}
        return cast(tuple[float, ...], self._call("sample", (gemm, tokens, config), numbers, limit_s))

    def sample_together(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], *, round: int, count: int
    ) -> list[tuple[float, ...]]:
        """Return `count` times of each config in µs, taken in the worker in turns; its measurer must know how.

        Who hung, crashed or raised is not told; sampled alone, it does so again.
        """
        limit_s = self._limit_s("sample", gemm, tokens, count, configs=len(configs))
        numbers = {"round": round, "count": count}
        found = self._call("sample_together", (gemm, tokens, tuple(configs)), numbers, limit_s)
        return cast(list[tuple[float, ...]], found)

    def release(self, gemm: ExpertGemm) -> None:
        """Drop what the worker keeps for `gemm`; nothing to do if none runs."""
        self._gemm = None
        if self._worker is not None:
            self._call("release", (gemm,), {}, self._start_limit_s)

    def _limit_s(self, call: str, gemm: ExpertGemm, tokens: int, count: int, configs: int = 1) -> float:
        given = self._limits[call]
        if given is not None:
            return given * configs
        launches = configs * self._expected_s(gemm, tokens) * (LAUNCHES[call] + count)
        # A worker's first call for a layout packs the weights, and the gate turns them into the oracle's.
        weights = 4 * configs * gemm.weight_bytes() / SLOW_BYTES
        first = COMPILE_S if call == "check" else 0.0
        return first + max(MIN_LIMIT_S, LIMIT_FACTOR * (launches + weights))

    def _call(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], limit_s: float) -> Any:
        worker = self._ready()
        try:
            return worker.call(method, arguments, keywords, limit_s)
        except (MeasurementTimeout, WorkerDied):
            self.close()
            raise
        except Exception as error:
            if device_lost(str(error)):
                self.close()
            raise
        except BaseException:
            # Ctrl-C ends both; whatever the worker would still answer belongs to no call.
            self.close()
            raise

    def _ready(self) -> _Worker:
        if self._worker is None:
            worker = _Worker()
            try:
                worker.start(self._factory, self._start_limit_s)
                if self._gemm is not None:
                    worker.call("prepare", (self._gemm,), {}, self._start_limit_s)
            except (MeasurementTimeout, WorkerDied) as error:
                worker.kill()
                raise DeviceError(f"the measuring process does not start: {error}") from error
            except BaseException:
                worker.kill()
                raise
            self.started += 1
            self._worker = worker
        return self._worker


def expected_launch_s(gemm: ExpertGemm, tokens: int) -> float:
    """Return the seconds that a launch takes on a slow device: its arithmetic, and all weights read once."""
    flops = 2.0 * tokens * gemm.layer.top_k * gemm.n * gemm.k
    return flops / SLOW_FLOPS + gemm.weight_bytes() / SLOW_BYTES


class _Worker:
    """One process, and the near end of its sockets."""

    def __init__(self) -> None:
        near, far = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = str(torch.get_num_threads())
        environment = child_environment(
            {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        )
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        with far:
            # A group of its own: Ctrl-C is this process's to handle, and killing reaches the worker's children. Not a
            # session: Linux may give each an equal share of the CPUs, whatever priority others were started with.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(far.fileno())], env=environment, pass_fds=(far.fileno(),),
                stdin=subprocess.PIPE, stdout=self._errors, stderr=self._errors, process_group=0,
            )  # fmt: skip
        self._connection = Connection(near.detach())

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def start(self, factory: bytes, limit_s: float) -> None:
        """Send what the worker starts from, and wait until its measurer is there."""
        # No use of the device before: a process that never opened it leaves the choice to the worker.
        opened = torch.cuda.is_initialized()
        device = torch.cuda.current_device() if opened else None
        start = {"threads": torch.get_num_threads(), "device": device, "factory": factory}
        self._exchange("start", start, limit_s)

    def call(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], limit_s: float) -> Any:
        """Return what the measurer's method returns. Raises what it raises, MeasurementTimeout or WorkerDied."""
        return self._exchange(method, (method, arguments, keywords), limit_s)

    def _exchange(self, what: str, message: object, limit_s: float) -> Any:
        deadline = time.monotonic() + limit_s
        try:
            self._connection.send(message)
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                kind, *fields = self._connection.recv()
                if kind == "log":
                    name, level, text = fields
                    logging.getLogger(name).log(level, "%s", text)
                elif kind == "error":
                    raise _rebuilt(*fields)
                else:
                    return fields[0]
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._died(what) from None
        raise MeasurementTimeout(f"{what} took longer than {limit_s:.3g} s and was ended")

    def _died(self, what: str) -> WorkerDied:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"the measuring process broke off its connection during {what}")
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        said = f" ({lines[-1].strip()[:200]})" if lines else ""
        if code >= 0:
            return WorkerDied(f"the measuring process ended with exit code {code} during {what}{said}")
        # Nobody sends SIGKILL but an operator and the system.
        killed = -code == signal.SIGKILL
        why = ", as the system does when it is out of memory" if killed else ""
        message = f"the measuring process was ended by {_signal_name(-code)} during {what}{why}{said}"
        return WorkerDied(message, killed=killed)

    def kill(self) -> None:
        """End the process and its children at once."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._errors.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            logger.warning("measuring process %d does not end; its device may stay busy", self._process.pid)


def _rebuilt(name: str, message: str, memory: bool) -> Exception:
    """Return an exception that is classified and printed as the one in the worker."""
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, errors.TilecastError):
        return known(message)
    bases: tuple[type, ...] = (RemoteError, MemoryError) if memory else (RemoteError,)
    return cast(Exception, type(name, bases, {})(message))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
