"""Clocks: how long launches take on a CPU, and on a GPU, where a launch returns before its work is done.

On a GPU the launches of one sample are captured into a CUDA graph, so that no host time lies between them, and the
graph is replayed between two events behind a write that fills the last-level cache. That write keeps the device
busy while the host submits the rest, so the first event does not wait for the host either.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

Launch = Callable[[], None]

FLUSH_FACTOR = 2
MIN_FLUSH_BYTES = 256 << 20
"""A flush writes this many times the cache, and at least what takes longer than submitting a graph and an event."""


class Clock(Protocol):
    """Times launches on one device."""

    def time(self, launches: Sequence[Launch]) -> float:
        """Return the µs of one of `launches` (at least one), their mean. What a launch raises passes through."""
        ...


class HostClock:
    """Launches that return when their work is done."""

    def time(self, launches: Sequence[Launch]) -> float:
        """Run the launches one after the other and return the mean in µs."""
        with garbage_collector_paused():
            start = time.perf_counter_ns()
            for launch in launches:
                launch()
            elapsed = time.perf_counter_ns() - start
        return max(elapsed, 1) / 1e3 / len(launches)


class Queue(Protocol):
    """What a device clock needs of a device that works through a queue (a CUDA stream)."""

    def guard(self) -> AbstractContextManager[Any]:
        """Return what makes the device the current one."""
        ...

    def capture(self, launches: Sequence[Launch]) -> Launch:
        """Record the launches, running none; return what submits them all at once. Raises if they resist it."""
        ...

    def flush(self) -> None:
        """Submit a write of more memory than the last-level cache holds."""
        ...

    def mark(self) -> Any:
        """Submit a mark of the time at which everything before it is done."""
        ...

    def wait_us(self, start: Any, end: Any) -> float:
        """Wait for mark `end` and return its distance from `start` in µs."""
        ...


class DeviceClock:
    """Launches that only submit work: times of a captured replay, or of the launches themselves where that fails."""

    def __init__(self, queue: Queue) -> None:
        """Time on `queue`'s device."""
        self._queue = queue
        self._said = False

    def time(self, launches: Sequence[Launch]) -> float:
        """Run every launch once untimed, then flush and time all of them; return the mean in µs.

        The untimed ones compile, and make whatever kernels keep per weights and per routing: made within a capture
        it would lie in the graph's memory. The host waits once, at the end, which is also where an error of the
        device is raised.
        """
        queue = self._queue
        with queue.guard(), garbage_collector_paused():
            for launch in launches:
                launch()
            replay = self._captured(launches)
            # The first replay also uploads the graph.
            replay()
            queue.flush()
            start = queue.mark()
            replay()
            end = queue.mark()
            elapsed_us = queue.wait_us(start, end)
        return max(elapsed_us, 1e-3) / len(launches)

    def _captured(self, launches: Sequence[Launch]) -> Launch:
        try:
            return self._queue.capture(launches)
        except RuntimeError as error:
            if not self._said:
                self._said = True
                reason = str(error).strip().splitlines() or [""]
                logger.warning("timed launch by launch, host time included: a CUDA graph fails (%s)", reason[0][:200])

        def eager() -> None:
            for launch in launches:
                launch()

        return eager


class CudaQueue:
    """The current stream of a GPU."""

    def __init__(self, device: torch.device, llc_bytes: int) -> None:
        """Use `device`; flushes write `FLUSH_FACTOR` times its `llc_bytes`."""
        self._device = device
        size = max(FLUSH_FACTOR * llc_bytes, MIN_FLUSH_BYTES)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
        self._side = torch.cuda.Stream(device)
        self._last: torch.cuda.CUDAGraph | None = None

    def guard(self) -> AbstractContextManager[Any]:
        """Return what makes the device the current one."""
        return torch.cuda.device(self._device)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        """Capture the launches into a CUDA graph. `torch.cuda.graph` is not used: it empties the memory cache.

        What a graph of its own allocated would stay reserved until that cache is emptied, and a capture cannot
        empty it: after some hundred samples it would find no memory. So each graph takes over the last one's memory,
        which is why that one lives until then. A capture that failed leaves it in no state to be shared.
        """
        graph = torch.cuda.CUDAGraph()
        last, self._last = self._last, None
        memory = None if last is None else last.pool()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            # Only this thread's calls can break the capture.
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._side)
        self._last = graph
        return graph.replay

    def flush(self) -> None:
        """Write the flush buffer."""
        self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        """Record a timing event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Wait for `end` and return the time between both in µs."""
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def clock_for(device: torch.device, llc_bytes: int) -> Clock:
    """Return the clock for launches on `device`, whose last-level cache has `llc_bytes`."""
    return DeviceClock(CudaQueue(device, llc_bytes)) if device.type == "cuda" else HostClock()


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from running in between."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
