"""The up projection that leaves out what is multiplied with an exact zero, bit for bit that of `_moe.Gemm`.

The gate's sums as in any up projection; then, row by row, dot products of the live neurons' up rows alone (`_dots`;
down: `_sparse_down`). Sums are the dense kernel's: ascending chains along K, flushed at the same places; a chain that
leaves out a product of zero and a finite weight has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, Value, i64
from tilecast.kernels.cpu._dots import emit_dots, emit_interleave
from tilecast.kernels.cpu._math import activate
from tilecast.kernels.cpu._moe import Gemm
from tilecast.kernels.cpu._screen import ROWS_AT_ONCE, STREAMS, padded_groups
from tilecast.kernels.cpu._variant import ARGS, FLUSH_K, Variant
from tilecast.problem import DTYPES

MORE_ARGS = (
    # bytes from neuron to neuron; down: lists of live neurons
    "pitch_stride", "live", "live_stride",
    # up: interleaved rows, the up rows [E, I, pitch of K] and their bias
    "interleaved", "interleaved_stride", "up_rows", "up_bias",
    # up with a screen: the gate rows as the up rows, what is screened instead, bytes of a neuron's codes and scales
    "gate_rows", "codes", "code_scales", "code_bounds", "code_stride", "scale_stride", "screened", "screened_stride",
)  # fmt: skip
"""The words of the argument block behind those of `_moe.ARGS`."""
LIVE = ("ugt", 0.0)
"""How a gate compares whose neuron is alive; NaN is."""


@dataclass(frozen=True, kw_only=True)
class SparseVariant:
    """`dense` is the variant whose bits these are (of the gate rows alone, for up).

    neurons: how many live neurons are multiplied (up) or added (down) at once; ahead: 1 if the next ones are asked for;
    screen: whether gates are screened first (up).
    """

    dense: Variant
    neurons: int
    ahead: int
    screen: bool = False

    @property
    def listed(self) -> int:
        """Neurons by which a list is filled up with its last one, so that code may look past its end."""
        return 2 * self.neurons

    def scratch_bytes(self, block_m: int, block_n: int, k: int) -> int:
        """Return the bytes of a thread's scratch: the dense kernel's and this one's; of down, its own sums alone."""
        more = 2 * 4 * block_n
        if self.dense.gemm == "down":
            return -(-more // 4096) * 4096
        # Row addresses and columns of two lists, and sums spread over their columns.
        more = 2 * 12 * (block_n + self.listed) + 4 * (block_n + self.dense.lanes)
        if self.screen:
            more += 8 * block_m + 4 * STREAMS * ROWS_AT_ONCE * padded_groups(k, self.dense.lanes)
        return self.dense.scratch_layout(block_m, block_n)[-1] + -(-more // 4096) * 4096

    def list_bytes(self, k: int) -> int:
        """Return the bytes of one slot's list: ends of chains, values, row addresses, each from a multiple of 64 on."""
        sizes = (8 * -(-k // FLUSH_K), 4 * (k + self.listed), 8 * (k + self.listed))
        return sum(-(-size // 64) * 64 for size in sizes)


@dataclass(frozen=True)
class Listed:
    """Where neurons of a row are listed: addresses of weight rows, and columns."""

    rows: Value
    columns: Value


@dataclass(frozen=True)
class Job:
    """One row of a job: gates (float32, their bias added), the columns that are there, the interleaved row."""

    gates: Value
    inside: Value
    a: Value
    first_row: Value
    """Number of the first column's weight row in the stack."""
    bias_at: Value


class Sparse(Gemm):
    """What the two GEMMs share: further arguments, scratch behind the dense kernel's."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        self.sparse = sparse
        super().__init__(module, sparse.dense)
        for i, name in enumerate(MORE_ARGS):
            kind = I64 if name.endswith("stride") else PTR
            self.args[name] = self.emit.load(self.block, 8 * (len(ARGS) + i), kind)


class SparseUp(Sparse):
    """The gated up projection of exact zeros, every gate row computed."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        v = sparse.dense
        self.interleave = emit_interleave(module, "interleave", v.dtype, v.lanes, v.fma)
        self.dots = emit_dots(module, "dots", v.dtype, v.lanes, v.fma, sparse.neurons, bool(sparse.ahead))
        super().__init__(module, sparse)

    def build(self) -> None:
        """Emit the phases."""
        self._point_at_scratch()
        self._prepare_rows()
        self._barrier()
        self._jobs()
        self._finish()

    def _prepare_rows(self) -> None:
        """Bring the rows into the forms in which they are multiplied, threads taking turns."""
        self._copy_rows(self.thread, self.interleave, "interleaved")
        if self.variant.widens:
            self._widen()

    def _copy_rows(self, first: Value, function: Value, name: str, *more: Value) -> None:
        """Call a function of source, target and K for every row from `first` on that is this thread's."""
        emit, args = self.emit, self.args
        with emit.loop(first, args["rows"], args["threads"]) as row:
            source = emit.at(args["source"], emit.imul(emit.imul(row, args["k"]), DTYPES[self.variant.dtype]))
            target = emit.at(args[name], emit.imul(row, args[f"{name}_stride"]))
            emit.builder.call(function, [source, target, args["k"], *more])

    def _epilogue(self, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        """Find the live neurons of each row, multiply their up rows, then activation and one rounding."""
        emit, args, v = self.emit, self.args, self.variant
        left = emit.isub(args["width"], emit.imin(args["width"], column0))
        inside = emit.imin(columns, left)
        bias_at = emit.imul(emit.iadd(emit.imul(expert, args["columns"]), column0), 4)
        first_row = emit.iadd(emit.imul(expert, args["width"]), column0)
        size = DTYPES[v.dtype]
        # Offsets follow from block_n, which is known at run time only.
        room = emit.iadd(args["block_n"], self.sparse.listed)
        at = emit.at(self.totals, emit.imul(args["block_m"], self.totals_stride))
        lists = []
        for _ in range(2):
            columns_at = emit.at(at, emit.imul(room, 8))
            lists.append(Listed(at, columns_at))
            at = emit.at(columns_at, emit.imul(room, 4))
        live, unsure = lists
        spread = at
        with emit.loop(0, rows) as r:
            gates = emit.at(self.totals, emit.imul(r, self.totals_stride))
            if v.bias:
                with emit.loop(0, inside, v.lanes) as c:
                    at = emit.imul(c, 4)
                    bias = emit.load(args["bias"], emit.iadd(bias_at, at), emit.floats, align=4)
                    emit.store(emit.fadd(emit.load(gates, at, emit.floats, align=4), bias), gates, at, align=4)
            slot = self._slot(emit.iadd(first_slot, r))
            a = emit.at(args["interleaved"], emit.imul(emit.udiv(slot, args["top_k"]), args["interleaved_stride"]))
            job = Job(gates, inside, a, first_row, bias_at)
            count = self._list_live(job, live, unsure)
            self._multiply(count, live, a, spread)
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

    def _list_live(self, job: Job, live: Listed, unsure: Listed) -> Value:
        """List the live neurons of a row, make their gates exact, and return how many there are."""
        return self._list(job, live, self.args["up_rows"], LIVE)

    def _list(self, job: Job, listed: Listed, stack: Value, above: tuple[str, float]) -> Value:
        """List the neurons whose gates compare so or are NaN, with their rows in a stack; return how many there are."""
        emit, (compare, limit) = self.emit, above
        count = emit.slot(I64)
        emit.set(count, i64(0))
        with emit.loop(0, job.inside) as c:
            gate = emit.load(job.gates, emit.imul(c, 4), F32)
            self._append(listed, count, c, emit.iadd(job.first_row, c), stack, emit.fcmp_unordered(
                compare, gate, ir.Constant(F32, limit)))  # fmt: skip
        total = emit.get(count, I64)
        self._fill_up(listed, total)
        return total

    def _append(self, listed: Listed, count: Value, column: Value, row: Value, stack: Value, wanted: Value) -> None:
        """Write a neuron behind those listed, and count it if it is wanted."""
        emit, n = self.emit, self.emit.get(count, I64)
        emit.store(emit.trunc(column, I32), listed.columns, emit.imul(n, 4))
        emit.store(emit.at(stack, emit.imul(row, self.args["pitch_stride"])), listed.rows, emit.imul(n, 8))
        emit.set(count, emit.iadd(n, emit.zext(wanted, I64)))

    def _fill_up(self, listed: Listed, count: Value) -> None:
        """Repeat the last of the listed neurons behind them."""
        emit = self.emit
        with emit.builder.if_then(emit.icmp_unsigned(">", count, i64(0))):
            last = emit.isub(count, i64(1))
            row, column = (
                emit.load(listed.rows, emit.imul(last, 8), PTR),
                emit.load(listed.columns, emit.imul(last, 4), I32),
            )
            with emit.loop(count, emit.iadd(count, self.sparse.listed)) as i:
                emit.store(row, listed.rows, emit.imul(i, 8))
                emit.store(column, listed.columns, emit.imul(i, 4))

    def _multiply(self, count: Value, listed: Listed, a: Value, spread: Value) -> None:
        """Multiply the listed rows with `a`; each sum goes where its column is."""
        emit, neurons = self.emit, self.sparse.neurons
        sums = emit.hidden(emit.slot(F32, size=neurons))
        with emit.loop(0, count, neurons) as i:
            rows = emit.at(listed.rows, emit.imul(i, 8))
            emit.builder.call(self.dots, [rows, emit.at(rows, 8 * neurons), a, self.args["k"], sums])
            for n in range(neurons):
                # Behind the end the last one is written again.
                column = emit.zext(emit.load(listed.columns, emit.imul(emit.iadd(i, n), 4), I32), I64)
                emit.store(emit.load(sums, 4 * n, F32), spread, emit.imul(column, 4))
