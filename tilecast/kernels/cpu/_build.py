"""A thin layer over llvmlite's IR builder: addressed loads and stores, counted loops, float vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
F16 = ir.HalfType()
PTR = ir.PointerType()
VOID = ir.VoidType()
Value = Any
"""An llvmlite IR value; its type is dynamic."""


class BFloat(ir.Type):  # type: ignore[misc]  # llvmlite is untyped
    """LLVM's `bfloat`, which llvmlite lacks; needed only as operand type of the bf16 dot product."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16 = BFloat()


def i64(value: int) -> Value:
    return ir.Constant(I64, value)


def i32(value: int) -> Value:
    return ir.Constant(I32, value)


def vector(element: Value, lanes: int) -> Value:
    return ir.VectorType(element, lanes)


MXCSR_FLUSHES, FPCR_FLUSHES = 0x8040, 1 << 24
"""Bits of the control registers that make zeros of subnormal results and operands (x86: FTZ, DAZ; ARM: FZ)."""


def keeps_subnormals(triple: str) -> bool:
    """Return whether `Emit.keep_subnormals` can do what it says on a target."""
    return triple.startswith(("x86_64", "aarch64"))


def internal_function(module: Value, name: str, words: Sequence[Value], *, inline: bool = True) -> Value:
    """Add a function of those arguments and no result, called inside the module alone; nothing is thrown in it."""
    function = ir.Function(module, ir.FunctionType(VOID, words), name)
    function.linkage = "internal"
    if not inline:
        function.attributes.add("noinline")
    function.attributes.add("nounwind")
    return function


class Emit:
    """Emits into one function. Offsets are in bytes; integers are i64 unless said."""

    def __init__(self, function: Value, lanes: int, fma: bool) -> None:
        self.function = function
        self.module = function.module
        self.lanes = lanes
        self.has_fma = fma
        self.entry = function.append_basic_block("entry")
        self.builder = ir.IRBuilder(function.append_basic_block("body"))
        self.floats = vector(F32, lanes)
        self.words = vector(I32, lanes)

    def finish(self) -> None:
        """Return from the function and join the block that holds the stack slots to its body."""
        self.builder.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    # Memory -----------------------------------------------------------------

    def at(self, base: Value, offset: Value | int) -> Value:
        """Return base + offset bytes."""
        offset = i64(offset) if isinstance(offset, int) else offset
        return self.builder.gep(base, [offset], source_etype=I8)

    def load(self, base: Value, offset: Value | int, kind: Value, align: int | None = None) -> Value:
        return self.builder.load(self.at(base, offset), typ=kind, align=align)

    def store(self, value: Value, base: Value, offset: Value | int, align: int | None = None) -> None:
        self.builder.store(value, self.at(base, offset), align=align)

    def slot(self, kind: Value, init: Value | None = None, size: int | None = None) -> Value:
        """Return a stack slot (promoted to a register by the optimiser where possible)."""
        slot = ir.IRBuilder(self.entry).alloca(kind, size=None if size is None else i32(size))
        if init is not None:
            self.builder.store(init, slot)
        return slot

    def get(self, slot: Value, kind: Value) -> Value:
        return self.builder.load(slot, typ=kind)

    def set(self, slot: Value, value: Value) -> None:
        self.builder.store(value, slot)

    # Integers -----------------------------------------------------------------

    def imul(self, a: Value, b: Value | int) -> Value:
        return self.builder.mul(a, i64(b) if isinstance(b, int) else b)

    def iadd(self, a: Value, b: Value | int) -> Value:
        return self.builder.add(a, i64(b) if isinstance(b, int) else b)

    def isub(self, a: Value, b: Value | int) -> Value:
        return self.builder.sub(a, i64(b) if isinstance(b, int) else b)

    def idiv(self, a: Value, b: Value | int) -> Value:
        return self.builder.udiv(a, i64(b) if isinstance(b, int) else b)

    def imin(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_unsigned("<", a, b), a, b)

    def ceil_div(self, a: Value, b: Value | int) -> Value:
        b = i64(b) if isinstance(b, int) else b
        return self.builder.udiv(self.builder.sub(self.builder.add(a, b), i64(1)), b)

    # Control ------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Value | int, stop: Value, step: Value | int = 1) -> Iterator[Value]:
        """Count from start while below stop."""
        start = i64(start) if isinstance(start, int) else start
        step = i64(step) if isinstance(step, int) else step
        head, body, done = (self.function.append_basic_block(name) for name in ("head", "loop", "done"))
        before = self.builder.block
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(start, before)
        self.builder.cbranch(self.builder.icmp_unsigned("<", index, stop), body, done)
        self.builder.position_at_end(body)
        yield index
        following = self.builder.add(index, step)
        index.add_incoming(following, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(done)

    @contextmanager
    def forever(self) -> Iterator[Value]:
        """Loop until the yielded block is branched to."""
        body, done = (self.function.append_basic_block(name) for name in ("loop", "done"))
        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield done
        self.builder.branch(body)
        self.builder.position_at_end(done)

    def leave_if(self, condition: Value, target: Value) -> None:
        """Branch to `target` if the condition holds, else go on."""
        go_on = self.function.append_basic_block("next")
        self.builder.cbranch(condition, target, go_on)
        self.builder.position_at_end(go_on)

    # Vectors --------------------------------------------------------------------

    def splat(self, scalar: Value, kind: Value | None = None) -> Value:
        kind = self.floats if kind is None else kind
        if isinstance(scalar, float | int):
            return ir.Constant(kind, [scalar] * kind.count)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, i32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(vector(I32, kind.count), [0] * kind.count))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Return a·b + c, fused where the target can, else with two roundings."""
        if not self.has_fma:
            return self.builder.fadd(self.builder.fmul(a, b), c)
        return self.call_intrinsic("llvm.fma", [a, b, c])

    def call_intrinsic(self, name: str, args: Sequence[Value]) -> Value:
        kind = args[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call_external(f"{name}.{suffix}", kind, args)

    def call_external(self, name: str, result: Value, args: Sequence[Value]) -> Value:
        signature = ir.FunctionType(result, [a.type for a in args])
        known = self.module.globals.get(name)
        return self.builder.call(known or ir.Function(self.module, signature, name), args)

    def prefetch(self, address: Value) -> None:
        """Bring a cache line towards the core (second-level cache)."""
        self.call_external("llvm.prefetch.p0", VOID, [address, i32(0), i32(2), i32(1)])

    def hidden(self, address: Value) -> Value:
        """Return an address that the compiler does not know: what lies there stays in memory."""
        return self.builder.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [address], False)

    def opaque(self, value: Value) -> Value:
        """Return an x86 vector of which the compiler does not know how it came about: sums are not regrouped."""
        return self.builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], False)

    def fence(self) -> None:
        """Keep the compiler from carrying loaded values across: loading again is cheaper than a spilled register."""
        self.builder.asm(ir.FunctionType(VOID, []), "", "~{memory}", [], True)

    def keep_subnormals(self) -> Value:
        """Have subnormal numbers count from here on, whatever the thread was told; return what was told before."""
        triple = self.module.triple
        if triple.startswith("x86_64"):
            slots = [self.slot(I32), self.slot(I32)]
            self.call_external("llvm.x86.sse.stmxcsr", VOID, slots[:1])
            self.set(slots[1], self.builder.and_(self.get(slots[0], I32), i32(~MXCSR_FLUSHES)))
            self.call_external("llvm.x86.sse.ldmxcsr", VOID, slots[1:])
            return slots[0]
        if triple.startswith("aarch64"):
            told = self.call_external("llvm.aarch64.get.fpcr", I64, [])
            self.call_external("llvm.aarch64.set.fpcr", VOID, [self.builder.and_(told, i64(~FPCR_FLUSHES))])
            return told
        return None

    def restore_subnormals(self, told: Value) -> None:
        """Undo `keep_subnormals`."""
        if self.module.triple.startswith("x86_64"):
            self.call_external("llvm.x86.sse.ldmxcsr", VOID, [told])
        elif told is not None:
            self.call_external("llvm.aarch64.set.fpcr", VOID, [told])

    def shuffle(self, a: Value, b: Value, indices: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(vector(I32, len(indices)), list(indices)))

    def to_float(self, bits: Value) -> Value:
        return self.builder.bitcast(bits, self.floats)

    def select_lanes(self, compare: str, a: Value, b: Value, yes: Value, no: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered(compare, a, b), yes, no)

    # Dtypes -----------------------------------------------------------------------

    def load_floats(self, base: Value, offset: Value | int, dtype: str) -> Value:
        """Load `lanes` elements of a dtype and widen them to float32, exactly."""
        if dtype == "fp32":
            return self.load(base, offset, self.floats, align=4)
        if dtype == "fp16":
            halves = self.load(base, offset, vector(F16, self.lanes), align=2)
            return self.builder.fpext(halves, self.floats)
        shorts = self.load(base, offset, vector(I16, self.lanes), align=2)
        return self.to_float(self.builder.shl(self.builder.zext(shorts, self.words), self.splat(16, self.words)))

    def narrow(self, floats: Value, dtype: str) -> Value:
        """Round float32 lanes to a dtype, to nearest, ties to even; NaN stays NaN."""
        if dtype == "fp32":
            return floats
        if dtype == "fp16":
            return self.builder.fptrunc(floats, vector(F16, self.lanes))
        bits = self.builder.bitcast(floats, self.words)
        odd = self.builder.and_(self.builder.lshr(bits, self.splat(16, self.words)), self.splat(1, self.words))
        rounded = self.builder.add(self.builder.add(bits, self.splat(0x7FFF, self.words)), odd)
        # Adding could carry a NaN into infinity or zero: keep its top half and make it quiet.
        quiet = self.builder.or_(bits, self.splat(0x400000, self.words))
        is_nan = self.builder.fcmp_unordered("uno", floats, floats)
        top = self.builder.lshr(self.builder.select(is_nan, quiet, rounded), self.splat(16, self.words))
        return self.builder.trunc(top, vector(I16, self.lanes))

    def store_partial(self, value: Value, base: Value, offset: Value, count: Value, itemsize: int) -> None:
        """Store the first `count` (1 … lanes) lanes."""
        full = self.builder.icmp_unsigned("==", count, i64(self.lanes))
        with self.builder.if_else(full) as (whole, part):
            with whole:
                self.store(value, base, offset, align=itemsize)
            with part:
                buffer = self.slot(value.type)
                self.builder.store(value, buffer)
                element = ir.IntType(itemsize * 8)
                with self.loop(0, count) as lane:
                    at = self.imul(lane, itemsize)
                    self.store(self.load(buffer, at, element), base, self.iadd(offset, at), align=itemsize)


def load_one(emit: Emit, base: Value, offset: Value, dtype: str) -> Value:
    """Load one element of a dtype and widen it to float32, exactly."""
    if dtype == "bf16":
        bits = emit.zext(emit.load(base, offset, I16, align=2), I32)
        return emit.bitcast(emit.shl(bits, i32(16)), F32)
    if dtype == "fp16":
        return emit.fpext(emit.load(base, offset, F16, align=2), F32)
    return emit.load(base, offset, F32, align=4)


def transpose(emit: Emit, rows: list[Value]) -> list[Value]:
    """Transpose a square of 32-bit lanes (as many rows as lanes, a power of two) in registers."""
    lanes, step = len(rows), 1
    while step < lanes:
        for i in range(lanes):
            if i & step:
                continue
            a, b = rows[i], rows[i + step]
            low = [c if not c & step else lanes + c - step for c in range(lanes)]
            high = [c + step if not c & step else lanes + c for c in range(lanes)]
            rows[i], rows[i + step] = emit.shuffle(a, b, low), emit.shuffle(a, b, high)
        step *= 2
    return rows
