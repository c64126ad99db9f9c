"""What screening the gates of an up projection does, for the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

from tilecast.kernels.cpu._screen import GROUP
from tilecast.kernels.cpu.columns import gate_gemm, padded_columns
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.work import LIVE_UP_EFFICIENCY
from tilecast.kernels.work import Work, nothing, present
from tilecast.problem import DTYPES, ExpertGemm, TileConfig

BOUND = 0.44
"""The bound of normal weights' gates, in standard deviations of the gates: ‖e‖ is 0.0067 of ‖w‖, and some slack."""
CODE_BYTES = 1 + 2 / GROUP
"""A code, and its part of a scale."""
SCREEN_RATE = 0.7
"""Products of codes a cycle, of the multiply-adds of floats at their peak."""


def open_share(dead: float) -> float:
    """Return the share of the gates that a screen leaves open where they are normal deviates, so many of them dead."""
    if dead <= 0 or dead >= 1:
        return 1.0 if dead <= 0 else 0.0
    return 1 - NormalDist().cdf(NormalDist().inv_cdf(dead) - BOUND)


def screen_work(isa: Isa, gemm: ExpertGemm, config: TileConfig, counts: Sequence[int], dead: float) -> Work:
    """Return the work of the gates alone: codes of all of them, and the rows of those left open."""
    rows_present, size = present(counts), DTYPES[gemm.layer.dtype]
    if not rows_present:
        return nothing("fma")
    rows, width, k = sum(rows_present), gemm.layer.intermediate, gemm.k
    columns, left_open = padded_columns(gate_gemm(gemm), isa.lanes), open_share(dead)
    read = len(rows_present) * columns * k * CODE_BYTES
    read += sum(1 - (1 - left_open) ** count for count in rows_present) * width * k * size
    screened, exact = 2.0 * rows * columns * k, 2.0 * rows * left_open * width * k
    cycles = screened / SCREEN_RATE + exact / LIVE_UP_EFFICIENCY
    jobs = len(rows_present) * -(-columns // config.integer("block_n"))
    return Work(
        weight_bytes=read, row_bytes=0.0, out_bytes=0.0, flops=screened + exact, useful_flops=screened + exact,
        programs=jobs, path="fma", efficiency=min(1.0, (screened + exact) / cycles), largest=1 / jobs,
        memory_efficiency=1.0, overlap=0.5,
    )  # fmt: skip
