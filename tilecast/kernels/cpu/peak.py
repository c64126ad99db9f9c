"""This machine's limits, measured: read bandwidth and float32 multiply-add rate, on the threads kernels use."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from llvmlite import ir

from tilecast.kernels.cpu._build import BF16, I64, PTR, VOID, Emit, i64, vector
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import available_threads, load, run
from tilecast.kernels.cpu.layouts import empty_on_large_pages

READ_BYTES = 512 << 20
CHAINS = 12
FMA_TURNS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Measured limits: bytes read from memory in GB/s; float32 and bf16 dot-product rates in GFLOP/s.

    `dot_bf16_gflop_s` equals the float32 rate where the CPU has no bf16 dot product.
    """

    threads: int
    read_gb_s: float
    fma_gflop_s: float
    dot_bf16_gflop_s: float

    def limit_us(self, *, bytes_read: float, flops: float, dot: bool = False) -> float:
        """Return the least time in µs that reading and computing so much can take."""
        rate = self.dot_bf16_gflop_s if dot else self.fma_gflop_s
        return max(bytes_read / self.read_gb_s, flops / rate) / 1e3


def _emit(module: Any, name: str) -> Emit:
    isa = host_isa()
    function = ir.Function(module, ir.FunctionType(VOID, [PTR]), name)
    return Emit(function, isa.lanes, isa.fma)


def _build_read(module: Any) -> None:
    """Each thread reads its share of a buffer, eight vectors a turn. Block: thread, base, bytes, sink."""
    emit = _emit(module, "read")
    block = emit.function.args[0]
    thread = emit.atomic_rmw("add", block, i64(1), "monotonic")
    size = emit.load(block, 16, I64)
    base = emit.at(emit.load(block, 8, PTR), emit.imul(thread, size))
    sums = [emit.slot(emit.floats, emit.splat(0.0)) for _ in range(8)]
    step = 32 * emit.lanes
    with emit.loop(0, size, step) as at:
        for i, total in enumerate(sums):
            value = emit.load(base, emit.iadd(at, 4 * i * emit.lanes), emit.floats, align=4)
            emit.set(total, emit.fadd(emit.get(total, emit.floats), value))
    _sink(emit, sums, thread)


def _build_fma(module: Any, *, dot: bool = False) -> None:
    """Each thread runs independent chains of multiply-adds. Block: thread, unused, turns, sink."""
    emit = _emit(module, "fma")
    block = emit.function.args[0]
    thread = emit.atomic_rmw("add", block, i64(1), "monotonic")
    sums = [emit.slot(emit.floats, emit.splat(float(i))) for i in range(CHAINS)]
    # Operands from memory, so that the optimiser cannot fold the loop into a formula.
    factor = emit.load(emit.load(block, 24, PTR), 0, emit.floats, align=4)
    with emit.loop(0, emit.load(block, 16, I64)):
        for total in sums:
            value = emit.get(total, emit.floats)
            if dot:
                shorts = emit.bitcast(factor, vector(BF16, 2 * emit.lanes))
                name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * emit.lanes}"
                emit.set(total, emit.call_external(name, emit.floats, [value, shorts, shorts]))
            else:
                emit.set(total, emit.fma(value, factor, factor))
    _sink(emit, sums, thread)


def _sink(emit: Emit, sums: list[Any], thread: Any) -> None:
    target = emit.at(emit.load(emit.function.args[0], 24, PTR), emit.imul(thread, 64))
    total = emit.get(sums[0], emit.floats)
    for other in sums[1:]:
        total = emit.fadd(total, emit.get(other, emit.floats))
    emit.store(total, target, 0, align=4)
    emit.finish()


def _seconds(address: int, base: int, amount: int, threads: int, repeats: int = 5) -> float:
    sink = torch.full((16 * (threads + 1),), 0.5, device="cpu")
    times = []
    for _ in range(repeats):
        block = (ctypes.c_int64 * 4)(0, base, amount, sink.data_ptr())
        start = time.perf_counter_ns()
        run(address, ctypes.addressof(block), threads)
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e9


@cache
def measure_peaks(threads: int = 0) -> Peaks:
    """Measure this machine's limits on `threads` threads (0 = all that torch uses); takes about a second.

    The best of five repeats: a limit is what the machine can do, not what its neighbours leave over.
    """
    threads = min(threads or available_threads(), available_threads())
    isa = host_isa()
    # On large pages, as packed weights are.
    buffer = empty_on_large_pages((READ_BYTES // 4,), torch.float32).fill_(1.0)
    share = READ_BYTES // threads // 4096 * 4096
    read = load(_build_read, {"peak": "read"}, "read")
    read_s = _seconds(read, buffer.data_ptr(), share, threads)
    fma = load(_build_fma, {"peak": "fma", "chains": CHAINS}, "fma")
    flops = 2 * CHAINS * isa.lanes * FMA_TURNS * threads
    fma_rate = flops / _seconds(fma, 0, FMA_TURNS, threads) / 1e9
    dot_rate = fma_rate
    if isa.dot_bf16:
        dot = load(lambda module: _build_fma(module, dot=True), {"peak": "dot", "chains": CHAINS}, "fma")
        dot_rate = 2 * flops / _seconds(dot, 0, FMA_TURNS, threads) / 1e9
    return Peaks(
        threads=threads,
        read_gb_s=share * threads / read_s / 1e9,
        fma_gflop_s=fma_rate,
        dot_bf16_gflop_s=dot_rate,
    )
