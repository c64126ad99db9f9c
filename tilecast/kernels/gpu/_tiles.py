# mypy: ignore-errors
"""What the GEMM kernels share: tile order, weight addresses, the K loop, epilogues. Jit functions only.

Shapes in comments: BLOCK_M rows of one expert, BLOCK_N weight columns (of a gated up projection: the first half
gate, the second half the up columns that belong to them), BLOCK_K of the reduction. With SWAP the product is formed
as weights × activations, so that tiles are [BLOCK_N, BLOCK_M].
"""

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, m_tiles, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (row tile, column tile): GROUP_M row tiles sweep all columns together, for reuse in L2."""
    per_group = GROUP_M * N_TILES
    first = tile // per_group * GROUP_M
    height = tl.minimum(m_tiles - first, GROUP_M)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def tile_columns(tile_n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Return (output column, 0 for gate or 1 for up) of each of a tile's weight columns, int32 [BLOCK_N]."""
    j = tl.arange(0, BLOCK_N)
    if GATED:
        half: tl.constexpr = BLOCK_N // 2
        return tile_n * half + j % half, j // half
    else:
        return tile_n * BLOCK_N + j, j * 0


@triton.jit
def sigmoid(x):
    """Return the logistic function of float32 x."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Return the activation of float32 values; NaN stays NaN. `up` is not used where the layer is not gated."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.where(gate > 7.0, 7.0, gate)
        value = gate * sigmoid(1.702 * gate)
        if GATED:
            up = tl.where(up > 7.0, 7.0, up)
            up = tl.where(up < -7.0, -7.0, up) + 1.0
    elif ACTIVATION == "silu":
        value = gate * sigmoid(gate)
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh y) is the logistic function of 2y.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate * sigmoid(2.0 * inner)
    elif ACTIVATION == "identity":
        value = gate
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2" or ACTIVATION == "drelu")
        value = tl.where(gate < 0.0, 0.0, gate)
        if ACTIVATION == "drelu":
            up = tl.where(up < 0.0, 0.0, up)
        if ACTIVATION == "relu2":
            value = value * value
    if GATED:
        value = value * up
        if ACTIVATION == "relu" or ACTIVATION == "relu2" or ACTIVATION == "drelu":
            # Dead is +0, whatever `up` is, even -1 or infinite: on no device need it be computed.
            value = tl.where(gate <= 0.0, 0.0, value)
    return value


@triton.jit
def split_gate(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Return (gate, up), each half as wide as a tile: register-local, as both halves lie in one accumulator."""
    half: tl.constexpr = BLOCK_N // 2
    if SWAP:
        gate, up = acc.reshape(2, half, BLOCK_M).permute(1, 2, 0).split()
    else:
        gate, up = acc.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
    return gate, up


@triton.jit
def add_bias(acc, bias, columns, which, expert, WIDTH: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr,
             BIAS_EXPERT: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Return the tile with bias [E, N] added, in float32."""
    offsets = expert.to(tl.int64) * BIAS_EXPERT + columns * BIAS_COLUMN + which * BIAS_UP
    values = tl.load(bias + offsets, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if SWAP:
        return acc + values[:, None]
    else:
        return acc + values[None, :]


@triton.jit
def weight_pointers(weights, expert, tile_n, K_BEGIN, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
                    UP_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, GATED: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Return pointers to a weight tile at K_BEGIN and the mask of its columns, [BLOCK_N, 1] or [1, BLOCK_N].

    Where K is contiguous, columns beyond the last one read the last one instead: no mask in the loop.
    """
    columns, which = tile_columns(tile_n, BLOCK_N, GATED)
    inside = columns < WIDTH
    if K_STRIDE == 1:
        columns = tl.minimum(columns, WIDTH - 1)
    # 64 bits: an expert's weights alone may pass 2**31 elements.
    offsets = expert.to(tl.int64) * EXPERT_STRIDE + columns.to(tl.int64) * COLUMN_STRIDE + which * UP_STRIDE
    k = K_BEGIN + tl.arange(0, BLOCK_K)
    if SWAP:
        return weights + offsets[:, None] + k[None, :].to(tl.int64) * K_STRIDE, inside[:, None]
    else:
        return weights + offsets[None, :] + k[:, None].to(tl.int64) * K_STRIDE, inside[None, :]


@triton.jit
def row_pointers(rows, row_numbers, K_BEGIN, K: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):
    """Return pointers to activation rows [*, K], contiguous: [BLOCK_M, BLOCK_K], with SWAP the other way round."""
    k = K_BEGIN + tl.arange(0, BLOCK_K)
    offsets = row_numbers.to(tl.int64) * K
    if SWAP:
        return rows + offsets[None, :] + k[:, None]
    else:
        return rows + offsets[:, None] + k[None, :]


@triton.jit
def multiply(acc, a_pointers, b_pointers, columns_inside, k_begin, k_end, K_STRIDE: tl.constexpr,
             EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Return acc plus the product over [k_begin, k_end), ascending: one chain for each element.

    In the last, partial step both operands are masked: what lies beyond K may be NaN.
    """
    masks_n: tl.constexpr = K_STRIDE != 1 and not EVEN_N
    for k in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers)
            if masks_n:
                b = tl.load(b_pointers, mask=columns_inside, other=0.0)
            else:
                b = tl.load(b_pointers)
        else:
            inside = tl.arange(0, BLOCK_K) < k_end - k
            if SWAP:
                a_mask = inside[:, None]
                b_mask = inside[None, :]
            else:
                a_mask = inside[None, :]
                b_mask = inside[:, None]
            if masks_n:
                b_mask = b_mask & columns_inside
            a = tl.load(a_pointers, mask=a_mask, other=0.0)
            b = tl.load(b_pointers, mask=b_mask, other=0.0)
        if SWAP:
            acc = tl.dot(b, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K * K_STRIDE
    return acc


@triton.jit
def store_tile(out, value, row_numbers, rows_inside, columns, WIDTH: tl.constexpr, SWAP: tl.constexpr):
    """Store a tile into rows [*, WIDTH], contiguous, rounding to the buffer's dtype."""
    rows = row_numbers.to(tl.int64) * WIDTH
    if SWAP:
        pointers = out + rows[None, :] + columns[:, None]
        mask = rows_inside[None, :] & (columns < WIDTH)[:, None]
    else:
        pointers = out + rows[:, None] + columns[None, :]
        mask = rows_inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(acc, bias, out, slots, scale, expert, positions, rows_inside, tile_n, UP: tl.constexpr,
                WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
                BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Apply bias and activation (up) or routing weight (down) and store.

    Up writes row `position` of [S, I]; down writes float32 row `slot` of [S, H], to be summed by `combine`.
    """
    pairs: tl.constexpr = UP and GATED
    if HAS_BIAS:
        columns, which = tile_columns(tile_n, BLOCK_N, pairs)
        acc = add_bias(acc, bias, columns, which, expert, WIDTH, BIAS_COLUMN, BIAS_UP, BIAS_EXPERT, SWAP)
    if UP:
        if GATED:
            gate, up = split_gate(acc, BLOCK_M, BLOCK_N, SWAP)
            value = activate(gate, up, ACTIVATION, True)
            columns = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        else:
            value = activate(acc, acc, ACTIVATION, False)
            columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_tile(out, value, positions, rows_inside, columns, WIDTH, SWAP)
    else:
        numbers = tl.load(slots + positions, mask=rows_inside, other=0)
        weight = tl.load(scale + numbers, mask=rows_inside, other=0.0)
        if SWAP:
            value = acc * weight[None, :]
        else:
            value = acc * weight[:, None]
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_tile(out, value, numbers, rows_inside, columns, WIDTH, SWAP)
