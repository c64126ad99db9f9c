"""Staging: weights of one chunk of K brought into the micro-kernel's form in a small scratch buffer.

From a packed panel a chunk is widened: to float32, or, of codes, to words of two bf16 or of two integers of 16 bits;
from plain weights [N, K] it is transposed as well.
Values do not change, so staged and unstaged kernels give the same bits.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import I8, I32, I64, PTR, VOID, Emit, Value, i32, i64, load_one, transpose
from tilecast.kernels.cpu._codes import Codes, decode, decode_pairs
from tilecast.kernels.cpu._micro import Micro, Source, _halves, _weights
from tilecast.kernels.cpu._shorts import code_pairs
from tilecast.problem import DTYPES


def emit_stage_packed(module: Value, name: str, micro: Micro, source: Source, panel: int, fma: bool) -> Value:
    """Emit `name`(b, panel_stride, steps, scratch): packed panels to rows of nv · lanes words."""
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64, PTR]), name)
    function.linkage = "internal"
    emit = Emit(function, micro.lanes, fma)
    b, panel_stride, steps, scratch = function.args
    packed = Micro(nv=micro.nv, unroll=1, source=source, panel=panel, lanes=micro.lanes)
    bases = [emit.at(b, emit.imul(panel_stride, p)) for p in range(packed.panels)]
    row_bytes = 4 * micro.nv * micro.lanes
    with emit.loop(0, steps) as step:
        at = emit.imul(step, panel * packed.column_bytes)
        for v in range(micro.nv):
            loaded = _weights(emit, packed, bases, v, at)
            if micro.codes is not None:
                values = _decoded(emit, micro.codes, loaded[0])
            else:
                values = _halves(emit, loaded[0]) if source == "pairs" else loaded
            target = emit.imul(step, row_bytes * len(values))
            for k, value in enumerate(values):
                emit.store(value, scratch, emit.iadd(target, k * row_bytes + 4 * v * micro.lanes), align=4)
    emit.finish()
    return function


def _decoded(emit: Emit, codes: Codes, word: Value) -> list[Value]:
    """Return what a word of codes is staged as, one vector for each row of the scratch."""
    if codes.short:
        return [code_pairs(emit, codes, word, pair) for pair in range(len(codes.pairs))]
    if codes.kind == "fp8":
        return decode_pairs(emit, word)
    return [word] if codes.limbs else [decode(emit, codes.kind, word, k) for k in range(codes.per_word)]


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
                value = (
                    emit.load(row, emit.imul(step, size), I32, align=2)
                    if micro.source == "pairs"
                    else load_one(emit, row, emit.imul(step, size), dtype)
                )
                emit.store(value, scratch, emit.iadd(target, 4 * i), align=4)
    emit.finish()
    return function


def emit_stage_codes(module: Value, name: str, micro: Micro, codes: Codes, fma: bool) -> Value:
    """Emit `name`(row_pointers, byte offset of the chunk, words, bytes left, scratch): plain rows of codes transposed.

    They become float32, pairs of bf16 or shorts; codes of 4 bits that meet limbs stay words, of one column each.
    A row has so many bytes left from the chunk on; a word that reaches beyond them is filled up with zeros.
    """
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64, I64, PTR]), name)
    function.linkage = "internal"
    emit = Emit(function, micro.lanes, fma)
    pointers, offset, words, left, scratch = function.args
    lanes, row_bytes = micro.lanes, 4 * micro.nv * micro.lanes
    complete = emit.imin(words, emit.idiv(left, 4))
    whole = emit.imul(emit.idiv(complete, lanes), lanes)

    def write(word: Value, index: Value, column: Value) -> None:
        values = _decoded(emit, codes, word)
        target = emit.iadd(emit.imul(index, row_bytes * len(values)), column)
        for i, value in enumerate(values):
            emit.store(value, scratch, emit.iadd(target, i * row_bytes), align=4)

    with emit.loop(0, i64(micro.nv)) as group:
        column = emit.imul(group, 4 * lanes)
        rows = [
            emit.at(emit.load(emit.at(pointers, emit.imul(group, 8 * lanes)), 8 * i, PTR), offset) for i in range(lanes)
        ]
        with emit.loop(0, whole, lanes) as index:
            square = [emit.to_float(emit.load(row, emit.imul(index, 4), emit.words, align=1)) for row in rows]
            for i, value in enumerate(transpose(emit, square)):
                write(emit.bitcast(value, emit.words), emit.iadd(index, i), column)
        with emit.loop(whole, words) as index:
            word = ir.Constant(emit.words, ir.Undefined)
            for i, row in enumerate(rows):
                word = emit.insert_element(word, _word(emit, row, emit.imul(index, 4), left), i32(i))
            write(word, index, column)
    emit.finish()
    return function


def _word(emit: Emit, row: Value, at: Value, left: Value) -> Value:
    """Load four bytes, those from `left` on as zeros, without touching them."""
    word = i32(0)
    last = emit.isub(left, 1)
    for i in range(4):
        byte = emit.zext(emit.load(row, emit.imin(emit.iadd(at, i), last), I8), I32)
        inside = emit.icmp_unsigned("<", emit.iadd(at, i), left)
        word = emit.or_(word, emit.select(inside, emit.shl(byte, i32(8 * i)), i32(0)))
    return word
