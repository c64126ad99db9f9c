"""What a device can do, measured once by a short probe and kept: the constants of the cost model."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from tilecast.autotune.clock import Clock, clock_for
from tilecast.autotune.contention import MIN_STRETCH_S, CpuWatch, contended
from tilecast.autotune.workload import device_of
from tilecast.canonical import Json, fields_of
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.spec import Registry
from tilecast.problem import DTYPES

logger = logging.getLogger(__name__)

FORMAT = 1
MIXED = "mixed"
"""The source of a probe that others disturbed."""
MAX_FILE_BYTES = 1 << 16
REPEATS = 5
PROBE_ROWS, PROBE_SIZE = 64, 1024
"""Rows of the library probe and the side of its weights: the shape of one expert's product."""
COPY_BYTES = 64 << 20
MATMUL_SIZES = {"tensor": 4096, "simt": 2048}
"""The least that a GPU's probe copies; sides of its products, on the matrix unit and without."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one device was measured, or is said, to do; `device` is its `device_key`.

    memory_bytes_s and cache_bytes_s: read from memory and from the last-level cache; `flops_s` by path (see
    `Work.path`) the rate of multiply-adds, each counted as two; launch_us of one kernel or library call; program_us
    of one tile or job besides its work; latency_us of a read from memory. `source` is `probe`, `nominal`, or `mixed`
    where others disturbed the probe.
    """

    device: str
    memory_bytes_s: float
    cache_bytes_s: float
    flops_s: Mapping[str, float] = field(hash=False)
    launch_us: float
    program_us: float
    latency_us: float
    source: str = "probe"

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        for name, value in (*self._numbers(), *self.flops_s.items()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"calibration: {name} is {value!r}, expected a number above 0")

    def _numbers(self) -> list[tuple[str, float]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if str(f.type) == "float"]

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "flops_s": dict(self.flops_s),
        }

    @classmethod
    def from_json(cls, value: object) -> Calibration:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {
            f.name: (int, float) if str(f.type) == "float" else dict if f.name == "flops_s" else str
            for f in fields(cls)
        }
        parsed = fields_of(value, {"format": int, **kinds}, "calibration")
        if parsed.pop("format") != FORMAT:
            raise InputError(f"calibration is of another format than {FORMAT}")
        return cls(**cast(Any, parsed))


def device_key(environment: Environment) -> str:
    """Return the digest of what an environment's limits depend on: the device and its library, not our kernels."""
    return replace(environment, kernel_source="", compiler="", driver="", system="").digest


class Probe(Protocol):
    """Measures single limits of one device."""

    def memory_bytes_s(self) -> float:
        """Return bytes read from memory a second."""
        ...

    def cache_bytes_s(self) -> float:
        """Return bytes read from the last-level cache a second."""
        ...

    def flops_s(self) -> dict[str, float]:
        """Return the rate of every multiply-add path that kernels here take."""
        ...

    def launch_us(self) -> float:
        """Return the time of a kernel that does next to nothing."""
        ...


class CpuProbe:
    """This machine's CPU, on the threads that kernels use."""

    def __init__(self, environment: Environment) -> None:
        """Probe for an environment of this process."""
        # Compiles its loops: imported where it is used.
        from tilecast.kernels.cpu.peak import measure_peaks

        self._environment = environment
        self._peaks = measure_peaks(environment.threads)

    def memory_bytes_s(self) -> float:
        """Return the bandwidth of reading 512 MiB."""
        return self._peaks.read_gb_s * 1e9

    def cache_bytes_s(self) -> float:
        """Return the bandwidth of reading a quarter of the last-level cache again and again."""
        values = torch.ones(max(1 << 18, self._environment.llc_bytes // 4) // 4)
        return max(self.memory_bytes_s(), values.nbytes / best_s(lambda: values.sum()))

    def flops_s(self) -> dict[str, float]:
        """Return the multiply-add rates of vector code, and of the library's products in each dtype."""
        library = {f"library_{dtype}": library_flops_s(dtype) for dtype in DTYPES}
        return {
            "fma": self._peaks.fma_gflop_s * 1e9, "dot_bf16": self._peaks.dot_bf16_gflop_s * 1e9, **library,
        }  # fmt: skip

    def launch_us(self) -> float:
        """Return the time of one small operation."""
        one = torch.ones(8)
        return best_s(lambda: one.add_(1), calls=200) * 1e6


class GpuProbe:
    """The current GPU, timed as kernels are: by a graph's replay."""

    def __init__(
        self, environment: Environment, clock: Clock | None = None, device: torch.device | None = None
    ) -> None:
        """Probe the environment's device. Raises DeviceError where it is not here."""
        self._device = device_of(environment) if device is None else device
        self._environment = environment
        self._clock = clock or clock_for(self._device, environment.llc_bytes)

    def memory_bytes_s(self) -> float:
        """Return the bandwidth of copying four times the last-level cache, counting both directions."""
        source = torch.empty(max(COPY_BYTES, 4 * self._environment.llc_bytes), dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._s(lambda: target.copy_(source))

    def cache_bytes_s(self) -> float:
        """Return the bandwidth of copying an eighth of the last-level cache, after it was read once."""
        size = max(1 << 20, self._environment.llc_bytes // 8)
        source = torch.empty(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        copies = 16
        many_s = self._s(*[lambda: target.copy_(source)] * copies)
        return 2 * size / many_s

    def flops_s(self) -> dict[str, float]:
        """Return the rates of dense products by the library, in bf16 on the matrix unit and in fp32 without."""
        rates = {}
        for path, dtype in (("tensor", torch.bfloat16), ("simt", torch.float32)):
            size = MATMUL_SIZES[path]
            left = torch.ones((size, size), dtype=dtype, device=self._device)
            right, out = torch.ones_like(left), torch.empty_like(left)
            rates[path] = 2 * size**3 / self._s(partial(torch.mm, left, right, out=out))
        return rates

    def launch_us(self) -> float:
        """Return the time of one small kernel within a graph."""
        one = torch.ones(8, device=self._device)
        return self._s(*[lambda: one.add_(1)] * 32) * 1e6

    def _s(self, *launches: Callable[[], object]) -> float:
        wrapped = [_without_result(launch) for launch in launches]
        return min(self._clock.time(wrapped) for _ in range(REPEATS)) / 1e6


def _without_result(launch: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        launch()

    return run


def best_s(call: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds of one call, the least of some repeats: what the machine can do, not what others leave."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append(time.perf_counter_ns() - start)
    return max(1, min(times)) / 1e9 / calls


def library_flops_s(dtype: str) -> float:
    """Return the rate of PyTorch's product of a few rows with one expert's weights in a dtype."""
    rows = torch.ones((PROBE_ROWS, PROBE_SIZE), dtype=TORCH_DTYPES[dtype])
    weights = torch.ones((PROBE_SIZE, PROBE_SIZE), dtype=TORCH_DTYPES[dtype])
    with torch.no_grad():
        return 2 * PROBE_ROWS * PROBE_SIZE**2 / best_s(lambda: torch.mm(rows, weights.t()))


PROGRAM_US = {"cpu": 0.3, "cuda": 0.2}
"""What a job or tile costs besides its work: taking it, its addresses, its first loads' pipeline."""
LATENCY_US = {"cpu": 0.1, "cuda": 0.7}
"""A read from memory (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture", and later parts alike)."""


def calibrate(environment: Environment, registry: Registry | None = None, probe: Probe | None = None) -> Calibration:
    """Measure the device of `environment`, which must be this process's; `probe` is by default the device's.

    Takes about two seconds on a CPU. Kernels of `registry` that name paths of their own are not probed: their paths
    fall back to the plain one. Raises DeviceError where the device is not here.
    """
    if probe is None:
        probe = CpuProbe(environment) if environment.device_kind == "cpu" else GpuProbe(environment)
    memory = probe.memory_bytes_s()
    return Calibration(
        device=device_key(environment),
        memory_bytes_s=memory,
        cache_bytes_s=max(memory, probe.cache_bytes_s()),
        flops_s=probe.flops_s(),
        launch_us=probe.launch_us(),
        program_us=PROGRAM_US[environment.device_kind],
        latency_us=LATENCY_US[environment.device_kind],
    )


NOMINAL_GPU = {
    "sm_80": (2.04e12, 312e12, 19.5e12), "sm_86": (0.768e12, 155e12, 38.7e12), "sm_89": (0.864e12, 362e12, 91.6e12),
    "sm_90": (3.35e12, 989e12, 67e12), "sm_100": (8.0e12, 2250e12, 80e12), "sm_120": (1.79e12, 504e12, 125e12),
    "gfx942": (5.3e12, 1307e12, 163e12), "gfx950": (8.0e12, 2500e12, 157e12),
}  # fmt: skip
"""Bytes a second from memory, dense 16-bit and fp32 operations a second: datasheets of `gpu.target.TARGETS`."""
GPU_REACHED = 0.85
"""What a long copy or product reaches of a datasheet's figure."""
CPU_HERTZ, CPU_CORE_BYTES_S, CPU_BYTES_S = 3.0e9, 12e9, 150e9


def nominal(environment: Environment) -> Calibration:
    """Return a calibration for a device that is not here: datasheet figures, or those of a common core."""
    if environment.device_kind == "cpu":
        cores = max(1, environment.threads or environment.units)
        lanes = 16 if "avx512f" in environment.features else 8 if "avx2" in environment.features else 4
        memory, fma = min(cores * CPU_CORE_BYTES_S, CPU_BYTES_S), cores * CPU_HERTZ * 4 * lanes
        dot = fma * 2 if "avx512_bf16" in environment.features else fma
        rates = {"fma": fma, "dot_bf16": dot, "library_fp32": 0.8 * fma}
        rates |= {"library_bf16": 0.8 * dot if dot > fma else 0.1 * fma, "library_fp16": 0.1 * fma}
        cache, launch = 4 * memory, 5.0
    else:
        memory, tensor, simt = (
            GPU_REACHED * value for value in NOMINAL_GPU.get(environment.arch, NOMINAL_GPU["sm_80"])
        )
        rates, cache, launch = {"tensor": tensor, "simt": simt}, 2.5 * memory, 2.5
    return Calibration(
        device=device_key(environment), memory_bytes_s=memory, cache_bytes_s=cache, flops_s=rates, launch_us=launch,
        program_us=PROGRAM_US[environment.device_kind], latency_us=LATENCY_US[environment.device_kind],
        source="nominal",
    )  # fmt: skip


# Kept once for each device ----------------------------------------------------------------


def calibration_file(folder: Path, environment: Environment) -> Path:
    """Return where the calibration of an environment is kept."""
    return folder / "calibration" / f"{device_key(environment)}.json"


def load_calibration(folder: Path, environment: Environment) -> Calibration | None:
    """Return what is kept for an environment; None where there is nothing, or nothing that can be believed."""
    path = calibration_file(folder, environment)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        found = Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError):
        return None
    return found if found.device == device_key(environment) and found.source in ("probe", MIXED) else None


def save_calibration(folder: Path, environment: Environment, calibration: Calibration) -> None:
    """Keep a calibration, whole or not at all; a folder that cannot be written is logged and costs a probe a run."""
    path = calibration_file(folder, environment)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(calibration.to_json(), sort_keys=True) + "\n", encoding="ascii")
        temporary.replace(path)
    except OSError as error:
        logger.warning("the calibration is not kept: %s", error)


def calibration_for(
    environment: Environment,
    registry: Registry | None = None,
    *,
    folder: Path | None = None,
    probe: Probe | None = None,
    watch: CpuWatch | None = None,
    hold: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Calibration:
    """Return the kept calibration of an environment; else probe it; the nominal one of a device that is not here.

    `folder` is the user's cache folder, where a probe is kept; None keeps none. Where others used the CPUs
    meanwhile, nominal figures stand in for lower ones, until a later call finds the CPUs quiet and probes again.
    `hold` is entered for the time of a probe; what it raises is raised.
    """
    watch = watch or CpuWatch()
    kept = None if folder is None else load_calibration(folder, environment)
    if kept is not None and (kept.source != MIXED or contended(_others(watch))):
        return kept
    if probe is None and not is_here(environment):
        return nominal(environment)
    with hold():
        start = watch.read()
        found = calibrate(environment, registry, probe)
        stolen = watch.stolen(start, watch.read())
    if environment.device_kind == "cpu" and contended(stolen):
        logger.info("others used %.0f%% of the CPUs while this device's limits were probed", 100 * (stolen or 0))
        found = at_least(found, nominal(environment))
    if folder is not None:
        save_calibration(folder, environment, found)
    return found


def _others(watch: CpuWatch) -> float | None:
    """Return the part of the CPUs that others use at this moment."""
    start = watch.read()
    time.sleep(MIN_STRETCH_S)
    return watch.stolen(start, watch.read())


def at_least(found: Calibration, floor: Calibration) -> Calibration:
    """Return each rate of a disturbed probe, or the nominal one where that is higher; launches no slower than it."""
    return replace(
        found,
        memory_bytes_s=max(found.memory_bytes_s, floor.memory_bytes_s),
        cache_bytes_s=max(found.cache_bytes_s, floor.cache_bytes_s),
        flops_s={path: max(rate, floor.flops_s.get(path, 0.0)) for path, rate in found.flops_s.items()},
        launch_us=min(found.launch_us, floor.launch_us),
        source=MIXED,
    )


def is_here(environment: Environment) -> bool:
    """Whether the device of `environment` is one of this process's."""
    if environment.device_kind == "cpu":
        return device_key(cpu_environment()) == device_key(environment)
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).name == environment.device
