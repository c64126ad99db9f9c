"""How a call is timed: as a captured CUDA graph between two events, or by the clock on a CPU; caches cold before.

Before a sample the last-level cache is flushed by reading through more memory than it holds (reading, not writing:
nothing is left that must be written back while the clock runs), and then the activations are touched, as their
producer would just have written them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

FLUSH_FACTOR = 4
MIN_FLUSH_BYTES = 64 << 20
WARM_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A call that is ready to be timed. `graph` says whether it is a captured graph; `note` why not."""

    replay: Callable[[], object]
    graph: bool
    note: str = ""
    keep: Any = None


class Clock(Protocol):
    """Times calls on one kind of device."""

    device: torch.device

    def prepare(self, call: Callable[[], object]) -> Timed:
        """Warm `call` up, and capture it where that can be done. Raises what the call raises."""
        ...

    def sample(self, timed: Timed, *, touch: Sequence[torch.Tensor] = (), cold: bool = True) -> float:
        """Return the µs of one run."""
        ...

    def healthy(self) -> bool:
        """Whether the device still works for this process."""
        ...

    def synchronize(self) -> None:
        """Wait for everything; raises what a launch before has caused."""
        ...


class CpuClock:
    """Times on the CPU: tries the suite without a GPU."""

    def __init__(self, flush_bytes: int = MIN_FLUSH_BYTES) -> None:
        self.device = torch.device("cpu")
        self._flushed = torch.ones(flush_bytes // 8, dtype=torch.int64)

    def prepare(self, call: Callable[[], object]) -> Timed:
        call()
        return Timed(replay=call, graph=False, note="a CPU has no graphs")

    def sample(self, timed: Timed, *, touch: Sequence[torch.Tensor] = (), cold: bool = True) -> float:
        if cold:
            self._flushed.sum()
            for tensor in touch:
                tensor.sum()
        start = time.perf_counter_ns()
        timed.replay()
        return max(1, time.perf_counter_ns() - start) / 1e3

    def healthy(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CudaClock:
    """Times on the current CUDA device. The flush also keeps the device busy while the launches are queued."""

    def __init__(self, cache_bytes: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        size = max(FLUSH_FACTOR * cache_bytes, MIN_FLUSH_BYTES) // 4
        self._flushed = torch.ones(size, dtype=torch.float32, device=self.device)
        self._sum = torch.empty((), dtype=torch.float32, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def prepare(self, call: Callable[[], object]) -> Timed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = call()
        except Exception as error:
            # A call that waits for the device, as many peers do, is timed as users run it: launch by launch.
            torch.cuda.synchronize()
            return Timed(
                replay=call, graph=False, note=f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            )
        graph.replay()
        torch.cuda.synchronize()
        return Timed(replay=graph.replay, graph=True, keep=kept)

    def sample(self, timed: Timed, *, touch: Sequence[torch.Tensor] = (), cold: bool = True) -> float:
        if cold:
            torch.sum(self._flushed, 0, out=self._sum)
            for tensor in touch:
                tensor.sum()
        self._start.record()
        timed.replay()
        self._end.record()
        self._end.synchronize()
        return max(1e-3, self._start.elapsed_time(self._end) * 1e3)

    def healthy(self) -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:  # whatever the driver reports: it stays broken for this process
            return False
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def clock_for(device: str, *, tiny: bool = False) -> Clock:
    if device == "cpu":
        return CpuClock(1 << 20 if tiny else MIN_FLUSH_BYTES)
    return CudaClock(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def free_memory(device: str) -> None:
    """Give back what was dropped: graphs and their pools hold gigabytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def interleaved(clock: Clock, calls: dict[str, Timed], rounds: int, *, cold: bool = False) -> dict[str, list[float]]:
    """Return `rounds` samples of each call in µs, taken in turns."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(clock.sample(calls[name], cold=cold))
    return samples
