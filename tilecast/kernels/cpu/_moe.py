"""The whole grouped GEMM around the micro-kernel: widening, jobs, chunks of K, epilogue, ordered combine.

One function runs on every thread of one parallel region. Jobs (expert, block of columns, block of rows) are
taken from a shared counter; who computes a job does not change its bits.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, VOID, Emit, Value, i64, load_one
from tilecast.kernels.cpu._codes import emit_widen_row
from tilecast.kernels.cpu._math import activate
from tilecast.kernels.cpu._micro import CACHE_LINE, Micro, emit_micro
from tilecast.kernels.cpu._nibbles import emit_split_row, group_offset, row_bytes
from tilecast.kernels.cpu._shorts import emit_short_row, kept_offset
from tilecast.kernels.cpu._stage import emit_stage_codes, emit_stage_packed, emit_stage_plain
from tilecast.kernels.cpu._variant import ARGS, BARRIER, ENTRY, Tile, Variant
from tilecast.problem import DTYPES

COMBINE_COLUMNS = 512


class Gemm:
    """Emits one variant's entry function."""

    def __init__(self, module: Value, variant: Variant) -> None:
        self.variant, self.module = variant, module
        v = variant
        self.micros = self._micros()
        emit_row = emit_short_row if v.shorts else emit_split_row if v.nibbles else emit_widen_row
        self.widen_row = None if v.codes is None else emit_row(module, "widen_row", v.codes, v.dtype, v.fma)
        self.stages = {tile.nr: self._stage(tile.micro) for tile in v.tiles} if v.stage else {}
        function = ir.Function(module, ir.FunctionType(VOID, [PTR]), ENTRY)
        function.attributes.add("nounwind")
        self.emit = Emit(function, v.lanes, v.fma)
        self.told = self.emit.keep_subnormals()
        self.block = function.args[0]
        pointers = {"ids", "slots", "offsets", "source", "widened", "weights", "bias", "scale", "partial", "out"}
        pointers |= {"scratch", "scales", "zeros"}
        self.args = {
            name: self.emit.load(self.block, 8 * i, PTR if name in pointers else I64) for i, name in enumerate(ARGS)
        }

    def _micros(self) -> dict[tuple[int, int], Value]:
        """Emit the micro-kernels, by columns and rows."""
        return {
            (tile.nr, m): emit_micro(self.module, f"micro_{m}x{tile.micro.nv}", tile.micro, m, self.variant.fma)
            for tile in self.variant.tiles
            for m in range(tile.least, tile.most + 1)
        }

    def _stage(self, micro: Micro) -> Value:
        v, name = self.variant, f"stage_{micro.nv}"
        if v.panel:
            return emit_stage_packed(self.module, name, micro, v.packed_source, v.panel, v.fma)
        if v.codes is not None:
            return emit_stage_codes(self.module, name, micro, v.codes, v.fma)
        return emit_stage_plain(self.module, name, micro, v.dtype, v.fma)

    def build(self) -> None:
        """Emit the phases."""
        self._point_at_scratch()
        if self.variant.widens:
            self._widen()
            self._barrier()
        self._jobs()
        if self.variant.gemm == "down":
            self._barrier()
            self._combine()
        self._finish()

    def _point_at_scratch(self) -> None:
        """Take this thread's number, and find its scratch."""
        self.thread = self._take("thread")
        scratch = self.emit.at(self.args["scratch"], self.emit.imul(self.thread, self.args["scratch_stride"]))
        stage, pointers, _, _ = self.variant.scratch_layout(0, 0)
        self.weight_rows, self.staged = scratch, self.emit.at(scratch, stage)
        self.row_pointers = self.emit.at(scratch, pointers)
        self.totals = self.emit.at(self.row_pointers, self.emit.imul(self.args["block_m"], 8))
        self.totals_stride = self.emit.imul(self.args["block_n"], 4)

    def _finish(self) -> None:
        self.emit.restore_subnormals(self.told)
        self.emit.finish()

    def _take(self, name: str) -> Value:
        counter = self.emit.at(self.block, 8 * ARGS.index(name))
        return self.emit.atomic_rmw("add", counter, i64(1), "monotonic")

    def _barrier(self) -> None:
        emit = self.emit
        with emit.builder.if_then(emit.icmp_unsigned(">", self.args["threads"], i64(1))):
            emit.call_external(BARRIER, VOID, [])

    def _widen(self) -> None:
        """Copy the rows to float32, threads taking turns; an odd K gets a zero behind it."""
        emit, args = self.emit, self.args
        size, k = DTYPES[self.variant.dtype], args["k"]
        with emit.loop(self.thread, args["rows"], args["threads"]) as row:
            source = emit.at(args["source"], emit.imul(emit.imul(row, k), size))
            target = emit.at(args["widened"], emit.imul(row, args["row_stride"]))
            if self.widen_row is not None:
                emit.builder.call(self.widen_row, [source, target, k, args["k_padded"]])
            else:
                self._widen_row(source, target, k)

    def _widen_row(self, source: Value, target: Value, k: Value) -> None:
        emit, dtype, lanes = self.emit, self.variant.dtype, self.variant.lanes
        size = DTYPES[dtype]
        whole = emit.imul(emit.idiv(k, lanes), lanes)
        with emit.loop(0, whole, lanes) as i:
            value = emit.load_floats(source, emit.imul(i, size), dtype)
            emit.store(value, target, emit.imul(i, 4), align=4)
        with emit.loop(whole, k) as i:
            emit.store(load_one(emit, source, emit.imul(i, size), dtype), target, emit.imul(i, 4), align=4)
        with emit.loop(k, self.args["k_padded"]) as i:
            emit.store(ir.Constant(F32, 0.0), target, emit.imul(i, 4), align=4)

    def _jobs(self) -> None:
        emit, args = self.emit, self.args
        expert, base = emit.slot(I64, i64(0)), emit.slot(I64, i64(0))
        column_blocks = emit.ceil_div(args["columns"], args["block_n"])
        with emit.forever() as done:
            job = self._take("job")
            with emit.forever() as found:
                emit.leave_if(emit.icmp_unsigned(">=", emit.get(expert, I64), args["experts"]), done)
                begin, rows = self._expert_rows(emit.get(expert, I64))
                row_blocks = emit.ceil_div(rows, args["block_m"])
                end = emit.iadd(emit.get(base, I64), emit.imul(row_blocks, column_blocks))
                emit.leave_if(emit.icmp_unsigned("<", job, end), found)
                emit.set(base, end)
                emit.set(expert, emit.iadd(emit.get(expert, I64), 1))
            begin, rows = self._expert_rows(emit.get(expert, I64))
            row_blocks = emit.ceil_div(rows, args["block_m"])
            local = emit.isub(job, emit.get(base, I64))
            row0 = emit.imul(emit.urem(local, row_blocks), args["block_m"])
            column0 = emit.imul(emit.udiv(local, row_blocks), args["block_n"])
            self._job(
                expert=emit.get(expert, I64),
                first_slot=emit.iadd(begin, row0),
                rows=emit.imin(args["block_m"], emit.isub(rows, row0)),
                column0=column0,
                columns=emit.imin(args["block_n"], emit.isub(args["columns"], column0)),
            )

    def _expert_rows(self, expert: Value) -> tuple[Value, Value]:
        emit = self.emit
        at = emit.imul(expert, 4)
        begin = emit.zext(emit.load(self.args["offsets"], at, I32), I64)
        end = emit.zext(emit.load(self.args["offsets"], emit.iadd(at, 4), I32), I64)
        return begin, emit.isub(end, begin)

    def _slot(self, index: Value) -> Value:
        return self.emit.zext(self.emit.load(self.args["slots"], self.emit.imul(index, 4), I32), I64)

    def _job(self, *, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        emit, args, v = self.emit, self.args, self.variant
        base = args["widened"] if v.widens else args["source"]
        with emit.loop(0, rows) as r:
            row = self._slot(emit.iadd(first_slot, r))
            if v.gemm == "up":
                row = emit.udiv(row, args["top_k"])
            pointer = emit.at(base, emit.imul(row, args["row_stride"]))
            emit.store(pointer, self.row_pointers, emit.imul(r, 8))
        weights = emit.at(args["weights"], emit.imul(expert, args["expert_stride"]))
        after = emit.function.append_basic_block("tiles_done")
        *wider, narrowest = v.tiles
        for tile in (*wider, narrowest):
            other = None
            if tile is not narrowest:
                this, other = (emit.function.append_basic_block(name) for name in ("tile", "narrower"))
                emit.cbranch(emit.icmp_unsigned("<=", rows, i64(tile.most)), this, other)
                emit.position_at_end(this)
            self._product(tile, expert, weights, column0, columns, rows)
            emit.branch(after)
            emit.position_at_end(other or after)
        self._epilogue(expert, first_slot, rows, column0, columns)

    def _product(self, tile: Tile, expert: Value, weights: Value, column0: Value, columns: Value, rows: Value) -> None:
        """Multiply a job's rows with its columns, tile by tile, into the totals."""
        emit, args = self.emit, self.args
        with emit.loop(0, args["k_padded"], args["block_k"]) as k0:
            k1 = emit.imin(args["k_padded"], emit.iadd(k0, args["block_k"]))
            with emit.loop(0, columns, tile.nr) as column:
                if not self.variant.panel:
                    self._point_at_weight_rows(tile, weights, emit.iadd(column0, column))
                with emit.loop(k0, k1, self.variant.chunk_k(tile.most)) as k:
                    length = emit.imin(i64(self.variant.chunk_k(tile.most)), emit.isub(k1, k))
                    b, raw = self._chunk(tile, weights, emit.iadd(column0, column), k, length)
                    groups = self._groups(expert, emit.iadd(column0, column), k)
                    self._row_blocks(tile, b, raw, column, k, length, rows, groups)

    def _groups(self, expert: Value, column: Value, k: Value) -> list[Value]:
        """Return the micro-kernel's operands about groups of quantised weights at a column and a chunk."""
        emit, args, codes, lanes = self.emit, self.args, self.variant.codes, self.variant.lanes
        if codes is None:
            return []
        span, panel = emit.idiv(k, codes.span), emit.idiv(column, codes.panel)
        within = emit.urem(column, i64(codes.panel))
        at = emit.iadd(emit.imul(expert, args["scale_expert_stride"]), emit.imul(panel, args["scale_panel_stride"]))
        at = emit.iadd(at, emit.imul(span, codes.scale_pitch(lanes)))
        each = emit.imul(emit.idiv(within, lanes), 4) if codes.shared else emit.imul(within, DTYPES[codes.scale])
        scales = emit.at(args["scales"], emit.iadd(at, each))
        at = emit.iadd(emit.imul(expert, args["zero_expert_stride"]), emit.imul(panel, args["zero_panel_stride"]))
        at = emit.iadd(at, emit.iadd(emit.imul(span, codes.panel), within))
        zeros = emit.at(args["zeros"], at)
        kept = i64(0)
        if self.variant.nibbles or self.variant.shorts:
            kept = (kept_offset if self.variant.shorts else group_offset)(codes, args["k_padded"], k, emit)
        return [scales, args["scale_panel_stride"], zeros, args["zero_panel_stride"], kept]

    def _chunk(self, tile: Tile, weights: Value, column: Value, k: Value, length: Value) -> tuple[Value, Value]:
        """Return the address of a chunk of weights, staged if the variant stages, and the unstaged one."""
        emit, v = self.emit, self.variant
        if not v.panel:
            at = v.k_bytes(k, emit)
            if v.codes is not None:
                left = emit.isub(self._row_bytes(), at)
                operands = [self.weight_rows, at, emit.idiv(length, v.codes.per_word), left, self.staged]
            else:
                operands = [self.weight_rows, at, emit.idiv(length, tile.micro.step), self.staged]
            emit.builder.call(self.stages[tile.nr], operands)
            return self.staged, self.staged
        packed = Micro(nv=1, unroll=1, source=v.packed_source, panel=v.panel, lanes=v.lanes)
        at = emit.imul(emit.udiv(column, i64(v.panel)), self.args["panel_stride"])
        at = emit.iadd(at, emit.imul(emit.urem(column, i64(v.panel)), packed.column_bytes))
        at = emit.iadd(at, emit.imul(emit.idiv(k, packed.step), v.panel * packed.column_bytes))
        b = emit.at(weights, at)
        if not v.stage:
            return b, b
        operands = [b, self.args["panel_stride"], emit.idiv(length, packed.step), self.staged]
        emit.builder.call(self.stages[tile.nr], operands)
        return self.staged, b

    def _row_bytes(self) -> Value:
        """Return the bytes of one plain weight row; 8-bit rows may end within a word."""
        v, k = self.variant, self.args["k"]
        return k if v.codes is not None and v.codes.per_word == 4 else v.k_bytes(k, self.emit)

    def _row_blocks(
        self,
        tile: Tile,
        b: Value,
        raw: Value,
        column: Value,
        k: Value,
        length: Value,
        rows: Value,
        groups: list[Value],
    ) -> None:
        """Run the micro-kernel over the rows, cut into blocks whose sizes differ by at most one."""
        emit, v, args = self.emit, self.variant, self.args
        a_offset = emit.imul(k, 2 if v.dot else 4)
        if v.codes is not None:
            a_offset = row_bytes(v.codes, k, emit)
        steps = emit.idiv(length, tile.micro.step)
        first = emit.zext(emit.icmp_unsigned("==", k, i64(0)), I64)
        # Each block of rows prefetches its part of the chunk that follows in each panel, until all is asked for.
        part = emit.imul(emit.ceil_div(steps, v.unroll), CACHE_LINE * tile.micro.lines_per_panel)
        chunk = emit.imul(v.k_bytes(length, emit), v.panel)
        blocks = emit.ceil_div(rows, tile.most)
        with emit.loop(0, blocks) as i:
            start = emit.udiv(emit.imul(i, rows), blocks)
            size = emit.isub(emit.udiv(emit.imul(emit.iadd(i, 1), rows), blocks), start)
            c = emit.at(self.totals, emit.iadd(emit.imul(start, self.totals_stride), emit.imul(column, 4)))
            a = emit.at(self.row_pointers, emit.imul(start, 8))
            done = emit.imul(i, part)
            ahead = emit.select(emit.icmp_unsigned("<", done, chunk), emit.iadd(chunk, done), i64(0))
            operands = [a, a_offset, b, args["panel_stride"], steps, c, self.totals_stride, first]
            operands += [emit.at(raw, ahead), args["panel_stride"], *groups]
            after = emit.function.append_basic_block("after")
            switch = emit.builder.switch(size, after)
            for m in range(tile.least, tile.most + 1):
                case = emit.function.append_basic_block(f"rows_{m}")
                switch.add_case(i64(m), case)
                emit.builder.position_at_end(case)
                emit.builder.call(self.micros[tile.nr, m], operands)
                emit.builder.branch(after)
            emit.builder.position_at_end(after)

    def _point_at_weight_rows(self, tile: Tile, weights: Value, column: Value) -> None:
        """Note the plain rows behind a tile's columns; padding columns point at row 0 and are never stored."""
        emit, v, args = self.emit, self.variant, self.args
        row_bytes = self._row_bytes()
        with emit.loop(0, i64(tile.nr)) as c:
            at = emit.iadd(column, c)
            if v.gemm == "up" and v.gated:
                group = emit.idiv(at, 2 * v.lanes)
                row = emit.iadd(emit.imul(group, v.lanes), emit.urem(at, i64(v.lanes)))
                inside = emit.icmp_unsigned("<", row, args["width"])
                is_up = emit.urem(emit.idiv(at, v.lanes), i64(2))
                row = emit.iadd(row, emit.imul(is_up, args["width"]))
            else:
                row, inside = at, emit.icmp_unsigned("<", at, args["width"])
            row = emit.select(inside, row, i64(0))
            emit.store(emit.at(weights, emit.imul(row, row_bytes)), self.weight_rows, emit.imul(c, 8))

    def _epilogue(self, expert: Value, first_slot: Value, rows: Value, column0: Value, columns: Value) -> None:
        """Bias, then activation and one rounding (up) or the routing weight (down)."""
        emit, args, v = self.emit, self.args, self.variant
        pair = v.gemm == "up" and v.gated
        factor = 2 if pair else 1
        out0 = emit.idiv(column0, factor)
        left = emit.isub(args["width"], emit.imin(args["width"], out0))
        vectors = emit.imin(emit.idiv(columns, factor * v.lanes), emit.ceil_div(left, v.lanes))
        size = DTYPES[v.dtype] if v.gemm == "up" else 4
        target = args["out"] if v.gemm == "up" else args["partial"]
        bias_row = emit.imul(emit.iadd(emit.imul(expert, args["columns"]), column0), 4)
        with emit.loop(0, rows) as r:
            slot = self._slot(emit.iadd(first_slot, r))
            totals = emit.at(self.totals, emit.imul(r, self.totals_stride))
            out_row = emit.imul(emit.iadd(emit.imul(slot, args["width"]), out0), size)
            scale = None
            if v.gemm == "down":
                scale = emit.splat(emit.load(args["scale"], emit.imul(slot, 4), F32))
            with emit.loop(0, vectors) as j:
                at = emit.imul(j, 4 * factor * v.lanes)
                values = []
                for part in range(factor):
                    offset = emit.iadd(at, 4 * part * v.lanes)
                    value = emit.load(totals, offset, emit.floats, align=4)
                    if v.bias:
                        bias = emit.load(args["bias"], emit.iadd(bias_row, offset), emit.floats, align=4)
                        value = emit.fadd(value, bias)
                    values.append(value)
                if v.gemm == "up":
                    result = activate(emit, v.activation, values[0], values[1] if pair else None)
                    result = emit.narrow(result, v.dtype)
                else:
                    result = emit.fmul(values[0], scale)
                done = emit.imul(j, v.lanes)
                count = emit.imin(i64(v.lanes), emit.isub(left, done))
                emit.store_partial(result, target, emit.iadd(out_row, emit.imul(done, size)), count, size)

    def _combine(self) -> None:
        """Sum each token's present slots in slot order in float32 and round once."""
        emit, args, v = self.emit, self.args, self.variant
        size, width = DTYPES[v.out], args["width"]
        chunks = emit.ceil_div(width, COMBINE_COLUMNS)
        with emit.loop(self.thread, emit.imul(args["tokens"], chunks), args["threads"]) as item:
            token = emit.udiv(item, chunks)
            start = emit.imul(emit.urem(item, chunks), COMBINE_COLUMNS)
            stop = emit.imin(width, emit.iadd(start, COMBINE_COLUMNS))
            first = emit.imul(token, args["top_k"])
            with emit.loop(start, stop, v.lanes) as column:
                total = emit.slot(emit.floats)
                emit.set(total, emit.splat(0.0))
                with emit.loop(first, emit.iadd(first, args["top_k"])) as slot:
                    expert = emit.zext(emit.load(args["ids"], emit.imul(slot, 4), I32), I64)
                    present = emit.icmp_unsigned("<", expert, args["experts"])
                    with emit.builder.if_then(present):
                        at = emit.imul(emit.iadd(emit.imul(slot, width), column), 4)
                        value = emit.load(args["partial"], at, emit.floats, align=4)
                        emit.set(total, emit.fadd(emit.get(total, emit.floats), value))
                count = emit.imin(i64(v.lanes), emit.isub(stop, column))
                at = emit.imul(emit.iadd(emit.imul(token, width), column), size)
                emit.store_partial(emit.narrow(emit.get(total, emit.floats), v.out), args["out"], at, count, size)
