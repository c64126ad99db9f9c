"""How fast a CPU runs the instructions of the inner loops: products of 16-bit pairs beside float multiply-adds.

python benchmarks/instructions.py

One thread, nothing past the first-level cache, all loops in turns, each for a fifth of a millisecond. Loops in
registers are twelve chains, as many as a tile of 6 rows by 2 vectors has sums; `operations_a_cycle` are theirs. The
tiles are that tile itself, its steps emitted by the kernel's own generator, over 128 of K: float32 rows and columns,
and rows of 16 bits with codes brought into pairs (`dot=int16`); what a call and the end of a group take besides is in
neither. A cycle is a sixteenth of sixteen vector additions that wait for one another, one cycle each, timed in the
same round.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from report import write_result

from tilecast.canonical import Json
from tilecast.kernels.cpu._build import I64, PTR, VOID, Emit, Value, i64
from tilecast.kernels.cpu._codes import codes_of
from tilecast.kernels.cpu._micro import Micro, _step
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.kernels.cpu.jit import load, run
from tilecast.problem import weight_format

ROWS, VECTORS, DEPTH, UNROLL = 6, 2, 128, 4
CHAINS = ROWS * VECTORS
WAITING = 16
"""Additions of the loop that measures a cycle."""
SAMPLE_S = 200e-6
BUFFER_BYTES = 16 << 10
ENTRY = "instructions"

ADD, PRODUCT, FMA = "vpaddd $2, $0, $0", "vpmaddwd $2, $1, $0", "vfmadd231ps $3, $2, $0"


def instruction(emit: Emit, text: str, *operands: Value, known: Value | None = None) -> Value:
    """Emit one instruction, which the compiler leaves where it is; `known` is a register that it changes."""
    given = operands if known is None else (known, *operands)
    constraints = ",".join(["=v", *([] if known is None else ["0"]), *["v"] * len(operands)])
    kind = ir.FunctionType(emit.words, [value.type for value in given])
    return emit.builder.asm(kind, text, constraints, list(given), True)


def waiting(emit: Emit, base: Value, turns: Value) -> None:
    one = emit.load(base, 0, emit.words, align=4)
    total = emit.slot(emit.words, one)
    with emit.loop(0, turns):
        for _ in range(WAITING):
            emit.set(total, instruction(emit, ADD, one, known=emit.get(total, emit.words)))


def in_registers(emit: Emit, base: Value, turns: Value, *, kind: str) -> None:
    """`CHAINS` sums that do not wait for one another: of multiply-adds, of additions, of products, or of no sums."""
    first, second = (emit.load(base, 64 * place, emit.words, align=4) for place in range(2))
    sums = [emit.slot(emit.words, first) for _ in range(CHAINS)]
    with emit.loop(0, turns):
        for total in sums:
            if kind == "fma":
                made = instruction(emit, FMA, first, second, known=emit.get(total, emit.words))
            elif kind == "additions":
                made = instruction(emit, ADD, first, known=emit.get(total, emit.words))
            else:
                made = instruction(emit, PRODUCT, first, second)
                if kind == "products and additions":
                    made = instruction(emit, ADD, made, known=emit.get(total, emit.words))
            if kind != "products":
                emit.set(total, made)


def tile(emit: Emit, base: Value, turns: Value, *, shorts: bool) -> None:
    """The sums of a tile over `DEPTH` of K, as the kernel computes them; they are not used."""
    lanes = emit.lanes
    codes = codes_of(
        weight_format("int8_g128"), chain=DEPTH, scale="fp16", panel=64, dtype="bf16", byte_pairs=True, short=True
    )
    micro = Micro(
        nv=VECTORS, unroll=UNROLL, source="shorts" if shorts else "f32", panel=VECTORS * lanes, lanes=lanes,
        codes=codes if shorts else None,
    )  # fmt: skip
    kind, zero = (emit.words, emit.splat(0, emit.words)) if shorts else (emit.floats, emit.splat(0.0))
    sums = [[emit.slot(kind, zero) for _ in range(VECTORS)] for _ in range(ROWS)]
    rows = [emit.at(base, 4 * DEPTH * row) for row in range(ROWS)]
    columns = emit.at(base, 4 * DEPTH * ROWS)
    with emit.loop(0, turns):
        with emit.loop(0, i64(DEPTH // micro.step), UNROLL) as index:
            for place in range(UNROLL):
                step = emit.iadd(index, place)
                _step(emit, micro, rows, [columns], sums, emit.imul(step, 4), emit.imul(step, 4 * VECTORS * lanes))
        # The compiler has to believe that somebody wants them.
        for row in sums:
            for total in row:
                instruction(emit, "", emit.bitcast(emit.get(total, kind), emit.words))


LOOPS: dict[str, tuple[int, Callable[[Emit, Value, Value], None]]] = {
    "additions that wait": (WAITING, waiting),
    **{
        kind: (CHAINS * (1 + kind.count(" and ")), partial(in_registers, kind=kind))
        for kind in ("fma", "products", "additions", "products and additions")
    },
    "float32 tile": (CHAINS * DEPTH, partial(tile, shorts=False)),
    "int16 tile": (CHAINS * DEPTH, partial(tile, shorts=True)),
}
"""Vector operations of a turn, and what emits the loop: both tiles have one for each K, row and vector of columns."""


class Timed:
    """One loop, compiled; calls return the seconds of a turn."""

    def __init__(self, name: str, isa: Isa) -> None:
        emit_loop = LOOPS[name][1]

        def build(module: Value) -> None:
            emit = Emit(ir.Function(module, ir.FunctionType(VOID, [PTR]), ENTRY), isa.lanes, isa.fma)
            (block,) = emit.function.args
            emit_loop(emit, emit.load(block, 0, PTR), emit.load(block, 8, I64))
            emit.finish()

        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self._address = load(build, {"instructions": name, "source": source}, ENTRY)
        self._buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
        self.turns = 64
        while (turn_s := self()) * self.turns < SAMPLE_S:
            self.turns = min(2 * self.turns, 1 + int(1.1 * SAMPLE_S / turn_s))

    def __call__(self) -> float:
        block = (ctypes.c_int64 * 2)(self._buffer.data_ptr(), self.turns)
        begin = time.perf_counter()
        run(self._address, ctypes.addressof(block), 1)
        return (time.perf_counter() - begin) / self.turns


def measure(rounds: int) -> dict[str, Json]:
    """Return each loop's cycles a turn and operations a cycle, and how much faster the integer tile is."""
    timed = {name: Timed(name, host_isa()) for name in LOOPS}
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name, loop in timed.items():
            seconds[name].append(loop())
    cycles = [wait / WAITING for wait in seconds["additions that wait"]]
    loops: dict[str, Json] = {}
    for name, times in seconds.items():
        by_round = [turn / cycle for turn, cycle in zip(times, cycles, strict=True)]
        loops[name] = {
            "operations": LOOPS[name][0],
            "least_ns": 1e9 * min(times),
            "cycles": quartiles(by_round),
            "least_cycles": min(times) / min(cycles),
            "operations_a_cycle": {
                "median": LOOPS[name][0] / statistics.median(by_round),
                "best": LOOPS[name][0] * min(cycles) / min(times),
            },
        }
    ratios = [wide / short for wide, short in zip(seconds["float32 tile"], seconds["int16 tile"], strict=True)]
    return {
        "rows": ROWS, "vectors": VECTORS, "lanes": host_isa().lanes, "depth": DEPTH, "unroll": UNROLL,
        "rounds": rounds, "cycle_ns": 1e9 * statistics.median(cycles), "loops": loops,
        "int16_tile_times_faster": {
            "quartiles": quartiles(ratios), "of_least_times": min(seconds["float32 tile"]) / min(seconds["int16 tile"]),
        },
    }  # fmt: skip


def quartiles(values: list[float]) -> list[Json]:
    """The first quartile, the median, the third quartile."""
    return list(statistics.quantiles(values, n=4, method="inclusive"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the instructions of the inner loops, in turns.")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    if not host_isa().byte_pairs:
        sys.exit(f"instructions: {host_isa().name} has no products of pairs to time; run it on x86 with AVX2")
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}, expected at least 2")
    torch.set_num_threads(1)
    # The kernels themselves have no instruction that is written out.
    llvm.initialize_native_asmparser()
    result = measure(options.rounds)
    for name, loop in result["loops"].items():
        rates = loop["operations_a_cycle"]
        print(
            f"{name:24} {loop['cycles'][1]:8.2f} cycles a turn, {loop['least_cycles']:8.2f} at best; "
            f"{rates['median']:.2f} operations a cycle, {rates['best']:.2f} at best"
        )
    faster = result["int16_tile_times_faster"]
    print(f"the int16 tile is {faster['quartiles'][1]:.2f} times as fast, {faster['of_least_times']:.2f} at best")
    print(write_result("instructions", result, options.results))


if __name__ == "__main__":
    main()
