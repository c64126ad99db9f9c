"""pynvml over a GPU that is not there, as far as Tilecast asks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace


class FakeNvmlError(Exception):
    pass


@dataclass
class FakeNvml:
    clock_mhz: int = 1980
    reasons: int = 0
    violation_ns: int = 0
    running: tuple[int, ...] = ()
    used: dict[int, int] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    time_us: int = 1 << 60
    handles: list[object] = field(default_factory=list)
    NVMLError = FakeNvmlError
    NVML_CLOCK_SM = 1
    NVML_PERF_POLICY_THERMAL = 1

    def _ask(self, name: str) -> None:
        if name in self.silent:
            raise FakeNvmlError("Not Supported")

    def nvmlInit(self) -> None:
        self._ask("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.handles.append(uuid)
        return "gpu"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.handles.append(index)
        return "gpu"

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        self._ask("clock")
        assert (gpu, kind) == ("gpu", self.NVML_CLOCK_SM)
        return self.clock_mhz

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        self._ask("reasons")
        return self.reasons

    def nvmlDeviceGetViolationStatus(self, gpu: str, policy: int) -> SimpleNamespace:
        self._ask("violation")
        return SimpleNamespace(referenceTime=0, violationTime=self.violation_ns)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[SimpleNamespace]:
        self._ask("running")
        return [SimpleNamespace(pid=pid, usedGpuMemory=1 << 30) for pid in self.running]

    def nvmlDeviceGetProcessUtilization(self, gpu: str, since_us: int) -> list[SimpleNamespace]:
        """What was used since; asked again, what came after."""
        self._ask("utilization")
        if not self.used:
            raise FakeNvmlError("Not Found")
        if since_us >= self.time_us:
            return []
        return [SimpleNamespace(pid=pid, timeStamp=self.time_us, smUtil=share) for pid, share in self.used.items()]
