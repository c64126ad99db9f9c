"""Staging: weights of one chunk of K brought into the micro-kernel's form in a small scratch buffer.

From a packed panel a chunk is widened to float32; from plain weights [N, K] it is transposed as well.
Values do not change, so staged and unstaged kernels give the same bits.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, VOID, Emit, Value, i64, transpose
from tilecast.kernels.cpu._micro import Micro, Source, _halves, _weights
from tilecast.problem import DTYPES

ONE = {"bf16": ir.IntType(16), "fp16": ir.HalfType(), "fp32": ir.FloatType()}


def emit_stage_packed(module: Value, name: str, micro: Micro, source: Source, panel: int, fma: bool) -> Value:
    """Emit `name`(b, panel_stride, steps, scratch): packed panels to float32 rows of nv · lanes columns."""
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64, PTR]), name)
    function.linkage = "internal"
    emit = Emit(function, micro.lanes, fma)
    b, panel_stride, steps, scratch = function.args
    packed = Micro(nv=micro.nv, unroll=1, source=source, panel=panel, lanes=micro.lanes)
    bases = [emit.at(b, emit.imul(panel_stride, p)) for p in range(packed.panels)]
    row_bytes = 4 * micro.nv * micro.lanes
    with emit.loop(0, steps) as step:
        at = emit.imul(step, panel * packed.column_bytes)
        target = emit.imul(step, row_bytes * packed.step)
        for v in range(micro.nv):
            loaded = _weights(emit, packed, bases, v, at)
            values = _halves(emit, loaded[0]) if source == "pairs" else loaded
            for k, value in enumerate(values):
                emit.store(value, scratch, emit.iadd(target, k * row_bytes + 4 * v * micro.lanes), align=4)
    emit.finish()
    return function


def emit_stage_plain(module: Value, name: str, micro: Micro, dtype: str, fma: bool) -> Value:
    """Emit `name`(row_pointers, byte offset of the chunk, steps, scratch): transpose plain rows.

    row_pointers holds nv · lanes addresses of weight rows. The scratch becomes rows of nv · lanes words: float32
    values at k, or words of two bf16 at (k, k + 1) where the micro-kernel takes pairs (`steps` counts those).
    """
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64, PTR]), name)
    function.linkage = "internal"
    emit = Emit(function, micro.lanes, fma)
    pointers, offset, steps, scratch = function.args
    lanes, row_bytes = micro.lanes, 4 * micro.nv * micro.lanes
    size = 4 if micro.source == "pairs" else DTYPES[dtype]
    whole = emit.imul(emit.idiv(steps, lanes), lanes)
    with emit.loop(0, i64(micro.nv)) as group:
        column = emit.imul(group, 4 * lanes)
        rows = [
            emit.at(emit.load(emit.at(pointers, emit.imul(group, 8 * lanes)), 8 * i, PTR), offset) for i in range(lanes)
        ]
        with emit.loop(0, whole, lanes) as step:
            at = emit.imul(step, size)
            if micro.source == "pairs":
                square = [emit.to_float(emit.load(row, at, emit.words, align=2)) for row in rows]
            else:
                square = [emit.load_floats(row, at, dtype) for row in rows]
            for i, value in enumerate(transpose(emit, square)):
                target = emit.iadd(emit.imul(emit.iadd(step, i), row_bytes), column)
                emit.store(value, scratch, target, align=4)
        with emit.loop(whole, steps) as step:
            target = emit.iadd(emit.imul(step, row_bytes), column)
            for i, row in enumerate(rows):
                value = _one(emit, row, emit.imul(step, size), dtype, pairs=micro.source == "pairs")
                emit.store(value, scratch, emit.iadd(target, 4 * i), align=4)
    emit.finish()
    return function


def _one(emit: Emit, row: Value, at: Value, dtype: str, *, pairs: bool) -> Value:
    if pairs:
        return emit.load(row, at, I32, align=2)
    value = emit.load(row, at, ONE[dtype], align=DTYPES[dtype])
    if dtype == "fp32":
        return value
    if dtype == "fp16":
        return emit.fpext(value, F32)
    return emit.bitcast(emit.shl(emit.zext(value, I32), ir.Constant(I32, 16)), F32)
