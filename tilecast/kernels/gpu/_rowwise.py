# mypy: ignore-errors
"""Forms of torch's operations whose rows know nothing of each other: jit code of `rowwise.py`.

Tiles are the same for any number of rows, and every sum is taken in an order that its own length sets.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["tokens", "columns", "length"])
def product(
    rows, weights, bias, out, tokens, columns, length,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, tokens, columns] = rows [B, tokens, length] · weights [B, columns, length]ᵀ + bias [B, columns].

    Grid (tiles of a matrix, B); 16-bit operands on tensor cores, float32 in float32 where WIDE.
    """
    across = tl.cdiv(columns, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // across) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < tokens, column < columns
    row_begin = (batch * tokens + row) * length
    column_begin = (batch * columns + column) * length
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for begin in range(0, length, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside = k < length
        a = tl.load(rows + row_begin[:, None] + k[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weights + column_begin[None, :] + k[:, None], mask=column_inside[None, :] & inside[:, None], other=0.0
        )
        if WIDE:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    if HAS_BIAS:
        acc += tl.load(bias + batch * columns + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    place = (batch * tokens + row)[:, None] * columns + column[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["length"])
def row_sum(rows, out, length, BLOCK: tl.constexpr):
    """Sum float32 rows [programs, length] into out [programs]."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(rows + row * length + place, mask=place < length, other=0.0)
    tl.store(out + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["length"])
def softmax(rows, out, length, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """Write the softmax, or its logarithm, of float32 rows [programs, length]."""
    row = tl.program_id(0).to(tl.int64)
    peaks = tl.full([BLOCK], -INFINITY, tl.float32)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        peaks = tl.maximum(peaks, tl.load(rows + row * length + place, mask=place < length, other=-INFINITY))
    peak = tl.max(peaks, axis=0)
    totals = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        totals += tl.exp(tl.load(rows + row * length + place, mask=place < length, other=-INFINITY) - peak)
    total = tl.sum(totals, axis=0)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        lowered = tl.load(rows + row * length + place, mask=place < length, other=0.0) - peak
        result = lowered - tl.log(total) if LOG else tl.exp(lowered) / total
        tl.store(out + row * length + place, result, mask=place < length)


@triton.jit(do_not_specialize=["count"])
def elementwise(values, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write a function of float32 values [count]: every lane runs the same instructions, also in the last block."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + place, mask=place < count, other=0.0)
    if KIND == "exp":
        y = tl.exp(x)
    elif KIND == "cos":
        y = tl.cos(x)
    elif KIND == "sin":
        y = tl.sin(x)
    elif KIND == "sigmoid":
        y = 1.0 / (tl.exp(-x) + 1.0)
    elif KIND == "silu":
        y = x / (tl.exp(-x) + 1.0)
    elif KIND == "gelu":
        y = x * 0.5 * (tl.erf(x * 0.7071067811865476) + 1.0)
    else:  # gelu_tanh: (tanh(z) + 1) / 2 is the sigmoid of 2z
        y = x / (tl.exp(-1.5957691216057308 * (x + x * x * x * 0.044715)) + 1.0)
    tl.store(out + place, y, mask=place < count)


@triton.jit(do_not_specialize=["queries", "keys", "groups", "range_heads", "scale", "cap"])
def attention(
    query, key, value, first, stop, mask, bias, sinks, out, queries, keys, groups, range_heads, scale, cap,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, LANES_D: tl.constexpr, LANES_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query of one head a program: its real keys in blocks that are counted from the first of them.

    query [B, H, queries, DEPTH], key and value [B, H // groups, keys, …], out [B, H, queries, WIDTH]; first and stop
    [B, range_heads, queries]; mask and bias [B, range_heads, queries, keys]. Grid (queries, H, B).
    """
    position, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    row = (batch * heads + head) * queries + position
    ranged = (batch * range_heads + tl.minimum(head, range_heads - 1)) * queries + position
    begin, end = tl.load(first + ranged), tl.load(stop + ranged)
    source = (batch * (heads // groups) + head // groups) * keys
    depth, width = tl.arange(0, LANES_D), tl.arange(0, LANES_V)
    depth_inside, width_inside = depth < DEPTH, width < WIDTH
    q = tl.load(query + row * DEPTH + depth, mask=depth_inside, other=0.0).to(tl.float32)
    peak = tl.load(sinks + head) if HAS_SINKS else -INFINITY
    total = 1.0 if HAS_SINKS else 0.0
    acc = tl.zeros([LANES_V], tl.float32)
    for block in range(begin, end, BLOCK):
        place = block + tl.arange(0, BLOCK)
        real = place < end
        if HAS_MASK:
            real = real & (tl.load(mask + ranged * keys + place, mask=real, other=0) != 0)
        k = tl.load(
            key + (source + place)[:, None] * DEPTH + depth[None, :], mask=real[:, None] & depth_inside[None, :],
            other=0.0,
        )  # fmt: skip
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1) * scale
        if HAS_CAP:
            # cap · tanh(score / cap), without a tanh that overflows.
            scores = cap * (2.0 / (tl.exp(-2.0 * (scores / cap)) + 1.0) - 1.0)
        if HAS_BIAS:
            scores += tl.load(bias + ranged * keys + place, mask=real, other=0.0)
        scores = tl.where(real, scores, -INFINITY)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        # Nothing real so far leaves the peak at -inf, and -inf less itself is no number.
        base = tl.where(higher == -INFINITY, 0.0, higher)
        shrink = tl.exp(peak - base)
        weights = tl.exp(scores - base)
        v = tl.load(
            value + (source + place)[:, None] * WIDTH + width[None, :], mask=real[:, None] & width_inside[None, :],
            other=0.0,
        )  # fmt: skip
        acc = acc * shrink + tl.sum(v.to(tl.float32) * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        peak = higher
    result = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out + row * WIDTH + width, result.to(out.dtype.element_ty), mask=width_inside)
