"""4-bit weights in the generator: rows become integers, and codes are multiplied with those, exactly.

Each group of a row is cut into limbs: x = 2^e · Σ limb_i · 256^(limbs - 1 - i), limbs being signed bytes, with the
exponent of the group's largest element. What lies more than 21 bits (3 limbs, 16-bit rows) or 29 bits (4 limbs, fp32
rows) below that exponent is rounded off, to nearest; everything else until the group's end is exact, zero points
included: total += scale · (2^e · Σ (code - zero) · limbs). Making codes into floats would take more steps than that.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I8, I16, I32, I64, PTR, Emit, Value, i32, internal_function, vector
from tilecast.kernels.cpu._codes import SUM_LANES, Codes, load_scale
from tilecast.problem import DTYPES

CODES = 8
"""Codes of one word, of ascending k from its lowest bits."""
TURN = 4
"""Words multiplied into sums of 16 bits: 32 products of a code and a limb are at most 32 · 15 · 128 in two sums."""
GROUP_BYTES = 16
"""What a group of a row has behind the limbs: 2^e, and the sums of its limbs, the upper ones and the last two."""
LOW_EXPONENT = 30
"""Biased exponent (2^-97) below which groups are taken to have this one: 2^-e then still is a float32."""
NAN_BITS = 0x7FC00000


def row_bytes(codes: Codes, k: Value, emit: Emit) -> Value:
    """Return the bytes that `k` elements of a row take."""
    return emit.imul(k, codes.row_element_bytes)


def group_offset(codes: Codes, k_padded: Value, k: Value, emit: Emit) -> Value:
    """Return the bytes from a row's begin to what is kept of the group at `k`."""
    return emit.iadd(row_bytes(codes, k_padded, emit), emit.imul(emit.idiv(k, codes.group), GROUP_BYTES))


def emit_split_row(module: Value, name: str, codes: Codes, dtype: str, fma: bool) -> Value:
    """Emit `name`(source, target, k, k_padded): a row's limbs in the order that products take them, then its groups.

    For each word of codes: for each half of it (bytes) or quarter (pairs of 16 bits), each limb of the elements there.
    Groups with an infinite element or a NaN have limbs of zero and a factor of NaN.
    """
    function = internal_function(module, name, [PTR, PTR, I64, I64])
    emit = Emit(function, SUM_LANES, fma)
    source, target, k, k_padded = function.args
    size = DTYPES[dtype]
    bits = 8 * codes.limbs - 3
    with emit.loop(0, k, codes.group) as begin:
        end = emit.iadd(begin, codes.group)
        top = largest_bits(emit, lambda i: emit.load_floats(source, emit.imul(i, size), dtype), begin, end)
        scale, alive, down = group_factors(emit, top, bits)
        upper, lower = emit.slot(emit.words), emit.slot(emit.words)
        for slot in (upper, lower):
            emit.set(slot, emit.splat(0, emit.words))
        with emit.loop(begin, end, SUM_LANES) as i:
            value = emit.fmul(emit.load_floats(source, emit.imul(i, size), dtype), scale)
            whole = whole_numbers(emit, emit.select(alive, value, emit.splat(0.0)))
            high = _store_limbs(emit, codes, whole, emit.at(target, row_bytes(codes, i, emit)))
            emit.set(upper, emit.add(emit.get(upper, emit.words), high))
            low = emit.sub(whole, emit.shl(high, emit.splat(16, emit.words)))
            emit.set(lower, emit.add(emit.get(lower, emit.words), low))
        kept = emit.at(target, group_offset(codes, k_padded, begin, emit))
        emit.store(down, kept, 0, align=4)
        for place, slot in ((4, upper), (8, lower)):
            emit.store(sum_of_lanes(emit, emit.get(slot, emit.words)), kept, place, align=4)
    emit.finish()
    return function


def largest_bits(emit: Emit, elements: Callable[[Value], Value], begin: Value, end: Value) -> Value:
    """Return the bits of the largest magnitude of a row's elements, `SUM_LANES` of them from each index on."""
    largest = emit.slot(emit.words)
    emit.set(largest, emit.splat(0, emit.words))
    with emit.loop(begin, end, SUM_LANES) as i:
        magnitude, known = _magnitude(emit, elements(i)), emit.get(largest, emit.words)
        emit.set(largest, emit.select(emit.icmp_signed(">", magnitude, known), magnitude, known))
    lanes = emit.get(largest, emit.words)
    top = emit.extract_element(lanes, i32(0))
    for lane in range(1, SUM_LANES):
        other = emit.extract_element(lanes, i32(lane))
        top = emit.select(emit.icmp_signed(">", other, top), other, top)
    return top


def group_factors(emit: Emit, top: Value, bits: int) -> tuple[Value, Value, Value]:
    """Return 2^-e and whether the group is finite, both in every lane, and the bits of 2^e, a NaN where it is not.

    top: the bits of the group's largest magnitude; times 2^-e that is below 2^(bits + 1).
    """
    finite = emit.icmp_signed("<", top, i32(0x7F800000))
    exponent = emit.lshr(top, i32(23))
    exponent = emit.select(emit.icmp_signed("<", exponent, i32(LOW_EXPONENT)), i32(LOW_EXPONENT), exponent)
    # Biased exponents of 2^-e and 2^e.
    up = emit.bitcast(emit.shl(emit.sub(i32(254 + bits), exponent), i32(23)), F32)
    down = emit.select(finite, emit.shl(emit.sub(exponent, i32(bits)), i32(23)), i32(NAN_BITS))
    return emit.splat(up), emit.splat(finite, vector(finite.type, SUM_LANES)), down


def sum_of_lanes(emit: Emit, lanes: Value) -> Value:
    """Return the sum of `SUM_LANES` integers."""
    total = emit.extract_element(lanes, i32(0))
    for lane in range(1, SUM_LANES):
        total = emit.add(total, emit.extract_element(lanes, i32(lane)))
    return total


def _magnitude(emit: Emit, value: Value) -> Value:
    return emit.and_(emit.bitcast(value, emit.words), emit.splat(0x7FFFFFFF, emit.words))


def whole_numbers(emit: Emit, value: Value) -> Value:
    """Return floats below 2^30 as integers, rounded to nearest, ties to even."""
    sign = emit.and_(emit.bitcast(value, emit.words), emit.splat(-(1 << 31), emit.words))
    # 2^23 with the value's sign: what is added to it loses its fraction. From 2^23 on floats are integers.
    magic = emit.to_float(emit.or_(sign, emit.splat(0x4B000000, emit.words)))
    near = emit.fsub(emit.fadd(value, magic), magic)
    small = emit.icmp_signed("<", _magnitude(emit, value), emit.splat(0x4B000000, emit.words))
    return emit.fptosi(emit.select(small, near, value), emit.words)


def _store_limbs(emit: Emit, codes: Codes, whole: Value, target: Value) -> Value:
    """Store eight elements' limbs for one word of codes; return what lies above the last two limbs."""
    limbs: list[Value] = []
    rest = high = whole
    for place in range(codes.limbs - 1, 0, -1):
        limb = emit.ashr(emit.shl(rest, emit.splat(24, emit.words)), emit.splat(24, emit.words))
        rest = emit.ashr(emit.sub(rest, limb), emit.splat(8, emit.words))
        limbs.insert(0, limb)
        if place == codes.limbs - 2:
            high = rest
    limbs.insert(0, rest)
    at = 0
    # Elements whose codes one mask leaves: every second nibble of a word, or the same nibble of both its halves.
    parts = [(0, 2, 4, 6), (1, 3, 5, 7)] if codes.byte_pairs else [(j, j + 4) for j in range(4)]
    for part in parts:
        for limb in limbs:
            small = emit.trunc(emit.shuffle(limb, limb, part), vector(I8 if codes.byte_pairs else I16, len(part)))
            emit.store(small, target, at, align=4)
            at += 4
    return high


def emit_turn(
    emit: Emit, codes: Codes, words: int, rows: list[Value], places: list[tuple[Value, int]], a_at: Value, b_at: Value,
    pitch: int, sums: list[list[list[Value]]],
) -> None:  # fmt: skip
    """Add up to `TURN` words' products to the sums, slots of 32-bit integers [rows][vectors][limbs].

    rows: addresses of rows, whose limbs for these words lie at a_at; places: base and offset of each vector of columns,
    whose words lie at b_at, `pitch` bytes from one word to the next.
    """
    narrow = vector(I16, 2 * emit.lanes)
    short: list[list[list[Value | None]]] = [[[None] * codes.limbs for _ in places] for _ in rows]
    unit = CODES * codes.limbs * (1 if codes.byte_pairs else 2)
    for word in range(words):
        at = emit.iadd(b_at, word * pitch)
        for part in range(2 if codes.byte_pairs else 4):
            columns = [_masked(emit, codes, emit.load(base, emit.iadd(at, to), emit.words, align=4), part)
                       for base, to in places]  # fmt: skip
            for m, row in enumerate(rows):
                for limb in range(codes.limbs):
                    offset = word * unit + 4 * (part * codes.limbs + limb)
                    factor = emit.splat(emit.load(row, emit.iadd(a_at, offset), I32, align=4), emit.words)
                    for v, column in enumerate(columns):
                        product, known = _products(emit, codes, column, factor), short[m][v][limb]
                        total = product if known is None else emit.add(known, product)
                        # Regrouped by the compiler, more sums would be in flight than there are registers.
                        short[m][v][limb] = emit.opaque(total) if codes.byte_pairs else total
            emit.fence()
    for m, v, limb in ((m, v, i) for m in range(len(rows)) for v in range(len(places)) for i in range(codes.limbs)):
        slot, pairs = sums[m][v][limb], short[m][v][limb]
        assert pairs is not None and pairs.type == narrow
        emit.set(slot, emit.add(emit.get(slot, emit.words), _pair_sums(emit, codes, pairs)))


def _masked(emit: Emit, codes: Codes, word: Value, part: int) -> Value:
    """Return every second code of a word of eight as a byte, or every fourth as 16 bits, from code `part` on."""
    shifted = emit.lshr(word, emit.splat(4 * part, emit.words)) if part else word
    return emit.and_(shifted, emit.splat(0x0F0F0F0F if codes.byte_pairs else 0x000F000F, emit.words))


def _products(emit: Emit, codes: Codes, column: Value, factor: Value) -> Value:
    """Multiply codes with limbs: 16-bit sums of two products of bytes, or single products of 16 bits."""
    lanes, narrow = emit.lanes, vector(I16, 2 * emit.lanes)
    if not codes.byte_pairs:
        return emit.mul(emit.bitcast(column, narrow), emit.bitcast(factor, narrow))
    name = {4: "ssse3.pmadd.ub.sw.128", 8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}[lanes]
    small = vector(I8, 4 * lanes)
    return emit.call_external(f"llvm.x86.{name}", narrow, [emit.bitcast(column, small), emit.bitcast(factor, small)])


def _pair_sums(emit: Emit, codes: Codes, pairs: Value) -> Value:
    """Add the two 16-bit halves of each 32-bit lane."""
    if codes.byte_pairs:
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[emit.lanes]
        return emit.call_external(
            f"llvm.x86.{name}", emit.words, [pairs, ir.Constant(pairs.type, [1] * pairs.type.count)]
        )
    both, half = emit.bitcast(pairs, emit.words), emit.splat(16, emit.words)
    return emit.add(emit.ashr(emit.shl(both, half), half), emit.ashr(both, half))


def emit_nibble_group_end(
    emit: Emit, codes: Codes, sums: list[list[list[Value]]], kept: list[Value], totals: list[Value],
    scales: tuple[Value, Value], zeros: tuple[Value, Value],
) -> None:  # fmt: skip
    """Add a group's sums, [rows][vectors][limbs], to the rows' totals in memory.

    kept: addresses of what is kept of each row's group; scales, zeros: the address of this group's in the tile's first
    panel, and the bytes from panel to panel.
    """
    lanes = emit.lanes
    factors = [emit.splat(emit.load(group, 0, F32, align=4)) for group in kept]
    row_sums = [[emit.splat(emit.load(group, at, I32, align=4), emit.words) for at in (4, 8)] for group in kept]
    for v in range(len(sums[0])):
        panel, column = v * lanes // codes.panel, v * lanes % codes.panel
        scale = load_scale(emit, codes, emit.at(scales[0], emit.imul(scales[1], panel)), column)
        if codes.zero == "stored":
            at = emit.iadd(emit.imul(zeros[1], panel), column)
            zero = emit.zext(emit.load(zeros[0], at, vector(I8, lanes), 1), emit.words)
        else:
            zero = emit.splat(8, emit.words)
        for m, total in enumerate(totals):
            halves = _joined(emit, [emit.get(slot, emit.words) for slot in sums[m][v]])
            upper, lower = (
                emit.sitofp(emit.sub(half, emit.mul(zero, row_sum)), emit.floats)
                for half, row_sum in zip(halves, row_sums[m], strict=True)
            )
            value = emit.fmul(emit.fma(upper, emit.splat(65536.0), lower), factors[m])
            known = emit.load(total, 4 * v * lanes, emit.floats, align=4)
            emit.store(emit.fma(value, scale, known), total, 4 * v * lanes, align=4)


def _joined(emit: Emit, limbs: list[Value]) -> tuple[Value, Value]:
    """Return the sums of the upper limbs and of the last two, each as one integer."""
    *upper, third, last = limbs
    eight = emit.splat(8, emit.words)
    high = upper[0] if len(upper) == 1 else emit.add(emit.shl(upper[0], eight), upper[1])
    return high, emit.add(emit.shl(third, eight), last)
