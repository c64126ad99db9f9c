"""Rows as integers of 16 bits in the generator: integer codes are multiplied with those in pairs, exactly.

Each group of a row becomes x = 2^e · n, n of 16 bits with its sign and e that of the group's largest element: what lies
more than 14 bits below it is rounded off, to nearest. Everything else until the group's end is exact, zero points
included: total += scale · (2^e · Σ (code - zero) · n). One instruction multiplies two codes of each column with two
elements and adds both products in 32 bits, where float32 takes one at a time.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import (
    F32,
    I8,
    I16,
    I32,
    I64,
    PTR,
    Emit,
    Value,
    i32,
    i64,
    internal_function,
    vector,
)
from tilecast.kernels.cpu._codes import SUM_LANES, Codes, load_scale
from tilecast.kernels.cpu._nibbles import (
    GROUP_BYTES,
    group_factors,
    largest_bits,
    row_bytes,
    sum_of_lanes,
    whole_numbers,
)
from tilecast.problem import DTYPES

BITS = 14
"""A group's largest element has so many bits below its first one."""


def kept_offset(codes: Codes, k_padded: Value, k: Value, emit: Emit) -> Value:
    """Return the bytes from a row's begin to what is kept of the group at `k`: 2^e, and the sum of its integers."""
    eights = emit.imul(emit.ceil_div(k_padded, SUM_LANES), SUM_LANES)
    return emit.iadd(row_bytes(codes, eights, emit), emit.imul(emit.idiv(k, codes.group), GROUP_BYTES))


def emit_short_row(module: Value, name: str, codes: Codes, dtype: str, fma: bool) -> Value:
    """Emit `name`(source, target, k, k_padded): a row's integers in the order of the codes' pairs, then its groups.

    Groups with an infinite element or a NaN have integers of zero and a factor of NaN.
    """
    function = internal_function(module, name, [PTR, PTR, I64, I64])
    emit = Emit(function, SUM_LANES, fma)
    source, target, k, k_padded = function.args
    size = DTYPES[dtype]
    whole = emit.imul(emit.idiv(k, SUM_LANES), SUM_LANES)
    # The last elements of a row that is no multiple of eight, and zeros behind them.
    rest = emit.slot(ir.IntType(8 * size), size=SUM_LANES)
    with emit.loop(0, i64(SUM_LANES)) as i:
        inside = emit.icmp_unsigned("<", emit.iadd(whole, i), k)
        at = emit.at(source, emit.imul(emit.select(inside, emit.iadd(whole, i), i64(0)), size))
        element = emit.load(at, 0, ir.IntType(8 * size), align=size)
        zero = ir.Constant(ir.IntType(8 * size), 0)
        emit.store(emit.select(inside, element, zero), rest, emit.imul(i, size), align=size)

    def elements(i: Value) -> Value:
        given = emit.icmp_unsigned("<", i, whole)
        return emit.load_floats(emit.select(given, emit.at(source, emit.imul(i, size)), rest), 0, dtype)

    order = [lane + first for first in range(0, SUM_LANES, codes.per_word) for pair in codes.pairs for lane in pair]
    with emit.loop(0, k, codes.group) as begin:
        end = emit.imin(k, emit.iadd(begin, codes.group))
        top = largest_bits(emit, elements, begin, end)
        scale, alive, down = group_factors(emit, top, BITS)
        sums = emit.slot(emit.words)
        emit.set(sums, emit.splat(0, emit.words))
        with emit.loop(begin, end, SUM_LANES) as i:
            value = emit.fmul(elements(i), scale)
            number = whole_numbers(emit, emit.select(alive, value, emit.splat(0.0)))
            emit.set(sums, emit.add(emit.get(sums, emit.words), number))
            small = emit.trunc(emit.shuffle(number, number, order), vector(I16, SUM_LANES))
            emit.store(small, target, row_bytes(codes, i, emit), align=4)
        kept = emit.at(target, kept_offset(codes, k_padded, begin, emit))
        emit.store(down, kept, 0, align=4)
        emit.store(sum_of_lanes(emit, emit.get(sums, emit.words)), kept, 4, align=4)
    emit.finish()
    return function


def code_pairs(emit: Emit, codes: Codes, word: Value, pair: int) -> Value:
    """Return two codes of each word as signed integers of 16 bits, those of `codes.pairs[pair]`."""
    if codes.kind == "int4":
        shifted = emit.lshr(word, emit.splat(4 * pair, emit.words)) if pair else word
        return emit.and_(shifted, emit.splat(0x000F000F, emit.words))
    narrow = vector(I16, 2 * emit.lanes)
    high, eight = emit.bitcast(word, narrow), emit.splat(8, narrow)
    high = high if pair else emit.shl(high, eight)
    return emit.bitcast(emit.ashr(high, eight), emit.words)


def pair_product(emit: Emit, codes: Codes, column: Value, factor: Value, known: Value) -> Value:
    """Return known + the sum of two products of 16 bits, in each lane of 32."""
    if codes.byte_pairs:
        narrow = vector(I16, 2 * emit.lanes)
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[emit.lanes]
        operands = [emit.bitcast(column, narrow), emit.bitcast(factor, narrow)]
        # Regrouped by the compiler, more sums would be in flight than there are registers.
        return emit.opaque(emit.add(known, emit.call_external(f"llvm.x86.{name}", emit.words, operands)))
    half = emit.splat(16, emit.words)
    low = [emit.ashr(emit.shl(both, half), half) for both in (column, factor)]
    high = [emit.ashr(both, half) for both in (column, factor)]
    return emit.add(known, emit.add(emit.mul(*low), emit.mul(*high)))


def first_sums(
    emit: Emit, codes: Codes, rows: int, nv: int, kept: list[Value], zeros: tuple[Value, Value]
) -> list[list[Value]]:
    """Return what a group's sums, [rows][vectors], begin with: what its zero points take off.

    kept: addresses of what is kept of each row's group; zeros: the address of this group's in the tile's first panel,
    and the bytes from panel to panel.
    """
    none = emit.splat(0, emit.words)
    if not codes.zero:
        return [[none] * nv for _ in range(rows)]
    found: list[list[Value]] = [[] for _ in range(rows)]
    taken = [emit.splat(emit.sub(i32(0), emit.load(group, 4, I32, align=4)), emit.words) for group in kept]
    for v in range(nv):
        panel, column = v * emit.lanes // codes.panel, v * emit.lanes % codes.panel
        zero = emit.splat(8, emit.words)
        if codes.zero == "stored":
            at = emit.iadd(emit.imul(zeros[1], panel), column)
            zero = emit.zext(emit.load(zeros[0], at, vector(I8, emit.lanes), 1), emit.words)
        for row, total in zip(found, taken, strict=True):
            row.append(emit.mul(zero, total))
    return found


def emit_short_group_end(
    emit: Emit, codes: Codes, sums: list[list[Value]], kept: list[Value], totals: list[Value],
    scales: tuple[Value, Value],
) -> None:  # fmt: skip
    """Add a group's sums, [rows][vectors], to the rows' totals in memory.

    scales: the address of this group's in the tile's first panel, and the bytes from panel to panel.
    """
    lanes = emit.lanes
    factors = [emit.splat(emit.load(group, 0, F32, align=4)) for group in kept]
    for v in range(len(sums[0])):
        panel, column = v * lanes // codes.panel, v * lanes % codes.panel
        scale = load_scale(emit, codes, emit.at(scales[0], emit.imul(scales[1], panel)), column)
        for m, total in enumerate(totals):
            value = emit.fmul(emit.sitofp(sums[m][v], emit.floats), factors[m])
            known = emit.load(total, 4 * v * lanes, emit.floats, align=4)
            emit.store(emit.fma(value, scale, known), total, 4 * v * lanes, align=4)
