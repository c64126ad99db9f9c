"""Attention around the micro-kernel: scores, softmax and the weighted sum of values, with bits that no batch changes.

One function runs on every thread of one parallel region. A job is a block of queries of one sequence and one head of
keys, all query heads of that group together. What a row (one query of one head) computes:
- a score for each key: one chain of fused multiply-adds over ascending head dimensions; times the scale, plus bias;
- the largest score (exact in any order), then exp(score - largest) of each key;
- their sum: by lanes counted from the row's first key, then over the lanes in ascending order;
- for each value dimension chains of VALUE_CHAIN keys, counted from the row's first key, added in ascending order.
No step depends on where the row's first key lies in the cache, on other rows, or on keys outside its range.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from tilecast.kernels.cpu._attention_variant import ARGS, ENTRY, POINTERS, VALUE_CHAIN, Variant
from tilecast.kernels.cpu._build import (
    F32,
    I8,
    I32,
    I64,
    PTR,
    VOID,
    Emit,
    Value,
    i32,
    i64,
    internal_function,
    load_one,
    vector,
)
from tilecast.kernels.cpu._math import const, exp
from tilecast.kernels.cpu._micro import emit_micro
from tilecast.kernels.cpu._stage import emit_stage_plain
from tilecast.problem import DTYPES


class Attention:
    """Emits one variant's entry function."""

    def __init__(self, module: Value, variant: Variant) -> None:
        self.variant, self.module = variant, module
        v = variant
        self.micros = [emit_micro(module, f"scores_{m}", v.micro, m, v.fma) for m in range(1, v.mr + 1)]
        self.stage = emit_stage_plain(module, "stage_keys", v.micro, v.dtype, v.fma)
        self.weighted = [_emit_weighted(module, f"values_{m}", v, m) for m in range(1, v.mr + 1)]
        function = ir.Function(module, ir.FunctionType(VOID, [PTR]), ENTRY)
        function.attributes.add("nounwind")
        self.emit = Emit(function, v.lanes, v.fma)
        block = function.args[0]
        self.args = {
            name: self.emit.load(block, 8 * i, PTR if name in POINTERS else I64) for i, name in enumerate(ARGS)
        }
        self.block = block
        self.size = DTYPES[v.dtype]

    def build(self) -> None:
        """Emit the loop over jobs; later queries, which have the most keys, go first."""
        emit, args = self.emit, self.args
        thread = self._take("thread")
        scratch = emit.at(args["scratch"], emit.imul(thread, args["scratch_stride"]))
        names = ("pointers", "staged", "queries", "scores", "sums", "rows")
        self.scratch = {name: emit.at(scratch, args[f"at_{name}"]) for name in names}
        blocks = emit.ceil_div(args["queries"], args["block"])
        pairs = emit.imul(args["batch"], args["heads"])
        jobs = emit.imul(blocks, pairs)
        with emit.forever() as done:
            job = self._take("job")
            emit.leave_if(emit.icmp_unsigned(">=", job, jobs), done)
            pair = emit.urem(job, pairs)
            block = emit.isub(emit.isub(blocks, i64(1)), emit.udiv(job, pairs))
            self.sequence, self.head = emit.udiv(pair, args["heads"]), emit.urem(pair, args["heads"])
            query0 = emit.imul(block, args["block"])
            count = emit.imin(args["block"], emit.isub(args["queries"], query0))
            self._job(query0, emit.imul(count, args["groups"]))
        emit.finish()

    def _take(self, name: str) -> Value:
        counter = self.emit.at(self.block, 8 * ARGS.index(name))
        return self.emit.atomic_rmw("add", counter, i64(1), "monotonic")

    def _of(self, name: str, head: Value, token: Value) -> Value:
        """Return the address of a token's row of an operand."""
        emit, args = self.emit, self.args
        at = emit.iadd(emit.imul(self.sequence, args[f"{name}_b"]), emit.imul(head, args[f"{name}_h"]))
        return emit.at(args[name], emit.iadd(at, emit.imul(token, args[f"{name}_t"])))

    def _row(self, query0: Value, row: Value) -> tuple[Value, Value]:
        """Return a row's (query head, query): the heads of a group lie side by side, since they share their range."""
        emit, groups = self.emit, self.args["groups"]
        head = emit.iadd(emit.imul(self.head, groups), emit.urem(row, groups))
        return head, emit.iadd(query0, emit.udiv(row, groups))

    def _range(self, row: Value) -> tuple[Value, Value]:
        """Return a row's first key and the one after its last, relative to the job's first key."""
        at = self.emit.imul(row, 16)
        rows = self.scratch["rows"]
        return self.emit.load(rows, at, I64), self.emit.load(rows, self.emit.iadd(at, 8), I64)

    def _job(self, query0: Value, rows: Value) -> None:
        emit = self.emit
        low, high = self._prepare_rows(query0, rows)
        with emit.builder.if_then(emit.icmp_unsigned("<", low, high)):
            self._scores(low, emit.isub(high, low), rows)
            with emit.loop(0, rows) as row:
                self._softmax(query0, row, low)
            self._values(query0, low, rows)
        with emit.builder.if_then(emit.icmp_unsigned(">=", low, high)), emit.loop(0, rows) as row:
            self._store(query0, row, None)

    # Before the scores ------------------------------------------------------------

    def _prepare_rows(self, query0: Value, rows: Value) -> tuple[Value, Value]:
        """Widen the queries, note the ranges of keys, and return the range that covers all rows."""
        emit, args, v = self.emit, self.args, self.variant
        low, high = emit.slot(I64), emit.slot(I64)
        emit.set(low, i64(1 << 40))
        emit.set(high, i64(0))
        row_bytes = emit.imul(args["depth"], 4)
        whole = emit.imul(emit.idiv(args["depth"], v.lanes), v.lanes)
        with emit.loop(0, rows) as row:
            head, query = self._row(query0, row)
            source = self._of("query", head, query)
            target = emit.at(self.scratch["queries"], emit.imul(row, row_bytes))
            emit.store(target, self.scratch["pointers"], emit.iadd(emit.imul(row, 8), 8 * v.keys))
            with emit.loop(0, whole, v.lanes) as i:
                value = emit.load_floats(source, emit.imul(i, self.size), v.dtype)
                emit.store(value, target, emit.imul(i, 4), align=4)
            with emit.loop(whole, args["depth"]) as i:
                emit.store(load_one(emit, source, emit.imul(i, self.size), v.dtype), target, emit.imul(i, 4))
            at = emit.iadd(emit.imul(self.sequence, args["range_b"]), emit.imul(head, args["range_h"]))
            at = emit.iadd(at, emit.imul(query, 4))
            first, stop = (emit.zext(emit.load(args[name], at, I32), I64) for name in ("first", "stop"))
            emit.store(first, self.scratch["rows"], emit.imul(row, 16))
            emit.store(stop, self.scratch["rows"], emit.iadd(emit.imul(row, 16), 8))
            has = emit.icmp_unsigned("<", first, stop)
            known = emit.get(low, I64), emit.get(high, I64)
            emit.set(low, emit.select(has, emit.imin(first, known[0]), known[0]))
            longer = emit.select(emit.icmp_unsigned("<", known[1], stop), stop, known[1])
            emit.set(high, emit.select(has, longer, known[1]))
        begin = emit.get(low, I64)
        with emit.loop(0, rows) as row:
            for part in (0, 8):
                at = emit.iadd(emit.imul(row, 16), part)
                # A row without keys ends up with an empty range too: both of its ends are one number.
                value = emit.load(self.scratch["rows"], at, I64)
                emit.store(emit.isub(value, begin), self.scratch["rows"], at)
        return begin, emit.get(high, I64)

    def _scores(self, low: Value, count: Value, rows: Value) -> None:
        """Write the products of all rows with all keys of the job's range, a panel of keys at a time."""
        emit, args, v = self.emit, self.args, self.variant
        pitch = emit.imul(args["pitch"], 4)
        last = emit.isub(count, i64(1))
        with emit.loop(0, count, v.keys) as column:
            with emit.loop(0, i64(v.keys)) as i:
                key = emit.iadd(low, emit.imin(emit.iadd(column, i), last))
                emit.store(self._of("key", self.head, key), self.scratch["pointers"], emit.imul(i, 8))
            operands = [self.scratch["pointers"], i64(0), args["depth"], self.scratch["staged"]]
            emit.builder.call(self.stage, operands)
            blocks = emit.ceil_div(rows, v.mr)
            with emit.loop(0, blocks) as i:
                start = emit.udiv(emit.imul(i, rows), blocks)
                size = emit.isub(emit.udiv(emit.imul(emit.iadd(i, 1), rows), blocks), start)
                a = emit.at(self.scratch["pointers"], emit.iadd(emit.imul(start, 8), 8 * v.keys))
                c = emit.at(self.scratch["scores"], emit.iadd(emit.imul(start, pitch), emit.imul(column, 4)))
                staged = self.scratch["staged"]
                operands = [a, i64(0), staged, i64(0), args["depth"], c, pitch, i64(1), staged, i64(0)]
                self._switch(self.micros, size, operands)

    def _switch(self, functions: list[Value], size: Value, operands: list[Value]) -> None:
        """Call the function for `size` rows."""
        emit = self.emit
        after = emit.function.append_basic_block("after")
        switch = emit.builder.switch(size, after)
        for m, function in enumerate(functions, start=1):
            case = emit.function.append_basic_block(f"rows_{m}")
            switch.add_case(i64(m), case)
            emit.builder.position_at_end(case)
            emit.builder.call(function, operands)
            emit.builder.branch(after)
        emit.builder.position_at_end(after)

    # Softmax ------------------------------------------------------------------------

    def _softmax(self, query0: Value, row: Value, low: Value) -> None:
        """Turn a row's scores into exp(score - largest), zero where masked, and note their sum."""
        emit, args, v = self.emit, self.args, self.variant
        first, stop = self._range(row)
        head, query = self._row(query0, row)
        at = emit.iadd(emit.imul(row, args["pitch"]), first)
        scores = emit.at(self.scratch["scores"], emit.imul(at, 4))
        count = emit.isub(stop, first)
        key0 = emit.iadd(low, first)
        extras = {name: self._of(name, head, query) for name in ("mask", "bias") if getattr(v, name)}
        lowest = const(emit, float("-inf"))
        largest = emit.slot(emit.floats, lowest)
        lane = ir.Constant(emit.words, list(range(v.lanes)))
        with emit.loop(0, count, v.lanes) as i:
            value = emit.fmul(emit.load(scores, emit.imul(i, 4), emit.floats, align=4), self._splat_bits("scale"))
            if v.softcap:
                cap = self._splat_bits("softcap")
                twice = emit.fadd(value, value)
                share = emit.fdiv(emit.fadd(cap, cap), emit.fadd(const(emit, 1.0), exp(emit, emit.fdiv(twice, cap))))
                value = emit.fsub(cap, share)
            left = emit.splat(emit.trunc(emit.isub(count, i), I32), emit.words)
            inside = emit.icmp_signed("<", lane, left)
            key = emit.iadd(key0, i)
            if v.bias:
                value = emit.fadd(value, emit.load(extras["bias"], emit.imul(key, 4), emit.floats, align=4))
            if v.mask:
                real = emit.load(extras["mask"], key, vector(I8, v.lanes), align=1)
                inside = emit.and_(inside, emit.icmp_unsigned("!=", real, emit.splat(0, real.type)))
            value = emit.select(inside, value, lowest)
            emit.store(value, scores, emit.imul(i, 4), align=4)
            known = emit.get(largest, emit.floats)
            emit.set(largest, emit.select_lanes(">", value, known, value, known))
        top = self._largest_lane(emit.get(largest, emit.floats))
        if v.sinks:
            sink = emit.splat(emit.load(args["sinks"], emit.imul(head, 4), F32))
            top = emit.select_lanes(">", sink, top, sink, top)
        total = emit.slot(emit.floats, emit.splat(0.0))
        with emit.loop(0, count, v.lanes) as i:
            value = emit.load(scores, emit.imul(i, 4), emit.floats, align=4)
            share = emit.select_lanes("==", value, lowest, emit.splat(0.0), exp(emit, emit.fsub(value, top)))
            emit.store(share, scores, emit.imul(i, 4), align=4)
            emit.set(total, emit.fadd(emit.get(total, emit.floats), share))
        lanes = emit.get(total, emit.floats)
        together = emit.extract_element(lanes, i32(0))
        for number in range(1, v.lanes):
            together = emit.fadd(together, emit.extract_element(lanes, i32(number)))
        if v.sinks:
            together = emit.fadd(together, emit.extract_element(exp(emit, emit.fsub(sink, top)), i32(0)))
        emit.store(together, self.scratch["sums"], emit.imul(row, 4), align=4)

    def _splat_bits(self, name: str) -> Value:
        word = self.emit.trunc(self.args[name], I32)
        return self.emit.splat(self.emit.bitcast(word, F32))

    def _largest_lane(self, lanes: Value) -> Value:
        emit, step = self.emit, self.variant.lanes // 2
        while step:
            order = [(number + step) % self.variant.lanes for number in range(self.variant.lanes)]
            other = emit.shuffle(lanes, lanes, order)
            lanes = emit.select_lanes(">", other, lanes, other, lanes)
            step //= 2
        return lanes

    # Values ---------------------------------------------------------------------------

    def _values(self, query0: Value, low: Value, rows: Value) -> None:
        """Sum the values, up to mr neighbouring rows with the same first key together."""
        emit, v = self.emit, self.variant
        row, size, least, most = (emit.slot(I64) for _ in range(4))
        emit.set(row, i64(0))
        with emit.forever() as done:
            start = emit.get(row, I64)
            emit.leave_if(emit.icmp_unsigned(">=", start, rows), done)
            first, stop = self._range(start)
            for slot, value in ((size, i64(1)), (least, stop), (most, stop)):
                emit.set(slot, value)
            with emit.forever() as grouped:
                count = emit.get(size, I64)
                following = emit.iadd(start, count)
                full = emit.icmp_unsigned(">=", count, i64(v.mr))
                emit.leave_if(emit.or_(full, emit.icmp_unsigned(">=", following, rows)), grouped)
                other_first, other_stop = self._range(following)
                emit.leave_if(emit.icmp_unsigned("!=", first, other_first), grouped)
                emit.set(least, emit.imin(emit.get(least, I64), other_stop))
                longest = emit.get(most, I64)
                emit.set(most, emit.select(emit.icmp_unsigned("<", longest, other_stop), other_stop, longest))
                emit.set(size, emit.iadd(count, 1))
            self._group(low, start, emit.get(size, I64), first, emit.get(least, I64), emit.get(most, I64))
            with emit.loop(0, emit.get(size, I64)) as i:
                self._store(query0, emit.iadd(start, i), self._totals(i))
            emit.set(row, emit.iadd(start, emit.get(size, I64)))

    def _totals(self, row: Value) -> Value:
        """Return where a group's row has its totals; the sums of the chain in progress lie behind those of mr rows."""
        emit = self.emit
        return emit.at(self.scratch["staged"], emit.imul(emit.imul(row, self.args["width"]), 4))

    def _group(self, low: Value, start: Value, size: Value, first: Value, least: Value, most: Value) -> None:
        emit, args, v = self.emit, self.args, self.variant
        width = emit.imul(args["width"], 4)
        pitch = emit.imul(args["pitch"], 4)
        scores = emit.at(self.scratch["scores"], emit.imul(start, pitch))
        with emit.loop(first, most, VALUE_CHAIN) as chain:
            end = emit.iadd(chain, VALUE_CHAIN)
            shared = emit.imin(end, least)
            shared = emit.select(emit.icmp_unsigned("<", shared, chain), chain, shared)
            with emit.loop(0, args["width"], v.value_vectors * v.lanes) as column:
                sums = emit.at(self._totals(i64(v.mr)), emit.imul(column, 4))
                value = emit.at(
                    self._of("value", self.head, emit.iadd(low, chain)), emit.imul(column, self.size)
                )  # fmt: skip
                p = emit.at(scores, emit.imul(chain, 4))
                keys = emit.isub(shared, chain)
                self._switch(self.weighted, size, [p, pitch, keys, value, args["value_t"], sums, width, i64(1)])
                with emit.loop(0, size) as i:
                    # The keys that only some rows of the group have go on with each row's own chain.
                    _, stop = self._range(emit.iadd(start, i))
                    own = emit.imin(end, stop)
                    mine = emit.at(sums, emit.imul(i, width))
                    with emit.builder.if_then(emit.icmp_unsigned(">", own, shared)):
                        q = emit.at(emit.at(scores, emit.imul(i, pitch)), emit.imul(shared, 4))
                        after = emit.at(value, emit.imul(keys, args["value_t"]))
                        rest = [q, pitch, emit.isub(own, shared), after, args["value_t"], mine, width, i64(0)]
                        emit.builder.call(self.weighted[0], rest)
                    with emit.builder.if_then(emit.icmp_unsigned(">", own, chain)):
                        total = emit.at(self._totals(i), emit.imul(column, 4))
                        is_first = emit.icmp_unsigned("==", chain, first)
                        for vec in range(v.value_vectors):
                            offset = 4 * vec * v.lanes
                            summed = emit.load(mine, offset, emit.floats, align=4)
                            both = emit.fadd(emit.load(total, offset, emit.floats, align=4), summed)
                            emit.store(emit.select(is_first, summed, both), total, offset, align=4)

    def _store(self, query0: Value, row: Value, totals: Value | None) -> None:
        """Divide by the sum of the weights, round once and store; a row without keys is zero."""
        emit, args, v = self.emit, self.args, self.variant
        head, query = self._row(query0, row)
        target = self._of("out", head, query)
        share = emit.splat(emit.load(self.scratch["sums"], emit.imul(row, 4), F32))
        first, stop = self._range(row)
        empty = emit.icmp_unsigned(">=", first, stop)
        with emit.loop(0, args["width"], v.lanes) as i:
            result = zero = emit.splat(0.0)
            if totals is not None:
                value = emit.fdiv(emit.load(totals, emit.imul(i, 4), emit.floats, align=4), share)
                nothing = emit.builder.fcmp_ordered("==", share, zero)
                result = emit.select(empty, zero, emit.select(nothing, zero, value))
            emit.store(emit.narrow(result, v.dtype), target, emit.imul(i, self.size), align=self.size)


def _emit_weighted(module: Value, name: str, v: Variant, mr: int) -> Value:
    """Emit `name`(p, p_stride, keys, values, values_stride, sums, sums_stride, first).

    Each of mr rows goes on with its chains sums[d] = fma(p[j], values[j, d], sums[d]) over ascending j, from zero if
    `first` is set. p: float32 rows; values: rows of the operand's dtype, value_vectors wide; strides in bytes.
    """
    function = internal_function(module, name, [PTR, I64, I64, PTR, I64, PTR, I64, I64], inline=False)
    emit = Emit(function, v.lanes, v.fma)
    p, p_stride, keys, values, values_stride, sums, sums_stride, first = function.args
    rows = [emit.at(p, emit.imul(p_stride, m)) for m in range(mr)]
    targets = [emit.at(sums, emit.imul(sums_stride, m)) for m in range(mr)]
    zero, fresh = emit.splat(0.0), emit.icmp_unsigned("!=", first, i64(0))
    chains = [[emit.slot(emit.floats) for _ in range(v.value_vectors)] for _ in range(mr)]
    for m, n in _pairs(mr, v.value_vectors):
        known = emit.load(targets[m], 4 * n * v.lanes, emit.floats, align=4)
        emit.set(chains[m][n], emit.select(fresh, zero, known))
    with emit.loop(0, keys) as j:
        at = emit.imul(j, values_stride)
        size = DTYPES[v.dtype]
        columns = [emit.load_floats(values, emit.iadd(at, n * v.lanes * size), v.dtype) for n in range(v.value_vectors)]
        for m in range(mr):
            weight = emit.splat(emit.load(rows[m], emit.imul(j, 4), F32, align=4))
            for n, column in enumerate(columns):
                emit.set(chains[m][n], emit.fma(weight, column, emit.get(chains[m][n], emit.floats)))
    for m, n in _pairs(mr, v.value_vectors):
        emit.store(emit.get(chains[m][n], emit.floats), targets[m], 4 * n * v.lanes, align=4)
    emit.finish()
    return function


def _pairs(rows: int, vectors: int) -> Iterator[tuple[int, int]]:
    return ((m, n) for m in range(rows) for n in range(vectors))
