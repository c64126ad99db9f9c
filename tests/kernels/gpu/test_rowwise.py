"""Row-wise forms on GPUs, here under the interpreter: right, and the same bits in any batch; compiled for devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.tensor_core import tensor_core
from tilecast.errors import InputError
from tilecast.kernels.gpu import rowwise
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.ranges import KeyRanges, causal_ranges, full_ranges, ranges_of
from tilecast.kernels.static import MAX_SPILL_BYTES, analyse

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TORCHS = {
    "exp": torch.exp, "cos": torch.cos, "sin": torch.sin, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cores() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with tensor_core(16, 25):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.exp2(torch.randint(-3, 4, shape, generator=generator))
    return (torch.randn(*shape, generator=generator) * spread).to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "columns", "length"), [(1, 37, 70, 97), (3, 5, 16, 1), (1, 1, 65, 130)])
def test_products(batch: int, tokens: int, columns: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
    rows, weights, bias = (draw(*s, device=device, dtype=dtype) for s in ((batch, tokens, length),
                           (batch, columns, length), (batch, columns)))  # fmt: skip
    for given in (None, bias):
        whole = rowwise.multiply(rows, weights, given)
        exact = rows.double() @ weights.double().transpose(1, 2) + (0 if given is None else given.double()[:, None])
        size = rows.double().abs() @ weights.double().abs().transpose(1, 2) + exact.abs() + 1
        assert bool(((whole.double() - exact).abs() <= TOLERANCE[dtype] * size).all()), dtype
        for first in range(0, tokens, 9):
            part = slice(first, first + 4)
            assert torch.equal(rowwise.multiply(rows[:, part], weights, given), whole[:, part])
        turned = weights.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(rowwise.multiply(rows, turned, given), whole)


def test_products_of_nothing_and_of_what_does_not_fit(device: torch.device) -> None:
    assert rowwise.multiply(torch.ones(1, 0, 8, device=device), torch.ones(1, 4, 8, device=device)).shape == (1, 0, 4)
    with pytest.raises(InputError, match="of one dtype and device"):
        rowwise.multiply(torch.ones(1, 2, 8, device=device), torch.ones(1, 4, 9, device=device))
    with pytest.raises(InputError, match="float64"):
        rowwise.multiply(torch.ones(1, 2, 8).double(), torch.ones(1, 4, 8).double())


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 97, 1024, 2500])
def test_sums_and_softmax(length: int, device: torch.device) -> None:
    rows = draw(2, 5, length, device=device)
    forms = {
        "sum": (rowwise.row_sum, lambda x: x.double().sum(-1)),
        "softmax": (rowwise.softmax, lambda x: x.double().softmax(-1)),
        "log_softmax": (lambda x: rowwise.softmax(x, log=True), lambda x: x.double().log_softmax(-1)),
    }
    for name, (form, exact) in forms.items():
        whole = form(rows)
        assert torch.allclose(whole.double(), exact(rows), rtol=1e-4, atol=1e-3 if name == "sum" else 1e-6), name
        assert torch.equal(form(rows[1:, 3:4]), whole[1:, 3:4])


def test_rows_that_hold_nothing_but_minus_infinity_are_no_numbers_as_torchs(device: torch.device) -> None:
    rows = torch.full((2, 8), -torch.inf, device=device)
    assert rowwise.softmax(rows).isnan().all() and rows.softmax(-1).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", rowwise.KINDS)
def test_functions(kind: str, device: torch.device) -> None:
    values = draw(3, 700, device=device)
    whole = rowwise.function_of(kind, values)
    assert torch.allclose(whole, TORCHS[kind](values), rtol=1e-4, atol=1e-5)
    for cut in (1, 699, 1023, 1025):
        assert torch.equal(rowwise.function_of(kind, values.flatten()[cut:]), whole.flatten()[cut:])


ATTENTION = ("plain", "window", "bias", "sinks and cap", "no key")


def attention_cases() -> Iterator[object]:
    """The plain case in every dtype, each other one in one of them; the rest is long."""
    for i, case in enumerate(ATTENTION):
        for j, dtype in enumerate(DTYPES):
            marks = [] if case == "plain" or i % len(DTYPES) == j else [pytest.mark.long]
            yield pytest.param(case, dtype, id=f"{case}-{dtype}".replace("torch.", ""), marks=marks)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), list(attention_cases()))
def test_attention(case: str, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = (draw(2, h, 11, d, device=device, dtype=dtype) / 4 for h, d in ((4, 24), (2, 24), (2, 40)))
    sinks = draw(4, device=device) if case == "sinks and cap" else None
    cap = 2.5 if case == "sinks and cap" else 0.0
    mask = torch.ones(11, 11, device=device).tril().bool()
    if case == "window":
        mask &= torch.ones(11, 11, device=device).triu(-4).bool()
        mask[8, 6] = False  # a hole
    if case == "no key":
        mask[3] = False
    added = torch.where(mask, draw(11, 11, device=device), torch.finfo(torch.float32).min)
    given = added if case == "bias" else mask

    def run(at: slice, keys: int, pad: int = 0) -> torch.Tensor:
        wider = F.pad(given[at, :keys], (pad, 0), value=float(torch.finfo(torch.float32).min) if case == "bias" else 0)
        past = [F.pad(t[:, :, :keys], (0, 0, pad, 0), value=3.0) for t in (key, value)]
        ranges = ranges_of(wider, 2, wider.shape[0], keys + pad)
        return rowwise.attend(query[:, :, at], *past, ranges, scale=0.3, softcap=cap, sinks=sinks)

    whole = run(slice(None), 11)
    assert torch.equal(run(slice(None), 11, pad=5), whole)
    for last in (0, 4, 10):
        assert torch.equal(run(slice(last, last + 1), last + 1), whole[:, :, last : last + 1])

    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = (cap * (scores / cap).tanh() if cap else scores) + (added.double() if case == "bias" else 0)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, 4, 11, 1)], -1)
    weights = scores.softmax(-1)[..., :11].nan_to_num()
    exact = weights @ value.double().repeat_interleave(2, 1)
    assert torch.allclose(whole.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_attention_by_ranges_alone_and_of_heads_that_are_too_long(device: torch.device) -> None:
    query = draw(1, 2, 6, 16, device=device)
    causal = rowwise.attend(query, query, query, causal_ranges(query, query), scale=0.25)
    wanted = F.scaled_dot_product_attention(query, query, query, is_causal=True, scale=0.25)
    assert torch.allclose(causal, wanted, atol=1e-5)
    last = rowwise.attend(query[:, :, 5:], query, query, full_ranges(query[:, :, 5:], query), scale=0.25)
    assert torch.equal(last, causal[:, :, 5:])
    long = torch.ones(1, 1, 1, 513, device=device)
    empty = KeyRanges(first=torch.zeros(1, 1, 1).int(), stop=torch.ones(1, 1, 1).int(), keys=1)
    with pytest.raises(InputError, match="at most 512"):
        rowwise.attend(long, long, long, empty, scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", pytest.param("cuda:90", marks=pytest.mark.long),
                                    pytest.param("hip:gfx942", marks=pytest.mark.long)])  # fmt: skip
def test_they_compile_for_devices(target: str) -> None:
    builds = [rowwise.product_build(dtype, bias) for dtype in DTYPES for bias in (False, True)]
    builds += [rowwise.row_build("row_sum"), rowwise.row_build("softmax", LOG=False)]
    builds += [rowwise.row_build("elementwise", KIND=kind) for kind in rowwise.KINDS]
    builds += [
        rowwise.attention_build(torch.bfloat16, *size, mask=False, bias=False, sinks=False, cap=False)
        for size in ((64, 64), (128, 128), (192, 128), (256, 256))
    ] + [rowwise.attention_build(torch.float32, 128, 128, mask=True, bias=True, sinks=True, cap=True)]
    for build, report in zip(builds, analyse(builds, parse_target(target)), strict=True):
        assert not report.error, (build.function, build.constants, report.error)
        assert report.spill_bytes <= MAX_SPILL_BYTES, (build.function, build.constants, report.spill_bytes)
