"""The up projection that leaves out what is multiplied with an exact zero, bit for bit that of `_moe.Gemm`.

The gate's sums as in any up projection; then, row by row, dot products of the live neurons' up rows alone, a vector
lane for each (down: `_sparse_down`). Sums are the dense kernel's: ascending chains along K, flushed at the same places;
a chain that leaves out a product of zero and a finite weight has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, VOID, Emit, Value, i64, load_one, transpose
from tilecast.kernels.cpu._math import activate
from tilecast.kernels.cpu._micro import CACHE_LINE, _halves
from tilecast.kernels.cpu._moe import Gemm
from tilecast.kernels.cpu._variant import ARGS, FLUSH_K, Variant
from tilecast.problem import DTYPES

MORE_ARGS = (
    # bytes from neuron to neuron; up: the up rows [E, I, pitch of K] and their bias; down: lists of live neurons
    "pitch_stride", "up_rows", "up_bias", "live", "live_stride",
)  # fmt: skip
"""The words of the argument block behind those of `_moe.ARGS`."""


@dataclass(frozen=True, kw_only=True)
class SparseVariant:
    """`dense` is the variant whose bits these are (of the gate rows alone, for up).

    neurons: for up, how many vectors of live neurons are multiplied at once, at most; for down, how many live neurons
    are added at once. ahead: cache lines by which live rows are asked for (up); 1 to ask for the next neurons (down).
    """

    dense: Variant
    neurons: int
    ahead: int

    @property
    def listed(self) -> int:
        """Neurons by which a list is filled up with its last one, so that code may look past its end."""
        return 2 * self.neurons * (self.dense.lanes if self.dense.gemm == "up" else 1)

    def scratch_bytes(self, block_m: int, block_n: int) -> int:
        """Return the bytes of a thread's scratch: the dense kernel's, and behind them this one's."""
        lanes = self.dense.lanes
        more = 4 * block_n
        if self.dense.gemm == "up":
            # Row addresses, columns and sums; sums spread over their columns; squares of words.
            more = 16 * (block_n + self.listed) + 4 * (block_n + lanes) + 4 * lanes * lanes * self.neurons
        return self.dense.scratch_layout(block_m, block_n)[-1] + -(-more // 4096) * 4096

    def list_bytes(self, k: int) -> int:
        """Return the bytes of one slot's list: ends of chains, values, row addresses, each from a multiple of 64 on."""
        sizes = (8 * -(-k // FLUSH_K), 4 * (k + self.listed), 8 * (k + self.listed))
        return sum(-(-size // 64) * 64 for size in sizes)


class Sparse(Gemm):
    """What the two GEMMs share: further arguments, scratch behind the dense kernel's."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        self.sparse = sparse
        super().__init__(module, sparse.dense)
        for i, name in enumerate(MORE_ARGS):
            kind = I64 if name.endswith("stride") else PTR
            self.args[name] = self.emit.load(self.block, 8 * (len(ARGS) + i), kind)


class SparseUp(Sparse):
    """The gated up projection of exact zeros."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        counts = []
        count = sparse.neurons
        while count:
            counts.append(count)
            count //= 2
        self.dots = {count: emit_dots(module, f"dots_{count}", sparse, count) for count in reversed(counts)}
        super().__init__(module, sparse)

    def _epilogue(self, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        """Find the live neurons of each row, multiply their up rows, then activation and one rounding."""
        emit, args, v = self.emit, self.args, self.variant
        left = emit.isub(args["width"], emit.imin(args["width"], column0))
        inside = emit.imin(columns, left)
        bias_at = emit.imul(emit.iadd(emit.imul(expert, args["columns"]), column0), 4)
        first_row = emit.iadd(emit.imul(expert, args["width"]), column0)
        size = DTYPES[v.dtype]
        up_rows = emit.at(args["up_rows"], emit.imul(first_row, args["pitch_stride"]))
        # Offsets follow from block_n, which is known at run time only.
        room = emit.iadd(args["block_n"], self.sparse.listed)
        pointers = emit.at(self.totals, emit.imul(args["block_m"], self.totals_stride))
        found = emit.at(pointers, emit.imul(room, 8))
        sums = emit.at(found, emit.imul(room, 4))
        spread = emit.at(sums, emit.imul(room, 4))
        staged = emit.at(spread, emit.imul(emit.iadd(args["block_n"], v.lanes), 4))
        with emit.loop(0, rows) as r:
            gates = emit.at(self.totals, emit.imul(r, self.totals_stride))
            if v.bias:
                with emit.loop(0, inside, v.lanes) as c:
                    at = emit.imul(c, 4)
                    bias = emit.load(args["bias"], emit.iadd(bias_at, at), emit.floats, align=4)
                    emit.store(emit.fadd(emit.load(gates, at, emit.floats, align=4), bias), gates, at, align=4)
            count = self._find(gates, inside, up_rows, pointers, found)
            a = emit.load(self.row_pointers, emit.imul(r, 8), PTR)
            self._multiply(count, pointers, a, sums, staged)
            with emit.loop(0, count) as i:
                column = emit.zext(emit.load(found, emit.imul(i, 4), I32), I64)
                emit.store(emit.load(sums, emit.imul(i, 4), F32), spread, emit.imul(column, 4))
            slot = self._slot(emit.iadd(first_slot, r))
            out_row = emit.imul(emit.iadd(emit.imul(slot, args["width"]), column0), size)
            with emit.loop(0, inside, v.lanes) as c:
                at = emit.imul(c, 4)
                gate = emit.load(gates, at, emit.floats, align=4)
                # What was never computed is some earlier row's; `activate` lets none of it through.
                up = emit.load(spread, at, emit.floats, align=4)
                if v.bias:
                    up = emit.fadd(up, emit.load(args["up_bias"], emit.iadd(bias_at, at), emit.floats, align=4))
                result = emit.narrow(activate(emit, v.activation, gate, up), v.dtype)
                lanes = emit.imin(i64(v.lanes), emit.isub(inside, c))
                emit.store_partial(result, args["out"], emit.iadd(out_row, emit.imul(c, size)), lanes, size)

    def _find(self, gates: Value, inside: Value, up_rows: Value, pointers: Value, found: Value) -> Value:
        """List columns and up rows of live gates; return how many there are. Behind them the last row repeats."""
        emit = self.emit
        count = emit.slot(I64)
        emit.set(count, i64(0))
        with emit.loop(0, inside) as c:
            n = emit.get(count, I64)
            emit.store(emit.trunc(c, I32), found, emit.imul(n, 4))
            emit.store(emit.at(up_rows, emit.imul(c, self.args["pitch_stride"])), pointers, emit.imul(n, 8))
            gate = emit.load(gates, emit.imul(c, 4), F32)
            # NaN is live.
            live = emit.fcmp_unordered("ugt", gate, ir.Constant(F32, 0.0))
            emit.set(count, emit.iadd(n, emit.zext(live, I64)))
        total = emit.get(count, I64)
        with emit.builder.if_then(emit.icmp_unsigned(">", total, i64(0))):
            last = emit.load(pointers, emit.imul(emit.isub(total, i64(1)), 8), PTR)
            with emit.loop(total, emit.iadd(total, self.sparse.listed)) as i:
                emit.store(last, pointers, emit.imul(i, 8))
        # What products will not have asked for ahead.
        first = self.sparse.neurons * self.variant.lanes
        with emit.loop(0, emit.imin(total, i64(first))) as i:
            row = emit.load(pointers, emit.imul(i, 8), PTR)
            for line in range(self.sparse.ahead):
                emit.prefetch(emit.at(row, CACHE_LINE * line))
        return total

    def _multiply(self, count: Value, pointers: Value, a: Value, sums: Value, staged: Value) -> None:
        """Multiply the listed rows with `a`, as many vectors of them at once as are left to do."""
        emit, lanes = self.emit, self.variant.lanes
        with emit.loop(0, count, lanes * self.sparse.neurons) as i:
            left = emit.isub(count, i)
            operands = [emit.at(pointers, emit.imul(i, 8)), a, self.args["k"], emit.at(sums, emit.imul(i, 4)), staged]
            after = emit.function.append_basic_block("multiplied")
            for vectors, function in self.dots.items():
                if vectors == self.sparse.neurons:
                    emit.builder.call(function, operands)
                    emit.branch(after)
                    break
                fits, more = (emit.function.append_basic_block(name) for name in ("fits", "more"))
                emit.cbranch(emit.icmp_unsigned("<=", left, i64(vectors * lanes)), fits, more)
                emit.position_at_end(fits)
                emit.builder.call(function, operands)
                emit.branch(after)
                emit.position_at_end(more)
            emit.position_at_end(after)


def emit_dots(module: Value, name: str, sparse: SparseVariant, vectors: int) -> Value:
    """Emit `name`(rows, a, k, out, staged): out[i] = Σ rows[i][k]·a[k], a vector lane for each of the rows.

    rows: vectors · lanes addresses of weight rows, and as many of those that follow; a: float32 [k]; staged: scratch
    for one square of words a vector. Squares of lanes × lanes words are transposed, so that a lane's sum is a chain.
    """
    v = sparse.dense
    function = ir.Function(module, ir.FunctionType(VOID, [PTR, PTR, I64, PTR, PTR]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    emit = Emit(function, v.lanes, v.fma)
    rows, a, k, out, staged = function.args
    per_word = 2 if v.dtype == "bf16" else 1
    size, square = DTYPES[v.dtype], v.lanes * per_word
    squares = max(1, CACHE_LINE // (square * size))
    acc = [emit.slot(emit.floats) for _ in range(vectors)]
    with emit.loop(0, k, FLUSH_K) as start:
        length = emit.imin(i64(FLUSH_K), emit.isub(k, start))
        whole = emit.iadd(start, emit.imul(emit.idiv(length, square * squares), square * squares))
        for slot in acc:
            emit.set(slot, emit.splat(0.0))
        with emit.loop(start, whole, square * squares) as at:
            if sparse.ahead:
                _ask_ahead(emit, sparse, rows, vectors, at, k, size, square * squares)
            for s in range(squares):
                k0 = emit.iadd(at, s * square)
                _stage_squares(emit, v.dtype, rows, vectors, emit.imul(k0, size), staged)
                emit.fence()
                _add_squares(emit, v.dtype, a, emit.imul(k0, 4), staged, acc)
                emit.fence()
        with emit.loop(whole, emit.iadd(start, length)) as at:
            _add_one(emit, v.dtype, rows, a, at, acc)
        first = emit.icmp_unsigned("==", start, i64(0))
        for g, slot in enumerate(acc):
            value, offset = emit.get(slot, emit.floats), 4 * v.lanes * g
            total = emit.fadd(emit.load(out, offset, emit.floats, align=4), value)
            emit.store(emit.select(first, value, total), out, offset, align=4)
    emit.finish()
    return function


def _ask_ahead(
    emit: Emit, sparse: SparseVariant, rows: Value, vectors: int, at: Value, k: Value, size: int, turn: int
) -> None:
    """Prefetch what is needed some turns later, past the rows' end the beginning of the rows that follow."""
    count = vectors * emit.lanes
    row_bytes = emit.imul(k, size)
    wanted = emit.iadd(emit.imul(at, size), sparse.ahead * turn * size)
    past = emit.icmp_unsigned(">=", wanted, row_bytes)
    wanted = emit.select(past, emit.isub(wanted, row_bytes), wanted)
    whose = emit.select(past, emit.at(rows, 8 * count), rows)
    for i in range(count):
        emit.prefetch(emit.at(emit.load(whose, 8 * i, PTR), wanted))


def _stage_squares(emit: Emit, dtype: str, rows: Value, vectors: int, at: Value, staged: Value) -> None:
    """Transpose a square of words of each vector's rows into scratch."""
    lanes = emit.lanes
    for g in range(vectors):
        pointers = [emit.load(rows, 8 * (g * lanes + i), PTR) for i in range(lanes)]
        if dtype == "bf16":
            words = [emit.load(row, at, emit.words, align=2) for row in pointers]
        else:
            words = [emit.load_floats(row, at, dtype) for row in pointers]
        for w, word in enumerate(transpose(emit, words)):
            emit.store(word, staged, 4 * lanes * (w * vectors + g), align=4)


def _add_squares(emit: Emit, dtype: str, a: Value, at: Value, staged: Value, acc: list[Value]) -> None:
    """Add a square's products to each vector's chains, k by k."""
    lanes, pairs = emit.lanes, dtype == "bf16"
    for w in range(lanes):
        kind = emit.words if pairs else emit.floats
        loaded = [emit.load(staged, 4 * lanes * (w * len(acc) + g), kind, align=4) for g in range(len(acc))]
        columns = [_halves(emit, word) if pairs else [word] for word in loaded]
        for i in range(len(columns[0])):
            factor = emit.splat(emit.load(a, emit.iadd(at, 4 * (w * len(columns[0]) + i)), F32, align=4))
            for g, slot in enumerate(acc):
                emit.set(slot, emit.fma(factor, columns[g][i], emit.get(slot, emit.floats)))


def _add_one(emit: Emit, dtype: str, rows: Value, a: Value, at: Value, acc: list[Value]) -> None:
    """Add the products of one k, gathered element by element: what is left of K behind the last whole squares."""
    factor = emit.splat(emit.load(a, emit.imul(at, 4), F32, align=4))
    offset = emit.imul(at, DTYPES[dtype])
    for g, slot in enumerate(acc):
        column = ir.Constant(emit.floats, ir.Undefined)
        for lane in range(emit.lanes):
            row = emit.load(rows, 8 * (g * emit.lanes + lane), PTR)
            column = emit.insert_element(column, load_one(emit, row, offset, dtype), ir.Constant(I32, lane))
        emit.set(slot, emit.fma(factor, column, emit.get(slot, emit.floats)))
