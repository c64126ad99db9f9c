"""What can spoil a stretch of measuring on each kind of device, and whether it did.

A watch is read before and after a stretch. On a CPU it counts what others used of the cores; on an NVIDIA GPU it
asks the driver (NVML) for the SM clock, the reasons for which it was lowered, and who else computes there.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tilecast.autotune.contention import CpuWatch, Reading, contended
from tilecast.environment import Environment

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pids = Callable[[], Iterable[int]]

MIN_CLOCK = 0.9
"""Part of the run's highest SM clock below which times are not comparable with the others'."""
MOST_LIMITED = 0.02
"""Part of a stretch in which the GPU may have been held back for its temperature."""
SLOWED = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's nvmlClocksThrottleReasons that end soon and are not the GPU's normal state. The power cap (0x04) is left
out: large GEMMs run against it all the time, and how far it lowers the clock is seen in the clock."""
IDLE = 0x01


class Watch(Protocol):
    """Watches a device while times are taken on it."""

    def read(self) -> Any:
        """Return the device's counters now, for `disturbed`; None where they are not to be had."""
        ...

    def disturbed(self, start: Any, end: Any) -> str | None:
        """Return in one line why what was measured between two readings is not to be trusted; None if it is."""
        ...


class Blind:
    """The watch of a device that tells nothing: every stretch counts as quiet."""

    def read(self) -> None:
        """Return None."""

    def disturbed(self, start: object, end: object) -> None:
        """Return None."""


class CpuContention:
    """Watches for others on the cores that this process may use."""

    def __init__(self, watch: CpuWatch | None = None) -> None:
        """Ask `watch`, by default the system's counters."""
        self._watch = watch or CpuWatch()

    def read(self) -> Reading | None:
        """Return the counters now."""
        return self._watch.read()

    def disturbed(self, start: Reading | None, end: Reading | None) -> str | None:
        """Return what others used of the cores, if that is too much; a stretch too short to tell counts as quiet."""
        stolen = self._watch.stolen(start, end)
        return f"others used {stolen:.0%} of the CPUs" if stolen is not None and contended(stolen) else None


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """A GPU at one moment. What the driver does not tell is None, or missing in `others`.

    limited_ns is the time, since the driver was loaded, in which the temperature held the GPU back; `others` maps
    processes that are not ours to the share of the SMs (in %) that they used since the reading before.
    """

    at_s: float
    clock_mhz: int | None = None
    reasons: int = 0
    limited_ns: int | None = None
    others: dict[int, int] = field(default_factory=dict)


class NvmlWatch:
    """Watches an NVIDIA GPU's clock, its slowdowns, and other processes on it."""

    def __init__(self, nvml: Any, uuid: str | None = None, index: int = 0, pids: Pids | None = None) -> None:
        """Watch the GPU with this UUID, else this number, through `nvml`, which has pynvml's functions.

        `pids` are our own processes besides this one. Raises what NVML raises where it does not work.
        """
        self._nvml = nvml
        self._pids = pids or tuple
        nvml.nvmlInit()
        by_index, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
        self._gpu = by_index(index) if uuid is None else by_uuid(uuid)
        self._best_mhz = 0
        self._seen_us = time.time_ns() // 1000

    def read(self) -> GpuReading:
        """Return the clock, the reasons for its slowness, and who else computed since the reading before."""
        nvml, gpu = self._nvml, self._gpu
        clock = self._ask(lambda: int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)))
        reasons = self._ask(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))) or 0
        limited = self._ask(
            lambda: int(nvml.nvmlDeviceGetViolationStatus(gpu, nvml.NVML_PERF_POLICY_THERMAL).violationTime)
        )
        reading = GpuReading(
            at_s=time.monotonic(), clock_mhz=clock, reasons=reasons, limited_ns=limited, others=self._others()
        )
        if clock is not None:
            self._best_mhz = max(self._best_mhz, clock)
        return reading

    def disturbed(self, start: GpuReading | None, end: GpuReading | None) -> str | None:
        """Return why the stretch is not to be trusted, the first reason that holds."""
        if start is None or end is None:
            return None
        for bit, name in SLOWED.items():
            if (start.reasons | end.reasons) & bit:
                return f"the GPU was slowed down: {name}"
        elapsed_ns = (end.at_s - start.at_s) * 1e9
        if start.limited_ns is not None and end.limited_ns is not None and elapsed_ns > 0:
            share = (end.limited_ns - start.limited_ns) / elapsed_ns
            if share > MOST_LIMITED:
                return f"its temperature held the GPU back for {min(share, 1):.0%} of the time"
        # A GPU that idles at the moment of reading has lowered its clock for that.
        if end.clock_mhz is not None and not end.reasons & IDLE and end.clock_mhz < MIN_CLOCK * self._best_mhz:
            part = end.clock_mhz / self._best_mhz
            return f"the SM clock fell to {end.clock_mhz} MHz, {part:.0%} of the run's highest"
        if end.others:
            pid, share = max(end.others.items(), key=lambda item: (item[1], -item[0]))
            return f"process {pid} used {share}% of the GPU's SMs"
        return None

    def _others(self) -> dict[int, int]:
        nvml, since_us = self._nvml, self._seen_us
        found = self._ask(lambda: list(nvml.nvmlDeviceGetProcessUtilization(self._gpu, since_us))) or []
        used: dict[int, int] = {}
        for sample in found:
            if sample.timeStamp > since_us:
                self._seen_us = max(self._seen_us, int(sample.timeStamp))
                used[int(sample.pid)] = max(used.get(int(sample.pid), 0), int(sample.smUtil))
        used = {pid: share for pid, share in used.items() if share > 0}
        ours = {os.getpid(), *self._pids()}
        there = self._ask(lambda: {int(p.pid) for p in nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)}) or set()
        if not ours & (there | set(used)):
            # In a container the driver's numbers are not ours: one of those that compute is this tuning.
            return {} if len(used) < 2 else dict(sorted(used.items(), key=lambda item: -item[1])[1:])
        return {pid: share for pid, share in used.items() if pid not in ours}

    def _ask(self, question: Callable[[], T]) -> T | None:
        # Not every GPU, driver or virtual machine answers everything; what is not known does not disturb.
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):
            return None


def watch_for(environment: Environment, *, pids: Pids | None = None, nvml: Any = None) -> Watch:
    """Return the watch of the device that `environment` is about; `Blind`, logged, where it cannot be watched.

    `pids` names our own processes besides this one, such as a sandbox's worker; `nvml` is by default pynvml.
    """
    if environment.device_kind == "cpu":
        return CpuContention(CpuWatch(pids=pids))
    if not environment.arch.startswith("sm_"):
        return Blind()
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        logger.info("the GPU's clock and other processes on it are not watched; for that, install nvidia-ml-py")
        return Blind()
    uuid, index = _identity()
    try:
        return NvmlWatch(nvml, uuid=uuid, index=index, pids=pids)
    except (nvml.NVMLError, AttributeError) as error:
        logger.warning("the GPU's clock and other processes on it are not watched: %s", error)
        return Blind()


def _identity() -> tuple[str | None, int]:
    """Return the UUID of the current GPU in NVML's form, None where torch does not tell, and its number."""
    import torch

    index = torch.cuda.current_device()
    known = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return (None if known is None else f"GPU-{known}"), index
