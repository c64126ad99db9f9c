"""Quantised weights in the generator: codes of K in words of 32 bits, made into floats in registers.

A word holds 8 codes of 4 bits or 4 of 8, ascending in K from its lowest bits, of one column. Codes of 8 bits become
floats by the cheapest exact steps, which leave powers of two over: those are taken out of the rows beforehand
(`row_factor`) and out of the group's sum afterwards (`sum_factor`). Scaling by powers of two changes no rounding within
float32's range. Codes of 4 bits stay integers (`_nibbles`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I8, I16, I64, PTR, Emit, Value, internal_function, load_one, vector
from tilecast.problem import DTYPES, WeightFormat

CodeKind = Literal["int4", "int8", "fp8"]
CODES_PER_WORD = {"int4": 8, "int8": 4, "fp8": 4}
LIMBS = {"fp32": 4, "bf16": 3, "fp16": 3}
"""Bytes that stand for an element of a row where it is multiplied with codes of 4 bits."""
SUM_LANES = 8
"""Elements of a row that are made ready at once."""
FP8_ROW_EXPONENT, FP8_SUM_EXPONENT = 64, 56
"""e4m3 bits in a float32's place stand for 2^-120 of their value, subnormals included."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """How quantised weights lie and how a group of K enters the totals: total += scale · sum.

    kind: `int4`, `int8` or `fp8`; group: elements of K that are summed before they are scaled; span: elements that
    share a scale; moves: whether each span has scales of its own, or one serves all of K; scale: dtype of the scales;
    shared: one scale a vector of columns, not one a column; panel: columns of one panel of scales. Of codes of 4 bits:
    zero: `stored` (a byte a column and span) or `eight`; limbs: bytes for an element of a row; byte_pairs: whether the
    target multiplies bytes and adds pairs of products in one instruction. short: rows are integers of 16 bits
    (`_shorts`), whatever the bits of codes.
    """

    kind: CodeKind
    group: int
    span: int
    moves: bool
    scale: str
    shared: bool
    zero: str
    panel: int
    limbs: int = 0
    byte_pairs: bool = False
    short: bool = False

    @property
    def per_word(self) -> int:
        """Codes of one word."""
        return CODES_PER_WORD[self.kind]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Codes of a word that one product of pairs takes, in the order in which products take them."""
        return tuple((j, j + self.per_word // 2) for j in range(self.per_word // 2))

    @property
    def row_element_bytes(self) -> int:
        """Bytes that an element of a row takes."""
        return 2 if self.short else self.limbs * (1 if self.byte_pairs else 2) if self.limbs else 4

    def scale_pitch(self, lanes: int) -> int:
        """Return the bytes from a span's scales to the next one's, in a panel."""
        return (4 * self.panel // lanes if self.shared else self.panel * DTYPES[self.scale]) if self.moves else 0

    def row_factor(self) -> float:
        """Return what the rows' elements are multiplied by."""
        return 2.0 ** (FP8_ROW_EXPONENT if self.kind == "fp8" else -24)

    def sum_factor(self) -> float:
        """Return what a group's sum is multiplied by, beside its scale."""
        return 2.0**FP8_SUM_EXPONENT if self.kind == "fp8" else 1.0


def codes_of(
    form: WeightFormat, *, chain: int, scale: str, panel: int, dtype: str, byte_pairs: bool, short: bool = False
) -> Codes:
    """Return how a format's weights lie; without groups, chains of `chain` elements are scaled alike."""
    span, nibbles = form.group or chain, form.bits == 4
    return Codes(
        kind="int4" if nibbles else cast(CodeKind, form.kind), group=span, span=span, moves=form.group > 0, scale=scale,
        shared=form.rows != 1, zero={"awq": "stored", "int4": "eight"}.get(form.kind, ""), panel=panel,
        limbs=LIMBS[dtype] if nibbles and not short else 0, byte_pairs=byte_pairs and (nibbles or short), short=short,
    )  # fmt: skip


def decode(emit: Emit, kind: str, word: Value, k: int) -> Value:
    """Return the floats behind 8-bit code k of a vector of words, times what `row_factor` and `sum_factor` undo."""

    def constant(value: int) -> Value:
        return emit.splat(value - (1 << 32) if value >> 31 else value, emit.words)

    # What lies below a code in its word does not matter.
    high = emit.shl(word, constant(24 - 8 * k)) if k < 3 else word
    if kind == "int8":
        return emit.sitofp(emit.and_(high, constant(0xFF000000)), emit.floats)
    # Sign, four bits of exponent and three of mantissa go where float32 has its sign and the lowest of its exponent.
    return emit.to_float(emit.and_(emit.ashr(high, constant(4)), constant(0x87F00000)))


def decode_pairs(emit: Emit, word: Value) -> list[Value]:
    """Return words of two bf16, (k, k + 1) and (k + 2, k + 3), that hold what `decode` makes of a word's e4m3 codes."""
    narrow = vector(I16, 2 * emit.lanes)
    small = emit.bitcast(word, vector(I8, 4 * emit.lanes))
    # The codes of a pair go to the same byte of both halves.
    order = [4 * lane + byte for lane in range(emit.lanes) for byte in (0, 2, 1, 3)]
    high = emit.bitcast(emit.shuffle(small, small, order), narrow)
    four, eight = emit.splat(4, narrow), emit.splat(8, narrow)
    kept = emit.splat(0x87F0 - (1 << 16), narrow)
    pairs = [emit.and_(emit.ashr(each, four), kept) for each in (emit.shl(high, eight), high)]
    return [emit.bitcast(pair, emit.words) for pair in pairs]


def load_code(emit: Emit, kind: str, base: Value, offset: Value, k: int) -> Value:
    """Load a vector of words and return the floats behind code k, as `decode` does.

    Codes of 8 bits are loaded so that they end up highest, which spares the shift: up to three bytes before the words
    are read too.
    """
    return decode(emit, kind, emit.load(base, emit.isub(offset, 3 - k), emit.words, align=1), 3)


def emit_group_end(
    emit: Emit, codes: Codes, sums: list[list[Value]], totals: list[Value], scales: tuple[Value, Value]
) -> None:
    """Add a group's sums, [rows][vectors], to the rows' totals in memory.

    scales: the address of this group's in the tile's first panel, and the bytes from panel to panel.
    """
    lanes = emit.lanes
    for v in range(len(sums[0])):
        panel, column = v * lanes // codes.panel, v * lanes % codes.panel
        scale = load_scale(emit, codes, emit.at(scales[0], emit.imul(scales[1], panel)), column)
        for m, total in enumerate(totals):
            known = emit.load(total, 4 * v * lanes, emit.floats, align=4)
            emit.store(emit.fma(sums[m][v], scale, known), total, 4 * v * lanes, align=4)


def load_scale(emit: Emit, codes: Codes, base: Value, column: int) -> Value:
    """Return the scales of a vector of columns, from `column` of a panel's scales at `base` on."""
    if codes.shared:
        scale = emit.splat(emit.load(base, 4 * column // emit.lanes, F32, align=4))
    else:
        scale = emit.load_floats(base, column * DTYPES[codes.scale], codes.scale)
    factor = codes.sum_factor()
    return scale if factor == 1.0 else emit.fmul(scale, emit.splat(factor))


def emit_widen_row(module: Value, name: str, codes: Codes, dtype: str, fma: bool) -> Value:
    """Emit `name`(source, target, k, k_padded): a row as float32 times its factor, zeros up to k_padded."""
    function = internal_function(module, name, [PTR, PTR, I64, I64])
    emit = Emit(function, SUM_LANES, fma)
    source, target, k, k_padded = function.args
    size, factor = DTYPES[dtype], codes.row_factor()
    whole = emit.imul(emit.idiv(k, SUM_LANES), SUM_LANES)
    with emit.loop(0, whole, SUM_LANES) as i:
        value = emit.load_floats(source, emit.imul(i, size), dtype)
        emit.store(emit.fmul(value, emit.splat(factor)), target, emit.imul(i, 4), align=4)
    with emit.loop(whole, k) as i:
        value = load_one(emit, source, emit.imul(i, size), dtype)
        emit.store(emit.fmul(value, ir.Constant(F32, factor)), target, emit.imul(i, 4), align=4)
    with emit.loop(k, k_padded) as i:
        emit.store(ir.Constant(F32, 0.0), target, emit.imul(i, 4), align=4)
    emit.finish()
    return function
