"""The generated call that runs a whole layer: the sort of its slots, then both GEMMs in one parallel region."""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import I32, I64, PTR, VOID, Emit, Value, i64
from tilecast.kernels.cpu._sorting import SORT_ARGS, emit_sort
from tilecast.kernels.cpu._variant import ARGS, BARRIER

ENTRY = "tilecast_layer"
REGION = "tilecast_region"
MAX_THREADS, PARALLEL = "tilecast_max_threads", "tilecast_parallel"
"""Symbols that the loader binds to the OpenMP runtime's `omp_get_max_threads` and `GOMP_parallel`."""

FRAME_ARGS = (
    # how many threads there were to be had when the frame was made, how many run, whether ids have 64 bits
    "available", "threads", "wide",
    # the GEMMs' entry functions and argument blocks
    "up", "up_block", "down", "down_block",
    # the sort's argument block
    *SORT_ARGS,
)  # fmt: skip
"""The 64-bit words of a frame, in order."""
DONE, OTHER_THREADS = 0, 1
"""What the call returns: OTHER_THREADS where nothing was done, as there are more or fewer threads than there were."""


def emit_layer(module: Value, lanes: int) -> None:
    """Emit ENTRY(frame, hidden, ids, routing weights, out) -> i64. One frame serves one call at a time."""
    sorts = {bits: emit_sort(module, f"sort_{bits}", bits, lanes) for bits in (32, 64)}
    region = _emit_region(module, lanes)
    function = ir.Function(module, ir.FunctionType(I64, [PTR] * 5), ENTRY)
    emit = Emit(function, lanes, False)
    frame, hidden, ids, scale, out = function.args
    threads = emit.load(frame, _at("threads"), I64)
    found = emit.sext(emit.call_external(MAX_THREADS, I32, []), I64)
    with emit.builder.if_then(emit.icmp_signed("!=", found, emit.load(frame, _at("available"), I64))):
        emit.builder.ret(i64(OTHER_THREADS))
    emit.store(ids, frame, _at("given"))
    wide = emit.icmp_unsigned("!=", emit.load(frame, _at("wide"), I64), i64(0))
    with emit.builder.if_else(wide) as (then, otherwise):
        for arm, bits in ((then, 64), (otherwise, 32)):
            with arm:
                emit.builder.call(sorts[bits], [emit.at(frame, _at(SORT_ARGS[0]))])
    up, down = (emit.load(frame, _at(name), PTR) for name in ("up_block", "down_block"))
    for block in (up, down):
        for counter in ("job", "thread"):
            emit.store(i64(0), block, 8 * ARGS.index(counter))
    emit.store(hidden, up, 8 * ARGS.index("source"))
    emit.store(scale, down, 8 * ARGS.index("scale"))
    emit.store(out, down, 8 * ARGS.index("out"))
    with emit.builder.if_else(emit.icmp_unsigned(">", threads, i64(1))) as (several, alone):
        with several:
            emit.call_external(PARALLEL, VOID, [region, frame, emit.trunc(threads, I32), ir.Constant(I32, 0)])
        with alone:
            emit.builder.call(region, [frame])
    emit.builder.ret(i64(DONE))
    ir.IRBuilder(emit.entry).branch(function.blocks[1])


def _emit_region(module: Value, lanes: int) -> Value:
    """Emit what every thread runs: up, and down when all threads have done with up."""
    function = ir.Function(module, ir.FunctionType(VOID, [PTR]), REGION)
    emit, frame = Emit(function, lanes, False), function.args[0]
    _call(emit, frame, "up")
    with emit.builder.if_then(emit.icmp_unsigned(">", emit.load(frame, _at("threads"), I64), i64(1))):
        emit.call_external(BARRIER, VOID, [])
    _call(emit, frame, "down")
    emit.finish()
    return function


def _call(emit: Emit, frame: Value, gemm: str) -> None:
    # llvmlite calls what points at a function of a known type.
    entry = emit.load(frame, _at(gemm), ir.FunctionType(VOID, [PTR]).as_pointer())
    emit.builder.call(entry, [emit.load(frame, _at(f"{gemm}_block"), PTR)])


def _at(name: str) -> int:
    return 8 * FRAME_ARGS.index(name)
