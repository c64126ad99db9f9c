"""The up projection that reads no gate row of which a screen proves that its gate is zero (`_screen`).

The gates that are left are computed as live up rows are, in the dense kernel's chains (`_dots`).
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, Value, i64
from tilecast.kernels.cpu._screen import (
    GROUP,
    ROWS_AT_ONCE,
    SLACK,
    STREAMS,
    emit_screen,
    emit_screen_row,
)
from tilecast.kernels.cpu._sparse import LIVE, Job, Listed, SparseUp, SparseVariant

UNDECIDED = ("uge", -SLACK)
"""How a screened sum with its bound and bias compares if the gate may be positive; NaN may."""


class ScreenedUp(SparseUp):
    """The gated up projection of exact zeros, gate rows read where the screen leaves it open whether they are dead."""

    def __init__(self, module: Value, sparse: SparseVariant) -> None:
        lanes, fma = sparse.dense.lanes, sparse.dense.fma
        self.screen_row = emit_screen_row(module, "screen_row", lanes, sparse.dense.dtype, fma)
        self.screens = {
            rows: emit_screen(module, f"screen_{rows}", lanes, fma, rows) for rows in range(1, ROWS_AT_ONCE + 1)
        }
        super().__init__(module, sparse)
        self.groups = self.emit.ceil_div(self.args["k"], GROUP)
        self.padded = self.emit.imul(self.emit.ceil_div(self.groups, lanes), lanes)

    def _micros(self) -> dict[tuple[int, int], Value]:
        return {}

    def _point_at_scratch(self) -> None:
        super()._point_at_scratch()
        emit = self.emit
        self.screened_pointers = self.totals
        self.units = emit.at(self.screened_pointers, emit.imul(self.args["block_m"], 8))
        self.totals = emit.at(self.units, emit.imul(self.padded, 4 * STREAMS * ROWS_AT_ONCE))

    def _prepare_rows(self) -> None:
        self._copy_rows(self.thread, self.interleave, "interleaved")
        # One row is made ready by two threads.
        last = self.emit.isub(self.emit.isub(self.args["threads"], 1), self.thread)
        self._copy_rows(last, self.screen_row, "screened", self.padded)

    def _job(self, *, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        emit, args = self.emit, self.args
        with emit.loop(0, rows) as r:
            row = emit.udiv(self._slot(emit.iadd(first_slot, r)), args["top_k"])
            screened = emit.at(args["screened"], emit.imul(row, args["screened_stride"]))
            emit.store(screened, self.screened_pointers, emit.imul(r, 8))
        self._screen(emit.iadd(emit.imul(expert, args["columns"]), column0), rows, columns)
        self._epilogue(expert, first_slot, rows, column0, columns)

    def _screen(self, first: Value, rows: Value, columns: Value) -> None:
        """Screen a job's columns: each row's sums with their bounds become its totals."""
        emit, args = self.emit, self.args
        part = emit.idiv(columns, STREAMS)
        strides = [emit.imul(part, stride) for stride in (args["code_stride"], args["scale_stride"], i64(8))]
        pairs = emit.imul(emit.idiv(rows, ROWS_AT_ONCE), ROWS_AT_ONCE)
        with emit.loop(0, part) as c:
            column = emit.iadd(first, c)
            operands = []
            for name, stride, apart in zip(
                ("codes", "code_scales", "code_bounds"),
                (args["code_stride"], args["scale_stride"], i64(8)), strides, strict=True,
            ):  # fmt: skip
                operands += [emit.at(args[name], emit.imul(column, stride)), apart]

            def screen(count: int, r: Value) -> None:
                out = emit.at(self.totals, emit.iadd(emit.imul(r, self.totals_stride), emit.imul(c, 4)))
                given = emit.at(self.screened_pointers, emit.imul(r, 8))
                more = [given, self.groups, self.padded, self.units, out, self.totals_stride, emit.imul(part, 4)]
                emit.builder.call(self.screens[count], [*operands, *more])

            with emit.loop(0, pairs, ROWS_AT_ONCE) as r:
                screen(ROWS_AT_ONCE, r)
            with emit.loop(pairs, rows) as r:
                screen(1, r)

    def _list_live(self, job: Job, live: Listed, unsure: Listed) -> Value:
        """Compute the gates that the screen leaves open and list those alive; gates of dead neurons become −∞."""
        emit, args, neurons = self.emit, self.args, self.sparse.neurons
        count = self._list(job, unsure, args["gate_rows"], UNDECIDED)
        with emit.loop(0, job.inside, self.variant.lanes) as c:
            emit.store(emit.splat(float("-inf")), job.gates, emit.imul(c, 4), align=4)
        # The last gates ask for the first up rows, of which there may be none yet.
        with emit.loop(0, i64(self.sparse.listed)) as i:
            emit.store(emit.load(unsure.rows, emit.imul(i, 8), PTR), live.rows, emit.imul(i, 8))
        sums = emit.hidden(emit.slot(F32, size=neurons))
        alive = emit.slot(I64)
        emit.set(alive, i64(0))
        with emit.loop(0, count, neurons) as i:
            rows, end = emit.at(unsure.rows, emit.imul(i, 8)), emit.iadd(i, neurons)
            following = emit.select(emit.icmp_unsigned("<", end, count), emit.at(rows, 8 * neurons), live.rows)
            emit.builder.call(self.dots, [rows, following, job.a, args["k"], sums])
            with emit.loop(i, emit.imin(end, count)) as j:
                gate = emit.load(sums, emit.imul(emit.isub(j, i), 4), F32)
                column = emit.zext(emit.load(unsure.columns, emit.imul(j, 4), I32), I64)
                if self.variant.bias:
                    bias = emit.load(args["bias"], emit.iadd(job.bias_at, emit.imul(column, 4)), F32)
                    gate = emit.fadd(gate, bias)
                emit.store(gate, job.gates, emit.imul(column, 4))
                compare, limit = LIVE
                wanted = emit.fcmp_unordered(compare, gate, ir.Constant(F32, limit))
                self._append(live, alive, column, emit.iadd(job.first_row, column), args["up_rows"], wanted)
        total = emit.get(alive, I64)
        self._fill_up(live, total)
        return total
