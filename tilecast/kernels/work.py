"""What a launch does: bytes, operations, programs and pipelining of one config for one routing, without running it.

The cost model turns it into time with what a device was measured to do. No bit and no time depends on the modules
named `work.py`, so they are no part of the kernels' source digest: a better description leaves decisions valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tilecast.environment import Environment
from tilecast.problem import ExpertGemm, TileConfig

UNKNOWN_SPARSITY = 0.5
"""The share of dead neurons that random operands leave."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One launch of one config.

    weight_bytes, row_bytes, out_bytes: moved from and to memory, re-reads that no cache holds included; cache_bytes:
    further traffic that the last-level cache serves. flops are those of the tiles computed, useful_flops those of
    the routed rows. `path` names the multiply-add path whose peak is meant, `efficiency` is the fraction of it that
    the inner tile can reach by construction: above 1 where integers are multiplied faster than floats.

    programs: tiles or jobs that units take in turn; largest: the longest one's share of all the work (0 where all units
    share each); resident: how
    many a unit holds at once. launches: kernels or library calls, one after the other. latency_steps: steps of one
    program that wait for each other. memory_efficiency: fraction of the bandwidth that so many reads in flight can
    reach. overlap: how much of the shorter of computing and reading hides behind the other.
    """

    weight_bytes: float
    row_bytes: float
    out_bytes: float
    flops: float
    useful_flops: float
    programs: int
    path: str
    cache_bytes: float = 0.0
    launches: int = 1
    efficiency: float = 1.0
    largest: float = 0.0
    resident: int = 1
    latency_steps: float = 0.0
    memory_efficiency: float = 1.0
    overlap: float = 1.0

    @property
    def memory_bytes(self) -> float:
        """Bytes from and to memory."""
        return self.weight_bytes + self.row_bytes + self.out_bytes

    @property
    def padding(self) -> float:
        """Fraction of the operations that no routed row asked for."""
        return 1 - self.useful_flops / self.flops if self.flops else 0.0


@runtime_checkable
class Predictable(Protocol):
    """A kernel that can tell what a launch does. One that cannot is never cut by the model."""

    def work(self, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        ...


@runtime_checkable
class SkipsZeros(Protocol):
    """A predictable kernel that leaves out dead neurons: its work depends on how many of them are."""

    skips_zeros: bool

    def work(
        self,
        gemm: ExpertGemm,
        config: TileConfig,
        environment: Environment,
        counts: Sequence[int],
        dead: float = UNKNOWN_SPARSITY,
    ) -> Work:
        """Return what a launch of a valid config does where a share `dead` of the neurons is."""
        ...


def present(counts: Sequence[int]) -> list[int]:
    """Return the row counts above 0."""
    return [count for count in counts if count > 0]


def nothing(path: str) -> Work:
    """Return the work of a launch without any routed row."""
    return Work(weight_bytes=0, row_bytes=0, out_bytes=0, flops=0, useful_flops=0, programs=0, path=path)
