"""The down projection of rows with exact zeros: live neurons' weight rows alone, added in ascending order.

Each slot's live neurons are listed once; then every thread adds their weight rows, times their values, to columns that
it alone owns.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, Emit, Value, i64, internal_function, load_one
from tilecast.kernels.cpu._micro import CACHE_LINE, _halves
from tilecast.kernels.cpu._sparse import Sparse, SparseVariant
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.problem import DTYPES


class SparseDown(Sparse):
    """The down projection of rows with exact zeros, gated or not."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        counts = {sparse.neurons, *(n for n in (1, 2, 4) if n < sparse.neurons)}
        self.adds = {count: emit_add(module, f"add_{count}", sparse, count) for count in sorted(counts, reverse=True)}
        super().__init__(module, sparse)

    def build(self) -> None:
        """Emit the phases."""
        self.thread = self._take("thread")
        scratch = self.emit.at(self.args["scratch"], self.emit.imul(self.thread, self.args["scratch_stride"]))
        self.totals, self.totals_stride = scratch, i64(0)
        self.sums = self.emit.at(scratch, self.emit.imul(self.args["block_n"], 4))
        self._list()
        self._barrier()
        self._jobs()
        self._barrier()
        self._combine()
        self._finish()

    def _list_of(self, slot: Value) -> tuple[Value, Value, Value]:
        """Return where a slot's list holds its ends (one for each chain), values and row addresses."""
        emit, args = self.emit, self.args
        base = emit.at(args["live"], emit.imul(slot, args["live_stride"]))
        rounded = [
            emit.imul(emit.ceil_div(size, 64), 64)
            for size in (
                emit.imul(emit.ceil_div(args["k"], FLUSH_K), 8),
                emit.imul(emit.iadd(args["k"], self.sparse.listed), 4),
            )
        ]
        values = emit.at(base, rounded[0])
        return base, values, emit.at(values, rounded[1])

    def _list(self) -> None:
        """List each slot's live neurons, threads taking turns."""
        emit, args, dtype = self.emit, self.args, self.variant.dtype
        size, k = DTYPES[dtype], args["k"]
        with emit.loop(self.thread, args["rows"], args["threads"]) as slot:
            expert = emit.zext(emit.load(args["ids"], emit.imul(slot, 4), I32), I64)
            with emit.builder.if_then(emit.icmp_unsigned("<", expert, args["experts"])):
                ends, values, rows = self._list_of(slot)
                source = emit.at(args["source"], emit.imul(emit.imul(slot, k), size))
                weights = emit.at(args["weights"], emit.imul(expert, args["expert_stride"]))
                count = emit.slot(I64)
                emit.set(count, i64(0))
                with emit.loop(0, k, FLUSH_K) as start:
                    with emit.loop(start, emit.imin(k, emit.iadd(start, FLUSH_K))) as i:
                        n = emit.get(count, I64)
                        value = load_one(emit, source, emit.imul(i, size), dtype)
                        emit.store(value, values, emit.imul(n, 4))
                        emit.store(emit.at(weights, emit.imul(i, args["pitch_stride"])), rows, emit.imul(n, 8))
                        live = emit.fcmp_unordered("une", value, ir.Constant(F32, 0.0))
                        emit.set(count, emit.iadd(n, emit.zext(live, I64)))
                    emit.store(emit.get(count, I64), ends, emit.imul(emit.idiv(start, FLUSH_K), 8))
                total = emit.get(count, I64)
                # Where nothing is live, no row is ever looked at.
                last = emit.load(rows, emit.imul(emit.isub(emit.builder.select(
                    emit.icmp_unsigned(">", total, i64(0)), total, i64(1)), i64(1)), 8), PTR)  # fmt: skip
                with emit.loop(total, emit.iadd(total, self.sparse.listed)) as i:
                    emit.store(last, rows, emit.imul(i, 8))

    def _job(self, *, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        emit, args, v = self.emit, self.args, self.variant
        offset = emit.imul(column0, DTYPES[v.dtype])
        with emit.loop(0, rows) as r:
            ends, values, pointers = self._list_of(self._slot(emit.iadd(first_slot, r)))
            with emit.loop(0, emit.ceil_div(args["k"], FLUSH_K)) as chain:
                first = emit.icmp_unsigned("==", chain, i64(0))
                before = emit.isub(chain, emit.zext(emit.builder.not_(first), I64))
                begin = emit.select(first, i64(0), emit.load(ends, emit.imul(before, 8), I64))
                end = emit.load(ends, emit.imul(chain, 8), I64)
                self._chain(begin, end, values, pointers, offset, columns)
                some = emit.icmp_unsigned(">", end, begin)
                with emit.loop(0, columns, v.lanes) as c:
                    at = emit.imul(c, 4)
                    value = emit.select(some, emit.load(self.sums, at, emit.floats, align=4), emit.splat(0.0))
                    total = emit.fadd(emit.load(self.totals, at, emit.floats, align=4), value)
                    emit.store(emit.select(first, value, total), self.totals, at, align=4)
            self._epilogue(expert, emit.iadd(first_slot, r), i64(1), column0, columns)

    def _chain(
        self, begin: Value, end: Value, values: Value, pointers: Value, offset: Value, columns: Value
    ) -> None:  # fmt: skip
        """Add live neurons begin … end - 1 to the sums, in ascending order."""
        emit = self.emit
        start = begin
        for count, function in self.adds.items():
            stop = emit.iadd(start, emit.imul(emit.idiv(emit.isub(end, start), count), count))
            with emit.loop(start, stop, count) as i:
                first = emit.zext(emit.icmp_unsigned("==", i, begin), I64)
                value, pointer = emit.at(values, emit.imul(i, 4)), emit.at(pointers, emit.imul(i, 8))
                emit.builder.call(function, [value, pointer, offset, columns, self.sums, first])
            start = stop


def emit_add(module: Value, name: str, sparse: SparseVariant, count: int) -> Value:
    """Emit `name`(values, rows, offset, columns, sums, first): sums[c] += Σ values[i]·rows[i][c], i ascending.

    values: `count` floats; rows: as many addresses of weight rows, to which `offset` bytes are added, and those that
    follow; columns: a multiple of 8 vectors; first: 1 if sums start from zero.
    """
    v = sparse.dense
    function = internal_function(module, name, [PTR, PTR, I64, I64, PTR, I64], inline=False)
    emit = Emit(function, v.lanes, v.fma)
    values, rows, offset, columns, sums, first = function.args
    size = DTYPES[v.dtype]
    # Vectors that one load brings: words of two bf16 hold two (`sparse_layouts.neuron_order`).
    pair = 2 if v.dtype == "bf16" else 1
    turn = max(pair * v.lanes, CACHE_LINE // size)
    factors = [emit.splat(emit.load(values, 4 * i, F32)) for i in range(count)]
    pointers = [emit.at(emit.load(rows, 8 * i, PTR), offset) for i in range(count)]
    following = [emit.at(emit.load(rows, 8 * (count + i), PTR), offset) for i in range(count)] if sparse.ahead else []
    is_first = emit.icmp_unsigned("!=", first, i64(0))
    with emit.loop(0, columns, turn) as column:
        for row in following:
            emit.prefetch(emit.at(row, emit.imul(column, size)))
        for u in range(0, turn, pair * v.lanes):
            at = emit.iadd(column, u)
            places = [emit.imul(emit.iadd(at, part * v.lanes), 4) for part in range(pair)]
            totals = [emit.load(sums, place, emit.floats, align=4) for place in places]
            totals = [emit.select(is_first, emit.splat(0.0), total) for total in totals]
            for factor, row in zip(factors, pointers, strict=True):
                if pair == 2:
                    parts = _halves(emit, emit.load(row, emit.imul(at, size), emit.words, align=4))
                else:
                    parts = [emit.load_floats(row, emit.imul(at, size), v.dtype)]
                totals = [emit.fma(factor, part, total) for part, total in zip(parts, totals, strict=True)]
            for total, place in zip(totals, places, strict=True):
                emit.store(total, sums, place, align=4)
    emit.finish()
    return function
