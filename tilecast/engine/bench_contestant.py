"""One contestant of a benchmark's race: what is called, what it took, and why it is out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tilecast.engine.bench_result import Timing
from tilecast.engine.peers import Prepared

MIN_ROUNDS = 3
HOPELESS = 10.0
"""A contestant this many times slower than the fastest gets the least number of samples only."""


@dataclass(kw_only=True)
class Contestant:
    """What is timed: `bind` takes operands and returns the call; None where there is nothing to run.

    `share` marks one that does a part of the layer only, `by_host` one whose work the host takes part in, so that its
    time is the host's.
    """

    name: str
    bind: Prepared | None = None
    gemms_only: bool = False
    share: bool = False
    by_host: bool = False
    status: str = "ok"
    detail: str = ""
    error_ratio: float | None = None
    samples_us: list[float] = field(default_factory=list)

    @property
    def racing(self) -> bool:
        """Whether it is still in the race."""
        return self.status == "ok" and self.bind is not None

    def fail(self, status: str, detail: str) -> None:
        """Take it out of the race."""
        self.status, self.detail, self.bind = status, detail, None
        self.samples_us.clear()

    def timing(self) -> Timing:
        """Return what it took."""
        return Timing(
            name=self.name, status=self.status, samples_us=tuple(self.samples_us), error_ratio=self.error_ratio,
            gemms_only=self.gemms_only, detail=self.detail,
        )  # fmt: skip


def hopeless(contestant: Contestant, contestants: Sequence[Contestant]) -> bool:
    """Whether it has samples enough to know that it is far behind the fastest that does the whole layer."""
    if len(contestant.samples_us) < MIN_ROUNDS:
        return False
    whole = [min(other.samples_us) for other in contestants if other.samples_us and not other.share]
    return bool(whole) and min(contestant.samples_us) > HOPELESS * min(whole)


@contextmanager
def reporting(contestant: Contestant) -> Iterator[None]:
    """Turn what a contestant raises into its status: one that fails must not end the others' race."""
    try:
        yield
    except Exception as error:  # whatever another library raises; an interrupt is none of these
        lines = str(error).strip().splitlines() or [""]
        contestant.fail("runtime_error", f"{type(error).__name__}: {lines[0]}")
