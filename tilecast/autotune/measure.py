"""Measuring on the device this process runs on: the gate, then times on cold weights and fresh routing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from tilecast.autotune.clock import Clock, Launch, clock_for, garbage_collector_paused
from tilecast.autotune.gate import Gate, Verdict, out_dtypes
from tilecast.autotune.routing_profiles import RoutingProfile
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.timing import centre
from tilecast.autotune.workload import Workload, check_memory, launch, poisoned_output
from tilecast.environment import Environment
from tilecast.kernels.spec import GemmWeights, Registry, stack_bytes
from tilecast.problem import ExpertGemm, TileConfig

SAMPLE_US = {"cpu": 24000.0, "cuda": 200.0}
"""A sample is the centre of as many launches as take about this long. On a CPU the noise of configs that take turns
falls with the root of the launches: of 4 ms, two leave 5.4%, six 2.5%. On either the clock and the call around one
short launch would show."""
MAX_REPEATS = 64
CLEARLY_LONG = 0.25
"""A launch that took so much of a sample's time in the gate tells how many make one, whatever it touched first."""


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


@runtime_checkable
class Together(Protocol):
    """A measurer that takes the samples of several configs within the same stretch of time."""

    def sample_together(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], *, round: int, count: int
    ) -> list[tuple[float, ...]]:
        """Return what `sample` would for each of `configs`, their launches interleaved. Raises what any of them does.

        Who it was is not told: it raises again when each is sampled alone.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """A kernel that can be told what it will launch, and compiles that."""

    def prepare(self, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> None:
        """Load what launches into `out_dtype` need, compiled if need be."""
        ...


class MeasurementTimeout(Exception):
    """A call of a measurer took longer than it may, and was ended."""


class WorkerDied(Exception):
    """The process that measured ended by itself; `killed` if from outside, as by a system that is out of memory."""

    def __init__(self, message: str, *, killed: bool = False) -> None:
        """Say how it ended."""
        super().__init__(message)
        self.killed = killed


NO_ROOM = ("allocate memory", "out of memory", "out of resource", "too many resources", "too much shared data")
COMPILER = ("compil", "llvm", "passmanager", "ptxas")
LOST = (
    "illegal memory access", "illegal address", "misaligned address", "illegal instruction", "device-side assert",
    "unspecified launch failure", "hardware stack error", "memory access fault",
)  # fmt: skip
"""How CUDA and HIP name errors after which nothing else runs in this process."""


def failure(error: Exception) -> tuple[str, str]:
    """Return the status and the one-line detail that stand for what a kernel raised.

    `timeout` where a launch was ended, `resource` where memory, shared memory or registers ran out, `compile_error`
    where a compiler speaks, else `runtime_error`.
    """
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    text = detail.lower()
    if isinstance(error, MeasurementTimeout):
        return "timeout", detail
    if isinstance(error, WorkerDied):
        return ("resource" if error.killed else "runtime_error"), detail
    if device_lost(detail):
        return "runtime_error", detail
    if isinstance(error, MemoryError) or any(word in text for word in NO_ROOM):
        return "resource", detail
    if any(word in text for word in COMPILER):
        return "compile_error", detail
    return "runtime_error", detail


def device_lost(detail: str) -> bool:
    """Whether a failure's detail names an error that leaves the device unusable to this process."""
    text = detail.lower()
    return any(word in text for word in LOST)


class DeviceMeasurer:
    """Measures on the device of this process: the current GPU, or the CPU on as many threads as torch uses."""

    def __init__(
        self,
        environment: Environment,
        registry: Registry,
        *,
        routing: str | RoutingProfile = "uniform",
        seed: int = 0,
        clock: Clock | None = None,
        tokens: Sequence[int] = (),
    ) -> None:
        """Measure kernels of `registry`; operands follow from `seed` alone; `clock` is by default the device's.

        `tokens` are counts that will be measured: the gate works out what is expected of several in one go.
        Raises DeviceError if the environment's device is not here.
        """
        self._registry = registry
        self._workload = Workload(environment, routing=routing, seed=seed)
        self._clock = clock or clock_for(self._workload.device, environment.llc_bytes)
        self._gate = Gate(self._workload, tokens)
        self._repeats: dict[tuple[ExpertGemm, int, TileConfig], int] = {}
        self._turn = 0

    def prepare(self, gemm: ExpertGemm) -> None:
        """Raise DeviceError if the weights of `gemm` do not fit into the device's memory."""
        packed = self._registry.largest_stack(gemm, self._workload.environment)
        check_memory(gemm, self._workload.device, packed_bytes=packed)

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        """Run the correctness gate on the full problem; see `Gate`."""
        kernel = self._registry[config.kernel]
        if isinstance(kernel, Prepared):
            weights = self._workload.weights(gemm, kernel, kernel.layout(gemm, config))
            for dtype in out_dtypes(gemm):
                kernel.prepare(config, weights, dtype)
        return self._gate.check(gemm, tokens, config, kernel)

    def compile(self, gemm: ExpertGemm, configs: Sequence[TileConfig]) -> None:
        """Have what the launches of `configs` need compiled on all cores at once, by kernels that can say what it is.

        What cannot be compiled is left out: its launch says why.
        """
        loads = []
        for config in configs:
            kernel = self._registry[config.kernel]
            if isinstance(kernel, Prepared):
                weights = self._workload.weights(gemm, kernel, kernel.layout(gemm, config))
                loads += [partial(kernel.prepare, config, weights, dtype) for dtype in out_dtypes(gemm)]
        if loads:
            # Imports a compiler.
            from tilecast.kernels.cpu.jit import compile_together

            compile_together(loads, torch.get_num_threads())

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        """Return `count` times of one launch in µs, each on the next copy of the weights and fresh routing.

        The first call for a config launches it twice without timing, unless the gate showed that it takes long.
        Launches of less than `SAMPLE_US` are repeated, each repeat on its own operands, and the time divided.
        """
        repeats = self._repeats_of(gemm, tokens, config)
        times = []
        for index in range(count):
            first = 1 + (round * 8 + index) * MAX_REPEATS
            times.append(self._time(gemm, tokens, config, seeds=list(range(first, first + repeats))))
        return tuple(times)

    def sample_together(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], *, round: int, count: int
    ) -> list[tuple[float, ...]]:
        """Return `count` times for each config in µs, launch by launch in turns; a sample is the launches' centre.

        What slows a machine down for 10 to 100 ms would make the configs look slow that ran meanwhile. A turn is one
        launch of each config, in an order drawn anew; one of fewer launches has them spread evenly over the turns.
        Config by config where the weights do not fit into memory in all of their layouts, and on a GPU: a sample there
        is a graph of its own, all of whose launches take less than such a disturbance lasts.
        """
        kernels = [self._registry[config.kernel] for config in configs]
        stacks = {
            (kernel.name, layout): stack_bytes(kernel, gemm, layout)
            for kernel, config in zip(kernels, configs, strict=True)
            for layout in [kernel.layout(gemm, config)]
        }
        held = self._workload.fits(gemm, [*stacks.values()] * self._workload.copies(gemm))
        if self._workload.device.type != "cpu" or not held:
            return [self.sample(gemm, tokens, config, round=round, count=count) for config in configs]
        repeats = [self._repeats_of(gemm, tokens, config) for config in configs]
        found: list[list[float]] = [[] for _ in configs]
        for index in range(count):
            first = 1 + (round * 8 + index) * MAX_REPEATS
            turns = _turns(repeats, hash_seed(tokens, round, index))
            for times, one in zip(found, self._in_turns(gemm, tokens, configs, turns, first), strict=True):
                times.append(centre(one))
        return [tuple(times) for times in found]

    def _in_turns(
        self, gemm: ExpertGemm, tokens: int, configs: Sequence[TileConfig], turns: Sequence[int], first: int
    ) -> list[list[float]]:
        """Return the µs of each config's launches; `turns` are the configs' places, one a launch."""
        found: list[list[float]] = [[] for _ in configs]
        out = poisoned_output(gemm, tokens, device=self._workload.device)
        # All of them before the first is timed, so that the caches are full of launches and nothing else.
        made = [0] * len(configs)
        launches = []
        for place in turns:
            launches.append(self._launch(gemm, tokens, configs[place], seed=first + made[place], out=out))
            made[place] += 1
        with garbage_collector_paused():
            for place, one in zip(turns, launches, strict=True):
                found[place].append(self._clock.time([one]))
        return found

    def _repeats_of(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> int:
        key = (gemm, tokens, config)
        if key not in self._repeats:
            self._repeats[key] = self._warmed(gemm, tokens, config)
        return self._repeats[key]

    def _warmed(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> int:
        wanted = SAMPLE_US[self._workload.environment.device_kind]
        # What the gate launched may have been compiling, unless the kernel was told before.
        told = isinstance(self._registry[config.kernel], Prepared)
        once = self._gate.launch_us(gemm, tokens, config)
        if not told or once <= CLEARLY_LONG * wanted:
            # The first launch compiles and touches memory; the second says how long one takes.
            self._time(gemm, tokens, config, seeds=[0])
            once = self._time(gemm, tokens, config, seeds=[0])
        return max(1, min(MAX_REPEATS, int(wanted / once + 0.5)))

    def release(self, gemm: ExpertGemm) -> None:
        """Drop the weights, inputs and expected values."""
        self._workload.release()
        self._gate.release()
        self._repeats.clear()

    def _time(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, seeds: list[int]) -> float:
        out = poisoned_output(gemm, tokens, device=self._workload.device)
        return self._clock.time([self._launch(gemm, tokens, config, seed=seed, out=out) for seed in seeds])

    def _launch(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, seed: int, out: torch.Tensor) -> Launch:
        """Return a launch on the next copy of the weights and the routing of `seed`."""
        kernel = self._registry[config.kernel]
        layout = kernel.layout(gemm, config)
        self._turn = (self._turn + 1) % self._workload.copies(gemm)
        weights = self._workload.weights(gemm, kernel, layout, self._turn)
        if isinstance(kernel, Prepared):
            kernel.prepare(config, weights, out.dtype)
        inputs = self._workload.inputs(gemm, tokens, seed, kernel.order(gemm, config))
        return partial(launch, kernel, config, weights, inputs, out)


def _turns(repeats: Sequence[int], seed: int) -> list[int]:
    """Return the places of configs, each as often as it repeats, in turns of one launch each in an order of its own."""
    chance, most = random.Random(seed), max(repeats)
    turns = []
    for turn in range(most):
        # Of `repeats` launches spread evenly over all turns, the next one falls into this turn.
        due = [p for p, own in enumerate(repeats) if (turn + 1) * own // most > turn * own // most]
        chance.shuffle(due)
        turns += due
    return turns
