"""The generated stable counting sort of routed slots by expert."""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import I32, I64, PTR, VOID, Emit, Value, i32, i64

SORT_ARGS = ("count", "experts", "given", "ids", "slots", "offsets")
"""The 64-bit words of the argument block: numbers of slots and experts, ids as given, and where the results go."""


def emit_sort(module: Value, name: str, bits: int, lanes: int) -> Value:
    """Emit `name`(argument block): sort ids of so many bits as `tilecast.kernels.routing.sort_slots` does."""
    function = ir.Function(module, ir.FunctionType(VOID, [PTR]), name)
    function.attributes.add("nounwind")
    emit, block = Emit(function, lanes, False), function.args[0]
    count, experts = emit.load(block, 0, I64), emit.load(block, 8, I64)
    given, ids, slots, offsets = (emit.load(block, 8 * i, PTR) for i in range(2, 6))

    with emit.loop(0, emit.iadd(experts, 1)) as e:
        emit.store(i32(0), offsets, emit.imul(e, 4))
    with emit.loop(0, count) as i:
        value = emit.load(given, emit.imul(i, bits // 8), ir.IntType(bits))
        wide = value if bits == 64 else emit.sext(value, I64)
        # Unsigned, so that negative ids are out of range too.
        present = emit.icmp_unsigned("<", wide, experts)
        emit.store(emit.select(present, emit.trunc(wide, I32), i32(-1)), ids, emit.imul(i, 4))
        with emit.builder.if_then(present):
            at = emit.imul(emit.iadd(wide, 1), 4)
            emit.store(emit.add(emit.load(offsets, at, I32), i32(1)), offsets, at)
    with emit.loop(0, experts) as e:
        at = emit.imul(e, 4)
        following = emit.iadd(at, 4)
        total = emit.add(emit.load(offsets, at, I32), emit.load(offsets, following, I32))
        emit.store(total, offsets, following)
    # Each expert's begin serves as its cursor and ends up as the next one's begin …
    with emit.loop(0, count) as i:
        expert = emit.sext(emit.load(ids, emit.imul(i, 4), I32), I64)
        with emit.builder.if_then(emit.icmp_signed(">=", expert, i64(0))):
            at = emit.imul(expert, 4)
            position = emit.load(offsets, at, I32)
            emit.store(emit.trunc(i, I32), slots, emit.imul(emit.zext(position, I64), 4))
            emit.store(emit.add(position, i32(1)), offsets, at)
    # … so that afterwards all begins move up by one place.
    with emit.loop(0, experts) as e:
        at = emit.imul(emit.isub(experts, e), 4)
        emit.store(emit.load(offsets, emit.isub(at, 4), I32), offsets, at)
    emit.store(i32(0), offsets, 0)
    emit.finish()
    return function
