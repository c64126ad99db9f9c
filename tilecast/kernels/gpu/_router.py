# mypy: ignore-errors
"""Router logits and top-k: jit code of `router.py`.

A logit is the sum, in ascending order, of the products of fixed slices of K. Either one program makes one slice, and
`choose` adds them, or one program makes and adds them all: the same additions, so the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def slice_product(
    hidden, weight, rows, rows_inside, columns, columns_inside, slice_begin,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Return the float32 product [BLOCK_T, BLOCK_E] over STEPS * BLOCK_K elements of K."""
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for step in range(0, STEPS):
        k = slice_begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
        k_inside = k < HIDDEN
        a = tl.load(
            hidden + rows.to(tl.int64)[:, None] * HIDDEN + k[None, :],
            mask=rows_inside[:, None] & k_inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + columns.to(tl.int64)[None, :] * HIDDEN + k[:, None],
            mask=columns_inside[None, :] & k_inside[:, None], other=0.0,
        )  # fmt: skip
        if WIDE:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    return acc


@triton.jit(do_not_specialize=["tokens", "slices_each"])
def make_logits(
    hidden, weight, logits, tokens, slices_each,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write logits [programs on axis 2, tokens, EXPERTS], each the sum of `slices_each` slices of K.

    hidden [tokens, HIDDEN] and weight [EXPERTS, HIDDEN] are multiplied in float32 where WIDE, otherwise as they are.
    """
    # STEPS is at least 2: a slice of a single dot would be folded into the addition, where there is one.
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows_inside, columns_inside = rows < tokens, columns < EXPERTS
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    first = tl.program_id(2) * slices_each
    for number in range(0, slices_each):
        slice_begin = (first + number) * (STEPS * BLOCK_K)
        total += slice_product(
            hidden, weight, rows, rows_inside, columns, columns_inside, slice_begin,
            HIDDEN, WIDE, BLOCK_T, BLOCK_E, BLOCK_K, STEPS,
        )  # fmt: skip
    row = tl.program_id(2).to(tl.int64) * tokens + rows
    inside = rows_inside[:, None] & columns_inside[None, :]
    tl.store(logits + row[:, None] * EXPERTS + columns[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def choose(
    logits, ids, weights, tokens, parts,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, TOP_K: tl.constexpr, CHOSEN: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Add the parts of one token's logits [parts, tokens, EXPERTS] in order, score them and choose TOP_K."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, LANES)
    inside = expert < EXPERTS
    logit = tl.zeros([LANES], tl.float32)
    at = logits + token * EXPERTS + expert
    for _ in range(0, parts):
        logit += tl.load(at, mask=inside, other=0.0)
        at += tokens.to(tl.int64) * EXPERTS
    if SIGMOID:
        score = tl.div_rn(1.0, 1.0 + tl.exp(-logit))
    else:
        logit = tl.where(inside, logit, float("-inf"))
        grown = tl.exp(logit - tl.max(logit, 0))
        score = tl.div_rn(grown, tl.sum(grown, 0))
    # Scores are not negative, so their bits order like them. NaN is above all, as in torch's sort; taken experts and
    # lanes of no expert are below, and as TOP_K <= EXPERTS no such lane is ever chosen.
    rank = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    rank = tl.where(inside, rank, -1)
    position = tl.arange(0, CHOSEN)
    chosen_ids = tl.zeros([CHOSEN], tl.int32)
    chosen = tl.zeros([CHOSEN], tl.float32)
    total = 0.0
    for j in range(0, TOP_K):
        best = tl.min(tl.where(rank == tl.max(rank, 0), expert, LANES), 0)
        # Its own score and zeros: a sum of them is exact in any order.
        value = tl.sum(tl.where(expert == best, score, 0.0), 0)
        total += value
        chosen_ids = tl.where(position == j, best, chosen_ids)
        chosen = tl.where(position == j, value, chosen)
        rank = tl.where(expert == best, -1, rank)
    if RENORMALIZE:
        chosen = tl.div_rn(chosen, tl.zeros([CHOSEN], tl.float32) + total)
    at = token * TOP_K + position
    tl.store(ids + at, chosen_ids, mask=position < TOP_K)
    tl.store(weights + at, chosen, mask=position < TOP_K)
