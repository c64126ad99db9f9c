"""Whether something else uses the CPUs while times are taken: what the system counts as busy against our own share.

A busy neighbour makes whatever is measured at that moment look slow, and no statistic over its few samples can tell.
So the time in which others ran is counted for every stretch of measuring, and a stretch with too much of it is
measured again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal in a line of /proc/stat (proc_stat(5)); guests are within user."""
MIN_STRETCH_S = 0.25
"""The system counts in ticks of 10 ms: a shorter stretch says nothing."""
MOST_STOLEN = 0.06
"""Part of the CPUs that others may use in a stretch whose samples are kept."""


@dataclass(frozen=True)
class Reading:
    """The counters at one moment, in seconds: wall clock, what the CPUs were busy, and this process's part of it."""

    wall_s: float
    busy_s: float
    own_s: float


class CpuWatch:
    """Counts the CPU time of everything else on the CPUs that this process may use."""

    def __init__(
        self,
        stat: Path = STAT,
        cpus: frozenset[int] | None = None,
        pids: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        """Watch `cpus`, by default those this process may run on; `stat` is the system's table of counters.

        `pids` names the processes whose time is our own besides this one's, such as the worker that measures.
        """
        self._stat = stat
        self._pids = pids or tuple
        self._cpus = cpus if cpus is not None else frozenset(_affinity())
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    def read(self) -> Reading | None:
        """Return the counters now; None where the system does not tell."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        busy = 0
        for line in lines:
            name, _, rest = line.partition(" ")
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cpus:
                counts = [int(field) for field in rest.split()]
                busy += sum(counts[i] for i in BUSY_FIELDS if i < len(counts))
        spent = os.times()
        # Children count once they have been waited for: those that compiled for this process.
        own_s = (
            time.process_time()
            + spent.children_user
            + spent.children_system
            + sum(self._process_s(pid) for pid in self._pids())
        )
        return Reading(time.monotonic(), busy * self._tick_s, own_s)

    def _process_s(self, pid: int) -> float:
        """Return the CPU seconds of another process and the children it waited for; 0 once it is gone."""
        try:
            text = self._stat.with_name(str(pid)).joinpath("stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return 0.0
        # utime to cstime of proc_pid_stat(5); the command before them may hold spaces and brackets.
        fields = text.rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) * self._tick_s

    def stolen(self, start: Reading | None, end: Reading | None) -> float | None:
        """Return the part (0 to 1) of the CPUs that others used between two readings; None if that is not known."""
        if start is None or end is None or not self._cpus or end.wall_s - start.wall_s < MIN_STRETCH_S:
            return None
        others = (end.busy_s - start.busy_s) - (end.own_s - start.own_s)
        return min(1.0, max(0.0, others / (end.wall_s - start.wall_s) / len(self._cpus)))


def contended(stolen: float | None) -> bool:
    """Whether a stretch of measuring has to be made again; unknown counts as quiet."""
    return stolen is not None and stolen > MOST_STOLEN


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
