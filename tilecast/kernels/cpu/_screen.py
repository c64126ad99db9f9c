"""Which gates are zero, proven from int8 codes of their rows: what is left is computed exactly (`_screened`).

A gate row is held once more as codes c and scales s of groups of K: w = s·c + e. A row x is rounded to t·q + d, groups
of 16-bit integers. Then w·x is Σ s·t·(c·q), up to Σ s·(ρ·‖x‖ + κ·t) with what packing knows of the neuron (`screens`):
ρ bounds ‖e‖/s and all roundings, κ bounds c·d/t. Where the sum, that bound and the bias are together below zero, the
dense kernel's gate is, too. A row or weight that is not finite decides nothing.
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
    load_one,
    transpose,
    vector,
)
from tilecast.problem import DTYPES

GROUP = 128
"""Elements of K that share a scale, of codes and of rows: products of int8 and int16 are summed exactly."""
STREAMS = 4
"""Neurons screened at once, each in another part of a job: one stream of memory does not fill a core."""
ROWS_AT_ONCE = 2
MAGIC = 12582912.0
"""1.5 · 2**23: adding it rounds to an integer, which then stands in the lowest bits."""
LARGEST_STEP = 32704.0
SMALLEST = 2.0**-100
"""The least unit of a group's codes: below it nothing underflows where the proof needs it."""
LARGEST = 2.0**50
"""The largest unit of a row's group: above it the exact sums might overflow where the screen does not."""
LARGEST_WEIGHT = 2.0**30
"""The largest scale, for the same reason."""
SLACK = 2.0**-96
"""What a screened sum has to be below zero by: more than all underflows of both computations."""
NORM_FACTOR, NORM_MORE = 1 + 2.0**-16, 6.0
"""‖x‖₂ ≤ t·(‖q‖₂·NORM_FACTOR + NORM_MORE): a group's d is at most 0.51·t·√GROUP."""


def screened_bytes(k: int, lanes: int) -> int:
    """Return the bytes of one screened row: units t and norms of its groups as float32, integers q."""
    groups = padded_groups(k, lanes)
    return 8 * groups + 2 * GROUP * groups_of(k)


def groups_of(k: int) -> int:
    """Return the number of groups of K."""
    return -(-k // GROUP)


def padded_groups(k: int, lanes: int) -> int:
    """Return the number of groups of K, a multiple of the lanes; those past K are zeros."""
    return -(-groups_of(k) // lanes) * lanes


def emit_screen_row(module: Value, name: str, lanes: int, dtype: str, fma: bool) -> Value:
    """Emit `name`(source, target, k, padded groups): units t, bounds of norms, integers q of a row of a dtype."""
    function = internal_function(module, name, [PTR, PTR, I64, I64])
    emit = Emit(function, lanes, fma)
    source, target, k, padded = function.args
    size = DTYPES[dtype]
    norms = emit.at(target, emit.imul(padded, 4))
    integers = emit.at(norms, emit.imul(padded, 4))
    room = emit.hidden(emit.slot(F32, size=GROUP))
    groups = emit.ceil_div(k, GROUP)
    with emit.loop(0, groups) as group:
        first = emit.imul(group, GROUP)
        inside = emit.imin(i64(GROUP), emit.isub(k, first))
        for i in range(0, GROUP, lanes):
            emit.store(emit.splat(0.0), room, 4 * i, align=4)
        whole = emit.imul(emit.idiv(inside, lanes), lanes)
        with emit.loop(0, whole, lanes) as i:
            at = emit.imul(emit.iadd(first, i), size)
            emit.store(emit.load_floats(source, at, dtype), room, emit.imul(i, 4), align=4)
        with emit.loop(whole, inside) as i:
            at = emit.imul(emit.iadd(first, i), size)
            emit.store(load_one(emit, source, at, dtype), room, emit.imul(i, 4), align=4)
        unit = _unit(emit, room)
        squares = _integers(emit, room, unit, emit.at(integers, emit.imul(first, 2)))
        norm = emit.fma(
            emit.call_intrinsic("llvm.sqrt", [squares]), ir.Constant(F32, NORM_FACTOR), ir.Constant(F32, NORM_MORE)
        )
        emit.store(unit, target, emit.imul(group, 4), align=4)
        emit.store(emit.fmul(norm, unit), norms, emit.imul(group, 4), align=4)
    with emit.loop(groups, padded) as group:
        for at in (target, norms):
            emit.store(ir.Constant(F32, 0.0), at, emit.imul(group, 4), align=4)
    emit.finish()
    return function


def _unit(emit: Emit, room: Value) -> Value:
    """Return a group's unit t from its floats in memory: infinite or NaN if one of them is, or is too large."""
    lanes = emit.lanes
    most = emit.splat(0, emit.words)
    for i in range(0, GROUP, lanes):
        # Bits of magnitudes are in their order, infinity and then NaN above all numbers.
        bits = emit.and_(emit.load(room, 4 * i, emit.words, align=4), emit.splat(0x7FFFFFFF, emit.words))
        most = emit.select(emit.icmp_signed(">", bits, most), bits, most)
    while lanes > 1:
        lanes //= 2
        low, high = (emit.shuffle(most, most, range(at, at + lanes)) for at in (0, lanes))
        most = emit.select(emit.icmp_signed(">", low, high), low, high)
    largest = emit.bitcast(emit.extract_element(most, i32(0)), F32)
    unit = emit.fmul(largest, ir.Constant(F32, _float32(1 / LARGEST_STEP)))
    unit = emit.select(emit.fcmp_ordered("<", unit, ir.Constant(F32, SMALLEST)), ir.Constant(F32, SMALLEST), unit)
    return emit.select(emit.fcmp_ordered(">", unit, ir.Constant(F32, LARGEST)), ir.Constant(F32, float("inf")), unit)


def _integers(emit: Emit, room: Value, unit: Value, target: Value) -> Value:
    """Write a group's floats in units as 16-bit integers; return the sum of their squares."""
    lanes = emit.lanes
    inverse = emit.splat(emit.fdiv(ir.Constant(F32, 1.0), unit))
    magic, total = emit.splat(MAGIC), emit.splat(0.0)
    for i in range(0, GROUP, lanes):
        value = emit.load(room, 4 * i, emit.floats, align=4)
        shifted = emit.fadd(emit.fmul(value, inverse), magic)
        # The lowest 16 bits of 1.5 · 2**23 are zeros.
        emit.store(emit.trunc(emit.bitcast(shifted, emit.words), vector(I16, lanes)), target, 2 * i, align=2)
        whole = emit.fsub(shifted, magic)
        total = emit.fma(whole, whole, total)
    return _across(emit, total)


def _across(emit: Emit, sums: Value) -> Value:
    left = emit.lanes
    while left > 1:
        left //= 2
        low, high = (emit.shuffle(sums, sums, range(at, at + left)) for at in (0, left))
        sums = emit.fadd(low, high)
    return emit.extract_element(sums, i32(0))


def emit_screen(module: Value, name: str, lanes: int, fma: bool, rows: int) -> Value:
    """Emit `name`(codes, code stride, scales, scale stride, bounds, bound stride, row pointers, groups, padded groups,
    units, out, out stride, sum stride).

    codes, scales (bf16), bounds (ρ, κ): of the first of STREAMS neurons, and bytes to the others; row pointers:
    addresses of `rows` screened rows; units: scratch for `rows` · STREAMS · padded groups floats; out: where the first
    neuron's sum and bound goes, in one number, bytes from row to row and from neuron to neuron.
    """
    words = [PTR, I64, PTR, I64, PTR, I64, PTR, I64, I64, PTR, PTR, I64, I64]
    function = internal_function(module, name, words, inline=False)
    emit = Emit(function, lanes, fma)
    (codes, code_stride, scales, scale_stride, bounds, bound_stride, pointers, groups, padded, units, out, out_stride,
     sum_stride) = function.args  # fmt: skip
    every = [(r, n) for r in range(rows) for n in range(STREAMS)]
    given = [emit.load(pointers, 8 * r, PTR) for r in range(rows)]
    integers = [emit.at(row, emit.imul(padded, 8)) for row in given]
    streams = [emit.at(codes, emit.imul(code_stride, n)) for n in range(STREAMS)]
    sums = {at: emit.slot(emit.floats) for at in every}
    for slot in sums.values():
        emit.set(slot, emit.splat(0.0))
    unit_stride = emit.imul(padded, 4)
    factors = []
    for n in range(STREAMS):
        of = emit.at(bounds, emit.imul(bound_stride, n))
        factors.append([emit.splat(emit.load(of, 4 * i, F32, align=4)) for i in range(2)])
    with emit.loop(0, padded, lanes) as g:
        at = emit.imul(g, 4)
        for n in range(STREAMS):
            scale = emit.load_floats(emit.at(scales, emit.imul(scale_stride, n)), emit.imul(g, 2), "bf16")
            for r in range(rows):
                unit = emit.load(given[r], at, emit.floats, align=4)
                norm = emit.load(emit.at(given[r], unit_stride), at, emit.floats, align=4)
                place = emit.at(units, emit.imul(unit_stride, r * STREAMS + n))
                emit.store(emit.fmul(scale, unit), place, at, align=4)
                bound = emit.fma(factors[n][0], norm, emit.fmul(factors[n][1], unit))
                emit.set(sums[r, n], emit.fma(scale, bound, emit.get(sums[r, n], emit.floats)))
    with emit.loop(0, groups) as g:
        at = emit.imul(g, GROUP)
        totals = dict.fromkeys(every, emit.splat(0, emit.words))
        for i in range(0, GROUP, 2 * lanes):
            shorts = vector(I16, 2 * lanes)
            loaded = [emit.load(row, emit.imul(emit.iadd(at, i), 2), shorts, align=2) for row in integers]
            for n in range(STREAMS):
                code = emit.load(streams[n], emit.iadd(at, i), vector(I8, 2 * lanes), align=1)
                code = emit.sext(code, shorts)
                for r in range(rows):
                    totals[r, n] = _add_pairs(emit, totals[r, n], code, loaded[r])
        for r, n in every:
            place = emit.at(units, emit.imul(unit_stride, r * STREAMS + n))
            unit = emit.splat(emit.load(place, emit.imul(g, 4), F32, align=4))
            value = emit.sitofp(totals[r, n], emit.floats)
            emit.set(sums[r, n], emit.fma(value, unit, emit.get(sums[r, n], emit.floats)))
    for r in range(rows):
        folded = _fold(emit, [emit.get(sums[r, n], emit.floats) for n in range(STREAMS)])
        for n in range(STREAMS):
            place = emit.at(emit.at(out, emit.imul(out_stride, r)), emit.imul(sum_stride, n))
            emit.store(emit.extract_element(folded, i32(n)), place, 0, align=4)
    emit.finish()
    return function


def _add_pairs(emit: Emit, known: Value, a: Value, b: Value) -> Value:
    """Return known + the sum of two neighbours' products of 16 bits, in each lane of 32."""
    if emit.module.triple.startswith("x86_64"):
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[emit.lanes]
        # Regrouped by the compiler, more sums would be in flight than there are registers.
        return emit.opaque(emit.add(known, emit.call_external(f"llvm.x86.{name}", emit.words, [a, b])))
    wide = vector(I32, 2 * emit.lanes)
    products = emit.mul(emit.sext(a, wide), emit.sext(b, wide))
    even, odd = (emit.shuffle(products, products, range(first, 2 * emit.lanes, 2)) for first in (0, 1))
    return emit.add(known, emit.add(even, odd))


def _fold(emit: Emit, sums: list[Value]) -> Value:
    """Return the sums of four vectors' lanes as one vector of four."""
    left = emit.lanes
    while left > STREAMS:
        left //= 2
        sums = [emit.fadd(*(emit.shuffle(value, value, range(at, at + left)) for at in (0, left))) for value in sums]
    first, *others = transpose(emit, sums)
    for other in others:
        first = emit.fadd(first, other)
    return first


def _float32(value: float) -> float:
    """Round a constant to float32: llvmlite refuses literals that float32 cannot hold."""
    import struct

    return float(struct.unpack("f", struct.pack("f", value))[0])
