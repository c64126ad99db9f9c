"""Sums over rows and what is built on them: one fixed order of additions, whatever the batch or the vector width.

Element i of a row goes into chain i mod CHAINS, in ascending order; the chains are then added in halves, the upper
half to the lower, until one number is left. Every operation is rounded by itself: nothing is fused.
"""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import F32, I32, I64, PTR, VOID, Emit, Value, i32, i64, load_one
from tilecast.problem import DTYPES

CHAINS = 32
"""Sums in flight. Fixed, so that an instruction set's vector width does not show in the bits."""

ENTRY = "tilecast_rows"

ARGS = ("job", "rows", "out", "weight", "count", "width", "chunk", "epsilon")
"""The 64-bit words of the argument block: a counter that the threads share, operands, sizes, float32 bits."""

SUM = "sum"
FORMS = ("rounded", "scaled", "one_more")
"""How a norm's weight w enters: w · rounded(x̂), rounded again; w · x̂, rounded once; (1 + w) · x̂, rounded once."""


class Rows:
    """Emits the entry function: RMS norms of rows of a dtype in one of FORMS, or the SUM of float32 rows."""

    def __init__(self, module: Value, dtype: str, form: str, fma: bool) -> None:
        self.dtype, self.form, self.size = dtype, form, DTYPES[dtype]
        function = ir.Function(module, ir.FunctionType(VOID, [PTR]), ENTRY)
        function.attributes.add("nounwind")
        self.emit = Emit(function, CHAINS, fma)
        self.block = function.args[0]
        pointers = ("rows", "out", "weight")
        self.args = {
            name: self.emit.load(self.block, 8 * i, PTR if name in pointers else I64) for i, name in enumerate(ARGS)
        }
        self.whole = self.emit.imul(self.emit.idiv(self.args["width"], CHAINS), CHAINS)
        self.rest = self.emit.isub(self.args["width"], self.whole)
        self.has_rest = self.emit.icmp_unsigned("!=", self.rest, i64(0))

    def build(self) -> None:
        """Emit the loop over chunks of rows, which the threads take one after the other."""
        emit, args = self.emit, self.args
        with emit.forever() as done:
            first = emit.imul(emit.atomic_rmw("add", self.block, i64(1), "monotonic"), args["chunk"])
            emit.leave_if(emit.icmp_unsigned(">=", first, args["count"]), done)
            with emit.loop(first, emit.imin(emit.iadd(first, args["chunk"]), args["count"])) as row:
                begin = emit.imul(emit.imul(row, args["width"]), self.size)
                source = emit.at(args["rows"], begin)
                total = self._total(source)
                if self.form == SUM:
                    emit.store(total, args["out"], emit.imul(row, self.size))
                else:
                    self._normalise(source, emit.at(args["out"], begin), total)
        emit.finish()

    def _total(self, source: Value) -> Value:
        """Return the sum of a row's elements, or of their squares."""
        emit = self.emit
        chains = emit.slot(emit.floats)
        emit.set(chains, emit.splat(0.0))
        with emit.loop(0, self.whole, CHAINS) as i:
            self._add(chains, emit.load_floats(source, emit.imul(i, self.size), self.dtype))
        with emit.builder.if_then(self.has_rest):
            self._add(chains, self._rest_of(source))
        sums, left = emit.get(chains, emit.floats), CHAINS // 2
        while left:
            low, high = (emit.shuffle(sums, sums, range(at, at + left)) for at in (0, left))
            sums, left = emit.fadd(low, high), left // 2
        return emit.extract_element(sums, i32(0))

    def _add(self, chains: Value, value: Value) -> None:
        emit = self.emit
        added = value if self.form == SUM else emit.fmul(value, value)
        emit.set(chains, emit.fadd(emit.get(chains, emit.floats), added))

    def _rest_of(self, row: Value) -> Value:
        """Return the elements behind the last whole vector, zeros after them."""
        emit = self.emit
        room = emit.slot(emit.floats)
        emit.set(room, emit.splat(0.0))
        lanes = emit.hidden(room)
        with emit.loop(0, self.rest) as i:
            at = emit.imul(emit.iadd(self.whole, i), self.size)
            emit.store(load_one(emit, row, at, self.dtype), lanes, emit.imul(i, 4))
        return emit.get(room, emit.floats)

    def _normalise(self, source: Value, target: Value, squares: Value) -> None:
        """Write a row divided by the root of its mean square, times the weight."""
        emit, weight = self.emit, self.args["weight"]
        mean = emit.fdiv(squares, emit.uitofp(self.args["width"], F32))
        epsilon = emit.bitcast(emit.trunc(self.args["epsilon"], I32), F32)
        root = emit.call_intrinsic("llvm.sqrt", [emit.fadd(mean, epsilon)])
        scale = emit.splat(emit.fdiv(ir.Constant(F32, 1.0), root))
        with emit.loop(0, self.whole, CHAINS) as i:
            at = emit.imul(i, self.size)
            value = self._weighted(emit.load_floats(source, at, self.dtype), weight, at, scale)
            emit.store(value, target, at, align=self.size)
        with emit.builder.if_then(self.has_rest):
            at = emit.imul(self.whole, self.size)
            room = emit.slot(emit.floats)
            emit.set(room, self._rest_of(weight))
            lanes = emit.hidden(room)
            value = self._weighted(self._rest_of(source), lanes, i64(0), scale, "fp32")
            emit.store_partial(value, target, at, self.rest, self.size)

    def _weighted(self, value: Value, weight: Value, at: Value, scale: Value, weight_dtype: str = "") -> Value:
        """Return normalised elements times their weights, in the dtype."""
        emit = self.emit
        normal = emit.fmul(value, scale)
        if self.form == "rounded":
            normal = self._rounded(normal)
        factor = emit.load_floats(weight, at, weight_dtype or self.dtype)
        if self.form == "one_more":
            factor = emit.fadd(factor, emit.splat(1.0))
        return emit.narrow(emit.fmul(factor, normal), self.dtype)

    def _rounded(self, value: Value) -> Value:
        """Round float32 lanes to the dtype and widen them again."""
        emit = self.emit
        if self.dtype == "fp32":
            return value
        narrow = emit.narrow(value, self.dtype)
        if self.dtype == "fp16":
            return emit.fpext(narrow, emit.floats)
        return emit.to_float(emit.shl(emit.zext(narrow, emit.words), emit.splat(16, emit.words)))
