"""Timing on the device this process runs on: cold weights, fresh routing, one launch a sample."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tilecast.autotune.gate import Gate, Verdict
from tilecast.autotune.workload import Workload, check_memory, launch, poisoned_output
from tilecast.environment import Environment
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig

SHORT_LAUNCH_US = 100.0
"""Below this a sample is the mean of several launches: the clock and the call around it would show."""
MAX_REPEATS = 32


class Measurer(Protocol):
    """What the tuner needs to know of a device: whether a config is right, and how long it takes.

    `check` and `sample` may raise what a kernel raises; the tuner turns that into a measurement's status.
    """

    def prepare(self, gemm: ExpertGemm) -> None:
        """Get ready for `gemm`; raises DeviceError if it cannot be measured here at all."""
        ...

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Run the correctness gate."""
        ...

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return `count` times in µs. All configs of one round get the same operands."""
        ...

    def release(self, gemm: ExpertGemm) -> None:
        """Drop what is kept for `gemm`; its last bucket is done."""
        ...


def failure(error: Exception) -> tuple[str, str]:
    """Return the status and the one-line detail that stand for what a kernel raised.

    `resource` where memory ran out, `compile_error` where a compiler speaks, else `runtime_error`.
    """
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    text = detail.lower()
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "resource", detail
    if "compil" in text or "llvm" in text:
        return "compile_error", detail
    return "runtime_error", detail


class DeviceMeasurer:
    """Measures on the CPU of this process, on as many threads as torch uses."""

    def __init__(
        self, environment: Environment, registry: Registry, *, routing: str = "uniform", seed: int = 0
    ) -> None:
        """Measure kernels of `registry`; operands follow from `seed` alone."""
        self._registry = registry
        self._workload = Workload(environment, routing=routing, seed=seed)
        self._gate = Gate(self._workload)
        self._repeats: dict[tuple[ExpertGemm, int, TileConfig], int] = {}
        self._turn = 0

    def prepare(self, gemm: ExpertGemm) -> None:
        """Raise DeviceError if the weights of `gemm` do not fit into this machine's memory."""
        check_memory(gemm)

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Run the correctness gate on the full problem; see `Gate`."""
        return self._gate.check(gemm, tokens, config, self._registry[config.kernel])

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return `count` times of one launch in µs, each on the next copy of the weights and fresh routing.

        The first call for a config launches it once without timing. Launches of less than `SHORT_LAUNCH_US`
        are repeated, each repeat on its own operands, and the time divided.
        """
        key = (gemm, tokens, config)
        if key not in self._repeats:
            # The first launch compiles and touches memory; the second says how long one takes.
            self._time(gemm, tokens, config, seeds=[0])
            once = self._time(gemm, tokens, config, seeds=[0])
            short = once < SHORT_LAUNCH_US
            self._repeats[key] = min(MAX_REPEATS, math.ceil(2 * SHORT_LAUNCH_US / once)) if short else 1
        repeats = self._repeats[key]
        times = []
        for index in range(count):
            first = 1 + (round * 8 + index) * MAX_REPEATS
            times.append(self._time(gemm, tokens, config, seeds=list(range(first, first + repeats))))
        return tuple(times)

    def release(self, gemm: ExpertGemm) -> None:
        """Drop the weights, inputs and expected values."""
        self._workload.release()
        self._gate.release()
        self._repeats.clear()

    def _time(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, seeds: list[int]) -> float:
        kernel = self._registry[config.kernel]
        layout = kernel.layout(gemm, config)
        copies = self._workload.copies(gemm)
        operands = []
        for seed in seeds:
            self._turn = (self._turn + 1) % copies
            weights = self._workload.weights(gemm, kernel, layout, self._turn)
            operands.append((weights, self._workload.inputs(gemm, tokens, seed)))
        out = poisoned_output(gemm, tokens)
        with _garbage_collector_paused():
            start = time.perf_counter_ns()
            for weights, inputs in operands:
                launch(kernel, config, weights, inputs, out)
            elapsed = time.perf_counter_ns() - start
        return max(elapsed, 1) / 1e3 / len(seeds)


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
