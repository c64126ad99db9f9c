"""Dot products of single weight rows, bit for bit those of `_moe.Gemm`, without a transpose: a lane for each chain.

A row's sum over K is a sum of chains of FLUSH_K elements, each from zero. Rows are held interleaved, so that a vector
holds the same element of as many chains as it has lanes: rows follow each other in memory and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I64, PTR, Emit, Value, i64, internal_function, load_one, transpose
from tilecast.kernels.cpu._micro import CACHE_LINE, _halves
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.problem import DTYPES

TURN = 4
"""Elements of a chain that are added in one turn; a single chain is filled up to a multiple of it."""


def chain_length(k: int) -> int:
    """Return the elements of each chain as they are held: those past K are zeros."""
    return FLUSH_K if k > FLUSH_K else -(-k // TURN) * TURN


def interleaved_length(k: int) -> int:
    """Return the elements of an interleaved row."""
    return -(-k // FLUSH_K) * chain_length(k)


def emit_interleave(module: Value, name: str, dtype: str, lanes: int, fma: bool) -> Value:
    """Emit `name`(source, target, k): a row of a dtype as interleaved float32, zeros past K.

    Element i of chain c, of the n ≤ lanes that stand side by side, is at i·n + c of those.
    """
    function = internal_function(module, name, [PTR, PTR, I64])
    emit = Emit(function, lanes, fma)
    source, target, k = function.args
    size = DTYPES[dtype]

    def side_by_side(first: Value, count: Value, length: Value) -> None:
        begin = emit.imul(first, FLUSH_K)
        base = emit.at(target, emit.imul(begin, 4))
        # Whole chains in squares, unless there are fewer than lanes of them, or the last one ends early.
        whole = emit.icmp_unsigned("<=", emit.iadd(begin, lanes * FLUSH_K), k)
        with emit.builder.if_else(whole) as (squares, single):
            with squares, emit.loop(0, length, lanes) as i:
                at = [emit.imul(emit.iadd(begin, emit.iadd(i, c * FLUSH_K)), size) for c in range(lanes)]
                rows = transpose(emit, [emit.load_floats(source, offset, dtype) for offset in at])
                for step, row in enumerate(rows):
                    emit.store(row, base, emit.imul(emit.iadd(i, step), 4 * lanes), align=4)
            with single, emit.loop(0, count) as chain:
                start = emit.iadd(begin, emit.imul(chain, FLUSH_K))
                there = emit.imin(length, emit.isub(k, start))
                for low, high in ((i64(0), there), (there, length)):
                    with emit.loop(low, high) as i:
                        value = ir.Constant(F32, 0.0)
                        if high is there:
                            value = load_one(emit, source, emit.imul(emit.iadd(start, i), size), dtype)
                        emit.store(value, base, emit.imul(emit.iadd(emit.imul(i, count), chain), 4), align=4)

    _groups(emit, k, side_by_side)
    emit.finish()
    return function


def emit_dots(module: Value, name: str, dtype: str, lanes: int, fma: bool, neurons: int, ahead: bool) -> Value:
    """Emit `name`(rows, following, a, k, out): out[i] = Σ rows[i][k]·a[k].

    rows: addresses of `neurons` interleaved weight rows; following: of as many that are asked for, if `ahead`; a:
    interleaved float32. A vector's width past the end of either may be read.
    """
    function = internal_function(module, name, [PTR, PTR, PTR, I64, PTR], inline=False)
    emit = Emit(function, lanes, fma)
    rows, following, a, k, out = function.args
    size = DTYPES[dtype]
    given = [emit.load(rows, 8 * i, PTR) for i in range(neurons)]
    asked = [emit.load(following, 8 * i, PTR) for i in range(neurons)] if ahead else []
    ends = emit.hidden(emit.slot(emit.floats, size=neurons))
    totals = [emit.slot(F32, ir.Constant(F32, 0.0)) for _ in range(neurons)]

    def side_by_side(first: Value, count: Value, length: Value) -> None:
        begin = emit.imul(first, FLUSH_K)
        chains = [emit.slot(emit.floats) for _ in range(neurons)]
        for slot in chains:
            emit.set(slot, emit.splat(0.0))
        with emit.loop(0, length, TURN) as i:
            at = emit.iadd(begin, emit.imul(i, count))
            for row in asked:
                for line in range(max(1, TURN * lanes * size // CACHE_LINE)):
                    emit.prefetch(emit.at(row, emit.iadd(emit.imul(at, size), CACHE_LINE * line)))
            _add_turn(emit, dtype, given, a, at, count, chains)
        for n, slot in enumerate(chains):
            emit.store(emit.get(slot, emit.floats), ends, 4 * lanes * n, align=4)
        with emit.loop(0, count) as chain:
            is_first = emit.icmp_unsigned("==", emit.iadd(first, chain), i64(0))
            for n, total in enumerate(totals):
                value = emit.load(ends, emit.iadd(emit.imul(chain, 4), 4 * lanes * n), F32)
                more = emit.fadd(emit.get(total, F32), value)
                emit.set(total, emit.select(is_first, value, more))

    _groups(emit, k, side_by_side)
    for n, total in enumerate(totals):
        emit.store(emit.get(total, F32), out, 4 * n)
    emit.finish()
    return function


def _groups(emit: Emit, k: Value, body: Callable[[Value, Value, Value], None]) -> None:
    """Emit `body`(first chain, how many, their length) for each group of chains that stand side by side."""
    chains = emit.ceil_div(k, FLUSH_K)
    single = emit.imul(emit.ceil_div(k, TURN), TURN)
    length = emit.imin(single, i64(FLUSH_K))
    with emit.loop(0, chains, emit.lanes) as first:
        body(first, emit.imin(i64(emit.lanes), emit.isub(chains, first)), length)


def _add_turn(
    emit: Emit, dtype: str, rows: list[Value], a: Value, at: Value, count: Value, chains: list[Value]
) -> None:
    """Add TURN elements, from element `at` of the rows on, to each row's chains."""
    pair = 2 if dtype == "bf16" else 1
    for step in range(0, TURN, pair):
        place = emit.iadd(at, emit.imul(count, step))
        offsets = [emit.imul(emit.iadd(place, emit.imul(count, part)), 4) for part in range(pair)]
        factors = [emit.load(a, offset, emit.floats, align=4) for offset in offsets]
        for row, slot in zip(rows, chains, strict=True):
            offset = emit.imul(place, DTYPES[dtype])
            if pair == 2:
                parts = _halves(emit, emit.load(row, offset, emit.words, align=4))
            else:
                parts = [emit.load_floats(row, offset, dtype)]
            for factor, part in zip(factors, parts, strict=True):
                emit.set(slot, emit.fma(factor, part, emit.get(slot, emit.floats)))
