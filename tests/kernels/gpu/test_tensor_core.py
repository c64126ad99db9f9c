"""The tensor-core model: against exact rational arithmetic, and what it says about tiles of `tl.dot`."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tensor_core import CANONICAL_NAN, fma, fma_dot, tensor_core, tensor_core_dot, to_bfloat16
from tilecast.kernels.gpu.target import TARGETS

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

AMPERE, HOPPER = (8, 24), (16, 25)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEAST = {"bf16": -126, "fp16": -14, "fp32": -126}
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")


@triton.jit
def product(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """C[M, N] = A[M, K]·B[N, K]ᵀ in steps of BLOCK_K, accumulated by the dot itself (FOLD) or after it."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(a + rows[:, None] * K + start + depth[None, :])
        y = tl.load(b + columns[None, :] * K + start + depth[:, None])
        if SWAP:
            x, y = tl.trans(y), tl.trans(x)
        if FOLD:
            total = tl.dot(x, y, total, input_precision="ieee")
        else:
            total += tl.dot(x, y, input_precision="ieee")
    if SWAP:
        total = tl.trans(total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


@triton.jit
def conversions(source, narrow, wide, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(source + at).to(tl.bfloat16, fp_downcast_rounding=ROUNDING)
    tl.store(narrow + at, value)
    tl.store(wide + at, value.to(tl.float32))


@triton.jit
def multiply_add(x, y, z, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def wide(shape: tuple[int, ...], seed: int, dtype: str = "fp32", low: int = -9, high: int = 3) -> torch.Tensor:
    """Values of random sign and significand, exponents from low to high, some zeros."""
    random = np.random.default_rng(seed)
    values = np.ldexp(random.uniform(1, 2, shape) * random.choice((-1, 1), shape), random.integers(low, high, shape))
    return torch.from_numpy(np.where(random.random(shape) < 0.05, 0, values)).to(DTYPES[dtype])


def cancelling(m: int, n: int, k: int, dtype: str = "bf16", seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A [m, k] and B [n, k] whose second half of K takes most of the first away again."""
    a, b = wide((m, k), seed, dtype), wide((n, k), seed + 1, dtype)
    a[:, k // 2 :], b[:, k // 2 :] = -a[:, : k // 2], b[:, : k // 2]
    b[:, k // 2 :: 5] = wide((n, k), seed + 2, dtype, -15, -9)[:, k // 2 :: 5]
    return a, b


def run(
    a: torch.Tensor, b: torch.Tensor, block_k: int, core: tuple[int, int], fold: bool = True, swap: bool = False
) -> np.ndarray:
    c = torch.full((a.shape[0], b.shape[0]), torch.nan)
    with tensor_core(*core):
        m, n, k = a.shape[0], b.shape[0], a.shape[1]
        product[(1,)](a, b, c, M=m, N=n, K=k, BLOCK_K=block_k, FOLD=fold, SWAP=swap)
    return bits(c.numpy())


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def exponent(value: float, least: int) -> int:
    return max(math.frexp(value)[1] - 1, least)


def rounded(value: Fraction, rounding: Callable[[Fraction], int]) -> float:
    """`value` as float32, its last bit by `rounding`; infinite where that takes more than 128 bits."""
    if value == 0:
        return 0.0
    top = value.numerator.bit_length() - value.denominator.bit_length()
    top -= abs(value) < Fraction(2) ** top
    unit = Fraction(2) ** (max(top, -126) - 23)
    kept = rounding(value / unit) * unit
    return math.copysign(math.inf, value) if abs(kept) >= 2**128 else math.copysign(float(abs(kept)), value)


def rational(row: list[float], column: list[float], total: float, dtype: str, core: tuple[int, int]) -> float:
    """One element by the words of the model: no floating point but to hold values."""
    group, fraction_bits = core
    for start in range(0, len(row), group):
        pairs = [(x, y) for x, y in zip(row, column, strict=True)][start : start + group]
        addends = [(Fraction(x) * Fraction(y), exponent(x, LEAST[dtype]) + exponent(y, LEAST[dtype])) for x, y in pairs]
        addends = [pair for pair in [*addends, (Fraction(total), exponent(total, -126))] if pair[0]]
        unit = Fraction(2) ** (max([-108 - fraction_bits, *(power for _, power in addends)]) - fraction_bits)
        total = rounded(sum((int(value / unit) for value, _ in addends), Fraction(0)) * unit, int)
    return total


RANGES = {"usual": (-9, 4), "wide": (-12, 14), "smallest": (-24, -12)}


@pytest.mark.parametrize("core", [AMPERE, HOPPER, (4, 23), (32, 13)], ids=str)
@pytest.mark.parametrize("exponents", RANGES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_model_is_the_exact_rational_sum(dtype: str, exponents: str, core: tuple[int, int]) -> None:
    low, high = RANGES[exponents]
    shift = -57 if (dtype, exponents) == ("bf16", "smallest") else 0  # Down to float32 sums that are subnormal.
    a = wide((5, 40), 1, dtype, low + shift, high + shift).double().numpy()
    b = wide((40, 3), 2, dtype, low + shift, high + shift).double().numpy()
    c = wide((5, 3), 3, "fp32", 2 * (low + shift), 2 * (high + shift)).numpy()
    expected = [[rational(list(a[m]), list(b[:, n]), float(c[m, n]), dtype, core) for n in range(3)] for m in range(5)]
    result = tensor_core_dot(a, b, c, dtype, *core)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(bits(result), bits(np.array(expected)))
    assert (np.abs(result) < 2.0**-126).any() == (shift != 0)


def test_subnormal_bfloat16_operands_count() -> None:
    a, b = wide((4, 16), 1, "bf16", -133, -126).double().numpy(), wide((16, 4), 2, "bf16", 0, 9).double().numpy()
    assert (np.abs(a) < 2.0**-126).all() and (a != 0).any()
    c = np.zeros((4, 4), np.float32)
    expected = [[rational(list(a[m]), list(b[:, n]), 0.0, "bf16", HOPPER) for n in range(4)] for m in range(4)]
    np.testing.assert_array_equal(bits(tensor_core_dot(a, b, c, "bf16", *HOPPER)), bits(np.array(expected)))


@pytest.mark.parametrize("core", [AMPERE, HOPPER], ids=str)
def test_order_in_a_group_does_not_matter_and_membership_does(core: tuple[int, int]) -> None:
    a, b = (operand.float().numpy() for operand in cancelling(8, 8, 64))
    c = wide((8, 8), 3).numpy()
    start = tensor_core_dot(a, b.T, c, "bf16", *core)
    group = core[0]
    within = np.concatenate([np.random.default_rng(g).permutation(group) + g * group for g in range(64 // group)])
    same = tensor_core_dot(a[:, within], b.T[within], c, "bf16", *core)
    np.testing.assert_array_equal(bits(same), bits(start))
    across = np.roll(np.arange(64), 1)
    other = tensor_core_dot(a[:, across], b.T[across], c, "bf16", *core)
    assert (bits(other) != bits(start)).mean() > 0.5


def test_generations_differ_where_it_is_hard_and_agree_where_it_is_easy() -> None:
    a, b = (operand.float().numpy() for operand in cancelling(8, 8, 64))
    zero = np.zeros((8, 8), np.float32)
    hard = [tensor_core_dot(a, b.T, zero, "bf16", *core) for core in (AMPERE, HOPPER)]
    assert (bits(hard[0]) != bits(hard[1])).mean() > 0.5
    small = np.random.default_rng(0).integers(-9, 10, (2, 8, 64)).astype(np.float32)
    for core in (AMPERE, HOPPER):
        easy = tensor_core_dot(small[0], small[1].T, zero, "bf16", *core)
        np.testing.assert_array_equal(easy, small[0] @ small[1].T)


def test_the_sum_is_truncated_and_not_rounded() -> None:
    # 1 + 2⁻²³·¾ lies nearer to 1 + 2⁻²³ and stays 1; the same below zero.
    a, b = np.array([[1, 2.0**-12, 2.0**-12]]), np.array([[1.0], [2.0**-12], [2.0**-13]])
    for sign in (1.0, -1.0):
        assert tensor_core_dot(sign * a, b, np.zeros((1, 1)), "bf16", *HOPPER).item() == sign


def test_a_zero_sum_is_positive() -> None:
    zeros = tensor_core_dot(np.array([[-1.0], [0.0]]), np.array([[0.0]]), np.array([[-0.0], [0.0]]), "bf16", *HOPPER)
    assert (bits(zeros) == 0).all()


def test_infinities_and_nan_propagate() -> None:
    inf, nan, top = math.inf, math.nan, 2.0**127
    rows = np.array([[inf, 1, 0], [inf, -inf, 0], [nan, 1, 0], [inf, 0, 1], [top, top, 0], [top, top, -top], [1, 1, 1]])
    columns = np.array([[1.0], [1.0], [1.0]])
    result = tensor_core_dot(rows, columns, np.zeros((7, 1)), "bf16", *HOPPER)[:, 0]
    # One fused sum: what overflows on the way (row 5) has not overflowed.
    expected = np.array([inf, CANONICAL_NAN, CANONICAL_NAN, inf, inf, top, 3], np.float32)
    np.testing.assert_array_equal(bits(result), bits(expected))
    assert np.isnan(tensor_core_dot(np.array([[inf]]), np.array([[0.0]]), np.zeros((1, 1)), "bf16", *HOPPER))
    later = tensor_core_dot(np.ones((1, 32)), np.ones((32, 1)), np.full((1, 1), -inf), "fp16", *AMPERE)
    assert later.item() == -inf


@pytest.mark.parametrize("core", [(0, 0), (16, 0), (16, 50)], ids=str)
def test_a_core_that_the_model_cannot_sum_is_refused(core: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a tensor core"):
        tensor_core_dot(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), "bf16", *core)


def test_fma_rounds_once() -> None:
    x, y = wide((3000,), 1, low=-12, high=12).numpy(), wide((3000,), 2, low=-12, high=12).numpy()
    z = -(x * y)  # What is left is the product's rounding error, or a little more.
    z[::2] *= np.ldexp(1.0, np.random.default_rng(3).integers(-30, 31, 1500)).astype(np.float32)
    # Just below a tie: rounding to float64 first makes a tie of it, which then goes the wrong way.
    x[:2], y[:2], z[:2] = 1 + 2.0**-23, 1 - 2.0**-23, (2.0**24 + 2, -(2.0**24) - 4)
    x[2:4], y[2:4], z[2:4] = 2.0**-75, (2.0**-75, 2.0**-74), (2.0**-149, 2.0**-126)
    exact = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(x, y, z, strict=True)]
    expected = np.array([rounded(value, round) for value in exact])
    result = fma(x, y, z)
    np.testing.assert_array_equal(bits(result) & 0x7FFFFFFF, bits(np.abs(expected)))
    np.testing.assert_array_equal(result, expected)
    twice = (x.astype(np.float64) * y + z).astype(np.float32)
    assert (twice[:2] != result[:2]).any(), "the cases above do not tell one rounding from two"


def test_fma_of_infinities_and_nan() -> None:
    x = np.array([math.inf, math.inf, 1, 3e38, math.nan], np.float32)
    y, z = np.array([1, 1, 1, 10, 1], np.float32), np.array([1, -math.inf, math.inf, 0, 1], np.float32)
    np.testing.assert_array_equal(fma(x, y, z), np.array([math.inf, math.nan, math.inf, math.inf, math.nan]))


def test_the_chain_takes_one_element_of_k_after_the_other() -> None:
    a, b, c = wide((2, 9), 1).numpy(), wide((9, 3), 2).numpy(), wide((2, 3), 3).numpy()
    expected = np.empty((2, 3))
    for m, n in np.ndindex(2, 3):
        total = float(c[m, n])
        for k in range(9):
            total = rounded(Fraction(float(a[m, k])) * Fraction(float(b[k, n])) + Fraction(total), round)
        expected[m, n] = total
    np.testing.assert_array_equal(bits(fma_dot(a, b, c)), bits(expected))


@interpreted
@pytest.mark.parametrize("core", [AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_block_k_is_neutral_for_a_chain_and_not_for_sums_of_dots(dtype: str, core: tuple[int, int]) -> None:
    a, b = cancelling(16, 16, 128, dtype)
    folded = [run(a, b, block_k, core) for block_k in (16, 32, 64)]
    np.testing.assert_array_equal(folded[0], folded[1])
    np.testing.assert_array_equal(folded[0], folded[2])
    zero = np.zeros((16, 16), np.float32)
    operands = (a.float().numpy(), b.float().numpy().T, zero)
    direct = fma_dot(*operands) if dtype == "fp32" else tensor_core_dot(*operands, dtype, *core)
    np.testing.assert_array_equal(folded[0], bits(direct))
    added = [run(a, b, block_k, core, fold=False) for block_k in (16, 32, 64)]
    assert (added[0] != added[1]).any() and (added[1] != added[2]).any() and (added[0] != folded[0]).any()


@interpreted
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_swapped_operands_have_the_same_bits(dtype: str) -> None:
    a, b = cancelling(16, 32, 64, dtype)
    np.testing.assert_array_equal(run(a, b, 32, HOPPER, swap=True), run(a, b, 32, HOPPER))


@interpreted
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_padding_leaves_bits_alone(dtype: str) -> None:
    a, b = cancelling(16, 16, 64, dtype)
    alone = run(a, b, 32, HOPPER)
    taller = torch.cat([a, torch.full_like(a, torch.nan)])
    wider = torch.cat([b, torch.full_like(b, torch.inf)])
    np.testing.assert_array_equal(run(taller, wider, 32, HOPPER)[:16, :16], alone)
    deeper = (torch.cat([x, torch.zeros(16, 32, dtype=x.dtype)], 1) for x in (a, b))
    np.testing.assert_array_equal(run(*deeper, 32, HOPPER), alone)


@interpreted
def test_conversions_round_to_nearest_even_as_torch_does() -> None:
    hard = [0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-40, 2.0**-127, 2.0**-133 * 1.5, 2.0**-134]
    ties = np.arange(0x3F7F_0000, 0x3F83_0000, 0x0800, dtype=np.uint32)  # Halves, odd and even, over a carry.
    source = torch.cat([torch.tensor(hard), torch.from_numpy(ties.view(np.float32)), wide((512,), 4, low=-149)])[:512]
    narrow, widened = torch.zeros(512, dtype=torch.bfloat16), torch.zeros(512)
    with tensor_core(*HOPPER):
        conversions[(1,)](source, narrow, widened, BLOCK=512, ROUNDING=None)
    expected = source.to(torch.bfloat16)
    assert torch.equal(narrow.view(torch.int16), expected.view(torch.int16))
    np.testing.assert_array_equal(bits(widened.numpy()), bits(expected.float().numpy()))
    with tensor_core(*HOPPER):
        conversions[(1,)](source, narrow, widened, BLOCK=512, ROUNDING="rtz")
    np.testing.assert_array_equal(bits(widened.numpy()), bits(source.numpy()) & 0xFFFF0000)
    payloads = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert (to_bfloat16(payloads) == 0x7FFF).all()


@interpreted
def test_multiply_add_is_fused() -> None:
    x, y, z = (torch.full((16,), value) for value in (1 + 2.0**-23, 1 - 2.0**-23, -1.0))
    out = torch.zeros(16)
    with tensor_core(*HOPPER):
        multiply_add[(1,)](x, y, z, out, BLOCK=16)
    assert (out == -(2.0**-46)).all()


@interpreted
def test_what_has_no_model_is_refused_and_everything_is_put_back() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, InterpreterError

    before = dict(vars(InterpreterBuilder))
    whole = torch.ones((16, 16), dtype=torch.int8)
    with pytest.raises(InterpreterError, match=r"no model of tl\.dot for int8 × int8"):
        run(whole, whole, 16, HOPPER)
    assert dict(vars(InterpreterBuilder)) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("m", "swap"), [(16, False), (64, False), (16, True)])  # On sm_90: mma.sync, wgmma, wgmma.
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_device_has_the_bits_of_the_model(dtype: str, m: int, swap: bool) -> None:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    target = next((target for target in TARGETS if target.environment_arch == arch and target.group), None)
    if target is None:
        pytest.skip(f"no tensor-core model of {arch}")
    a, b = cancelling(m, 64, 256, dtype)
    c = torch.full((m, 64), torch.nan, device="cuda")
    constants = {"M": m, "N": 64, "K": 256, "BLOCK_K": 64, "FOLD": True, "SWAP": swap}
    product[(1,)](a.cuda(), b.cuda(), c, **constants, num_warps=4, enable_fp_fusion=False)
    operands = (a.float().numpy(), b.float().numpy().T, np.zeros((m, 64), np.float32))
    model = (
        fma_dot(*operands) if dtype == "fp32" else tensor_core_dot(*operands, dtype, target.group, target.fraction_bits)
    )
    np.testing.assert_array_equal(bits(c.cpu().numpy()), bits(model))
