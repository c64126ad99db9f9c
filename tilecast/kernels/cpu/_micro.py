"""The micro-kernel: a rows × columns tile of accumulators held in registers over one chunk of K.

Every output element is one chain acc = fma(a[k], b[k], acc) over ascending k from zero, whatever the tile's
shape, so tiles of all shapes give the same bits. The chunk's sum is then added to the running total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tilecast.kernels.cpu._build import BF16, F16, F32, I32, I64, PTR, Emit, Value, i64, internal_function, vector
from tilecast.kernels.cpu._codes import CODES_PER_WORD, Codes, emit_group_end, load_code
from tilecast.kernels.cpu._nibbles import GROUP_BYTES, TURN, emit_nibble_group_end, emit_turn, row_bytes
from tilecast.kernels.cpu._shorts import code_pairs, emit_short_group_end, first_sums, pair_product

Source = Literal["f32", "f16", "pairs", "int4", "int8", "fp8", "shorts"]

CACHE_LINE = 64


@dataclass(frozen=True, kw_only=True)
class Micro:
    """The shape of a micro-kernel.

    nv: vectors of columns; unroll: k steps per turn of the loop; source: how the weights lie: float32 or fp16
    rows of columns, words of two bf16 (k, k + 1), words of codes, or words of two codes of 16 bits each; panel: columns
    of one panel; dot: use the bf16 dot product ("native"), the same pairing without the instruction ("emulated", for
    tests), or none (""); prefetch: cache lines of later weights touched a turn; codes: how groups of quantised
    weights, whether still codes or staged, enter the totals.
    """

    nv: int
    unroll: int
    source: Source
    panel: int
    lanes: int
    dot: str = ""
    prefetch: int = 0
    codes: Codes | None = None

    @property
    def step(self) -> int:
        """k advanced at once: as many as a word holds."""
        return 2 if self.source in ("pairs", "shorts") else CODES_PER_WORD.get(self.source, 1)

    @property
    def short(self) -> bool:
        """Whether rows are integers of 16 bits, and sums integers of 32."""
        return self.codes is not None and self.codes.short

    @property
    def panels(self) -> int:
        """Panels side by side that one tile reads."""
        return max(1, self.nv * self.lanes // self.panel)

    @property
    def lines_per_panel(self) -> int:
        """Cache lines prefetched in each panel a turn."""
        return -(-self.prefetch // self.panels)

    @property
    def column_bytes(self) -> int:
        """Bytes of one column at one step."""
        return 2 if self.source == "f16" else 4


def emit_micro(module: Value, name: str, micro: Micro, mr: int, fma: bool) -> Value:
    """Emit `name`(a_pointers, a_offset, b, panel_stride, steps, c, c_stride, first, later, later_stride).

    a_pointers: array of `mr` row addresses, to which a_offset bytes are added; b: weights at this chunk;
    panel_stride: bytes between neighbouring panels; steps: steps in the chunk; c: float32 totals, rows c_stride
    bytes apart; first: 1 if the totals are to be set, not added to; later: where to prefetch from, in each of
    the panels that lie later_stride bytes apart.

    Quantised weights have five more: (…, scales, scale_stride, zeros, zero_stride, sums): the chunk's first scales and
    zero points in the first panel, bytes from panel to panel, and where in a row lies what is kept of its groups.
    """
    words = [PTR, I64, PTR, I64, I64, PTR, I64, I64, PTR, I64]
    more = [] if micro.codes is None else [PTR, I64, PTR, I64, I64]
    function = internal_function(module, name, [*words, *more], inline=False)
    emit = Emit(function, micro.lanes, fma)
    a_pointers, a_offset, b, panel_stride, steps, c, c_stride, first, later, later_stride = function.args[:10]

    a_size = 2 * micro.step if micro.short else 4 * (micro.step if not micro.dot else 1)
    starts = [emit.load(a_pointers, 8 * m, PTR) for m in range(mr)]
    rows = [emit.at(start, a_offset) for start in starts]
    bases = [emit.at(b, emit.imul(panel_stride, p)) for p in range(micro.panels)]
    kind, zero = (emit.words, emit.splat(0, emit.words)) if micro.short else (emit.floats, emit.splat(0.0))
    acc = [[emit.slot(kind, zero) for _ in range(micro.nv)] for _ in range(mr)]
    pitch = micro.panel * micro.column_bytes

    def turn(index: Value, unroll: int) -> None:
        _prefetch(emit, micro, later, later_stride, emit.idiv(index, micro.unroll))
        for u in range(unroll):
            step = emit.iadd(index, u)
            _step(emit, micro, rows, bases, acc, emit.imul(step, a_size), emit.imul(step, pitch))

    def turns(start: Value, stop: Value) -> None:
        count = emit.isub(stop, start)
        whole = emit.iadd(start, emit.imul(emit.idiv(count, micro.unroll), micro.unroll))
        with emit.loop(start, whole, micro.unroll) as index:
            turn(index, micro.unroll)
        if micro.unroll > 1:
            with emit.loop(whole, stop) as index:
                turn(index, 1)

    is_first = emit.icmp_unsigned("!=", first, i64(0))
    totals = [emit.at(c, emit.imul(c_stride, m)) for m in range(mr)]
    if micro.codes is not None:
        with emit.builder.if_then(is_first):
            for row in totals:
                for v in range(micro.nv):
                    emit.store(emit.splat(0.0), row, 4 * v * micro.lanes, align=4)
    if micro.source == "int4" and micro.codes is not None and not micro.short:
        _nibble_groups(emit, micro, micro.codes, starts, bases, totals)
        emit.finish()
        return function
    if micro.codes is not None:
        _groups(emit, micro, micro.codes, acc, starts, totals, turns)
        emit.finish()
        return function
    turns(i64(0), steps)
    for m, row in enumerate(totals):
        for v in range(micro.nv):
            value = emit.get(acc[m][v], emit.floats)
            offset = 4 * v * micro.lanes
            total = emit.fadd(emit.load(row, offset, emit.floats, align=4), value)
            emit.store(emit.select(is_first, value, total), row, offset, align=4)
    emit.finish()
    return function


def _groups(
    emit: Emit, micro: Micro, codes: Codes, acc: list[list[Value]], starts: list[Value], totals: list[Value],
    turns: Callable[[Value, Value], None],
) -> None:  # fmt: skip
    """Run the chunk's groups one after the other, each by itself, and add what they come to to the totals."""
    steps = emit.function.args[4]
    scales, scale_stride, zeros, zero_stride, sums_at = emit.function.args[10:]
    length = codes.group // micro.step
    with emit.loop(0, emit.ceil_div(steps, length)) as group:
        kept = [emit.at(row, emit.iadd(sums_at, emit.imul(group, GROUP_BYTES))) for row in starts]
        first = [[emit.splat(0.0)] * micro.nv] * len(acc)
        if codes.short:
            zeros_at = emit.at(zeros, emit.imul(group, codes.panel))
            first = first_sums(emit, codes, len(acc), micro.nv, kept, (zeros_at, zero_stride))
        for slots, values in zip(acc, first, strict=True):
            for slot, value in zip(slots, values, strict=True):
                emit.set(slot, value)
        start = emit.imul(group, length)
        span = emit.idiv(emit.imul(group, codes.group), codes.span)
        at = emit.at(scales, emit.imul(span, codes.scale_pitch(emit.lanes)))
        if codes.moves and not codes.shared:
            _prefetch_scales(emit, micro, codes, at, scale_stride)
        turns(start, emit.imin(steps, emit.iadd(start, length)))
        if codes.short:
            sums = [[emit.get(slot, emit.words) for slot in row] for row in acc]
            emit_short_group_end(emit, codes, sums, kept, totals, (at, scale_stride))
        else:
            sums = [[emit.get(slot, emit.floats) for slot in row] for row in acc]
            emit_group_end(emit, codes, sums, totals, (at, scale_stride))


def _nibble_groups(
    emit: Emit,
    micro: Micro,
    codes: Codes,
    starts: list[Value],
    bases: list[Value],
    totals: list[Value],
) -> None:
    """Run the chunk's groups of 4-bit codes, in turns of as many words as sums of 16 bits have room for."""
    a_offset, steps = emit.function.args[1], emit.function.args[4]
    later, later_stride, scales, scale_stride, zeros, zero_stride, sums_at = emit.function.args[8:]
    rows = [emit.at(start, a_offset) for start in starts]
    places = [_place(micro, bases, v) for v in range(micro.nv)]
    pitch, turns = micro.panel * micro.column_bytes, codes.group // (micro.step * TURN)
    # In memory, where they are touched once a turn: registers are for the sums of 16 bits.
    memory = emit.hidden(emit.slot(emit.words, size=len(rows) * len(places) * codes.limbs))
    sums = [
        [
            [emit.at(memory, 4 * emit.lanes * ((m * len(places) + v) * codes.limbs + i)) for i in range(codes.limbs)]
            for v in range(len(places))
        ]
        for m in range(len(rows))
    ]
    with emit.loop(0, emit.idiv(steps, turns * TURN)) as group:
        for slot in (slot for row in sums for limbs in row for slot in limbs):
            emit.set(slot, emit.splat(0, emit.words))
        at, zeros_at = emit.at(scales, emit.imul(group, codes.scale_pitch(emit.lanes))), emit.imul(group, codes.panel)
        _prefetch_scales(emit, micro, codes, at, scale_stride)
        if codes.zero == "stored":
            _prefetch_scales(emit, micro, codes, emit.at(zeros, zeros_at), zero_stride)
        first = emit.imul(group, turns)
        with emit.loop(first, emit.iadd(first, turns)) as turn:
            _prefetch(emit, micro, later, later_stride, turn)
            word = emit.imul(turn, TURN)
            a_at = row_bytes(codes, emit.imul(word, micro.step), emit)
            emit_turn(emit, codes, TURN, rows, places, a_at, emit.imul(word, pitch), pitch, sums)
        kept = emit.iadd(sums_at, emit.imul(group, GROUP_BYTES))
        emit_nibble_group_end(
            emit, codes, sums, [emit.at(start, kept) for start in starts], totals,
            (at, scale_stride), (emit.at(zeros, zeros_at), zero_stride),
        )  # fmt: skip


def _prefetch_scales(emit: Emit, micro: Micro, codes: Codes, at: Value, stride: Value) -> None:
    """Ask for the same group's scales or zero points in the panels of the next tile: they are short streams."""
    count = max(1, micro.nv * micro.lanes // codes.panel)
    for panel in range(count):
        emit.prefetch(emit.at(at, emit.imul(stride, count + panel)))


def _prefetch(emit: Emit, micro: Micro, later: Value, later_stride: Value, turn: Value) -> None:
    at = emit.imul(turn, CACHE_LINE * micro.lines_per_panel)
    for line in range(micro.prefetch):
        panel, offset = line % micro.panels, CACHE_LINE * (line // micro.panels)
        emit.prefetch(emit.at(emit.at(later, emit.imul(later_stride, panel)), emit.iadd(at, offset)))


def _step(
    emit: Emit, micro: Micro, rows: list[Value], bases: list[Value], acc: list[list[Value]], a_at: Value, b_at: Value
) -> None:
    if micro.codes is not None and micro.short:
        _step_shorts(emit, micro, micro.codes, rows, bases, acc, a_at, b_at)
        return
    if micro.source in CODES_PER_WORD:
        _step_codes(emit, micro, rows, bases, acc, a_at, b_at)
        return
    columns = [_weights(emit, micro, bases, v, b_at) for v in range(micro.nv)]
    if micro.dot:
        for m, row in enumerate(rows):
            pair = emit.splat(emit.load(row, a_at, I32, align=4), emit.words)
            for v, word in enumerate(columns):
                emit.set(acc[m][v], _dot(emit, micro, emit.get(acc[m][v], emit.floats), pair, word[0]))
        return
    if micro.source == "pairs":
        columns = [_halves(emit, word[0]) for word in columns]
    for k in range(micro.step):
        for m, row in enumerate(rows):
            a = emit.splat(emit.load(row, emit.iadd(a_at, 4 * k), F32, align=4))
            for v in range(micro.nv):
                emit.set(acc[m][v], emit.fma(a, columns[v][k], emit.get(acc[m][v], emit.floats)))


def _step_codes(
    emit: Emit, micro: Micro, rows: list[Value], bases: list[Value], acc: list[list[Value]], a_at: Value, b_at: Value
) -> None:
    """Make one code of each word into a float at a time, so that registers are left for the sums."""
    for k in range(micro.step):
        places = [_place(micro, bases, v) for v in range(micro.nv)]
        columns = [load_code(emit, micro.source, base, emit.iadd(b_at, offset), k) for base, offset in places]
        for m, row in enumerate(rows):
            a = emit.splat(emit.load(row, emit.iadd(a_at, 4 * k), F32, align=4))
            for v, column in enumerate(columns):
                emit.set(acc[m][v], emit.fma(a, column, emit.get(acc[m][v], emit.floats)))
        emit.fence()


def _step_shorts(
    emit: Emit, micro: Micro, codes: Codes, rows: list[Value], bases: list[Value], acc: list[list[Value]],
    a_at: Value, b_at: Value,
) -> None:  # fmt: skip
    """Multiply pairs of codes, two of each word at a time, with pairs of elements of the rows."""
    staged = micro.source == "shorts"
    for pair in range(1 if staged else len(codes.pairs)):
        columns = [_weights(emit, micro, bases, v, b_at)[0] for v in range(micro.nv)]
        if not staged:
            columns = [code_pairs(emit, codes, word, pair) for word in columns]
        for m, row in enumerate(rows):
            factor = emit.splat(emit.load(row, emit.iadd(a_at, 4 * pair), I32, align=4), emit.words)
            for v, column in enumerate(columns):
                emit.set(acc[m][v], pair_product(emit, codes, column, factor, emit.get(acc[m][v], emit.words)))
        emit.fence()


def _weights(emit: Emit, micro: Micro, bases: list[Value], v: int, b_at: Value) -> list[Value]:
    base, column_offset = _place(micro, bases, v)
    offset = emit.iadd(b_at, column_offset)
    if micro.source == "f32":
        return [emit.load(base, offset, emit.floats, align=4)]
    if micro.source == "f16":
        return [emit.fpext(emit.load(base, offset, vector(F16, micro.lanes), align=2), emit.floats)]
    return [emit.load(base, offset, emit.words, align=4)]


def _place(micro: Micro, bases: list[Value], v: int) -> tuple[Value, int]:
    """Return the panel of a tile's vector v of columns, and the bytes to it within one step."""
    column = v * micro.lanes
    return bases[column // micro.panel] if len(bases) > 1 else bases[0], column % micro.panel * micro.column_bytes


def _halves(emit: Emit, word: Value) -> list[Value]:
    """Widen words of two bf16 to float32: the low half is k, the high half k + 1."""
    low = emit.shl(word, emit.splat(16, emit.words))
    high = emit.and_(word, emit.splat(-65536, emit.words))
    return [emit.to_float(low), emit.to_float(high)]


def _dot(emit: Emit, micro: Micro, acc: Value, pair: Value, word: Value) -> Value:
    if micro.dot == "emulated":
        for a, b in zip(_halves(emit, pair), _halves(emit, word), strict=True):
            acc = emit.fma(a, b, acc)
        return acc
    shorts = vector(BF16, 2 * micro.lanes)
    operands = [acc, emit.bitcast(pair, shorts), emit.bitcast(word, shorts)]
    return emit.call_external(f"llvm.x86.avx512bf16.dpbf16ps.{32 * micro.lanes}", emit.floats, operands)
