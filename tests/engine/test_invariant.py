"""`invariant()`: each of torch's operations row by row, whole tiny models, and what it owns up to."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tilecast.engine.invariant import invariant, outside
from tilecast.engine.invariant_forms import REPLACEMENTS
from tilecast.engine.invariant_operations import EXACT, MOVES
from tilecast.errors import InputError

COUNTS = (2, 3, 8, 17, 33, 100, 257)
WIDTHS = (8, 60, 97, 700)
WEIGHT = torch.randn(700, generator=torch.Generator().manual_seed(2))
"""A scale of norms."""
ONES = torch.ones(1, 1, 2, 8)
MATRIX = torch.randn(700, 31, generator=torch.Generator().manual_seed(4))

ROW_WISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: F.linear(x, _matrix(x).T.contiguous()),
    "linear with bias": lambda x: F.linear(x, _matrix(x).T.contiguous(), WEIGHT[:31].to(x.dtype)),
    "matmul": lambda x: x @ _matrix(x),
    "einsum": lambda x: torch.einsum("tk,kn->tn", x, _matrix(x)),
    "addmm": lambda x: torch.addmm(WEIGHT[:31].to(x.dtype), x, _matrix(x)),
    "vector": lambda x: (x @ WEIGHT[: x.shape[-1]].to(x.dtype))[:, None],
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean of squares": lambda x: x.pow(2).mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "softmax in float32": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: x.float().log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], WEIGHT[: x.shape[-1]].to(x.dtype)),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], WEIGHT[: x.shape[-1]].to(x.dtype)),
    "rms_norm written out": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
    "divided by its sum": lambda x: x / x.abs().sum(-1, keepdim=True),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "rsqrt": lambda x: x.abs().add(1).rsqrt(),
    "relu squared": lambda x: F.relu(x).square(),
    "exp": lambda x: (x / 64).exp(),
    "expm1": lambda x: (x / 64).expm1(),
    "log": lambda x: x.abs().add(1).log(),
    "log1p": lambda x: x.abs().log1p(),
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "powers": lambda x: torch.cat([x.abs().pow(n) for n in (-2, -1, -0.5, 0.5, 1, 2, 3)], -1),
    "complex products": lambda x: torch.view_as_real(
        torch.polar(x[:, ::2].float().contiguous() / 8, x[:, ::2].float().contiguous())
        * torch.polar(torch.ones(()), x[:, :1].float().contiguous())
    ).flatten(1)[:, : x.shape[-1] // 2],
    "cumsum": lambda x: x.cumsum(-1),
    "topk": lambda x: x.topk(4, -1).values,
}


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return MATRIX[: x.shape[-1]].to(x.dtype)


def rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    spread = torch.exp2(torch.randint(-4, 5, (count, width), generator=generator))
    return (torch.randn(count, width, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROW_WISE)
def test_a_row_has_its_bits_alone_in_any_batch_and_with_any_strides(name: str, dtype: torch.dtype) -> None:
    operation = ROW_WISE[name]
    for width in WIDTHS:
        given = rows(300, width, dtype)
        with invariant() as context:
            alone = torch.cat([operation(given[i : i + 1]) for i in range(0, 300, 29)])
            whole = operation(given)
            assert torch.equal(whole[::29], alone), width
            for count in COUNTS:
                assert torch.equal(operation(given[:count]), whole[:count]), (width, count)
                assert torch.equal(operation(given[-count:]), whole[-count:]), (width, count)
            spread = torch.stack([given, given], -1)[..., 0]
            turned = given.T.contiguous().T
            assert torch.equal(operation(spread), whole) and torch.equal(operation(turned), whole), width
        assert context.covered, context.uncovered


@pytest.mark.parametrize("name", ["exp", "tanh", "cos", "softmax", "silu", "softplus", "sum"])
def test_elements_that_threads_share_out_keep_their_bits(name: str) -> None:
    given = rows(1501, 97, torch.float32)
    with invariant():
        whole = ROW_WISE[name](given)
        assert torch.equal(torch.cat([ROW_WISE[name](part) for part in given.split(13)]), whole)


def test_long_rows_are_summed_as_they_are_alone() -> None:
    given = rows(3, 50_001, torch.float32)
    with invariant():
        for operation in (lambda x: x.sum(-1), lambda x: x.log_softmax(-1), lambda x: x.softmax(-1)):
            whole = operation(given)
            assert all(torch.equal(operation(given[i : i + 1]), whole[i : i + 1]) for i in range(3))


def test_without_the_context_bits_do_depend_on_the_batch() -> None:
    """The negative control: the comparisons above can fail."""
    given = rows(300, 97, torch.float32)
    whole = F.linear(given, _matrix(given).T.contiguous())
    single = torch.cat([F.linear(given[i : i + 1], _matrix(given).T.contiguous()) for i in range(300)])
    sigmoid = torch.cat([torch.sigmoid(given[i : i + 1]) for i in range(300)])
    assert not torch.equal(whole, single) or not torch.equal(torch.sigmoid(given), sigmoid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROW_WISE)
def test_results_are_torchs_up_to_rounding(name: str, dtype: torch.dtype) -> None:
    given = rows(40, 97, dtype)
    wanted = ROW_WISE[name](given)
    with invariant():
        result = ROW_WISE[name](given)
    assert result.dtype == wanted.dtype and result.shape == wanted.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert torch.allclose(result.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_attention_of_direct_callers() -> None:
    query, key, value = rows(3 * 2 * 9, 16, torch.float32).view(3, 1, 2, 9, 16) / 8
    padded = F.pad(key, (0, 0, 4, 0)), F.pad(value, (0, 0, 4, 0))
    mask = F.pad(torch.ones(9, 9).tril().bool(), (4, 0))
    with invariant() as context:
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert torch.equal(F.scaled_dot_product_attention(query, *padded, mask), causal)
        last = F.scaled_dot_product_attention(query[:, :, -1:], key, value)
        assert torch.equal(last, causal[:, :, -1:])
        flat = F.scaled_dot_product_attention(query[0], key[0], value[0], is_causal=True, scale=0.25)
        assert torch.equal(flat, causal[0])
    assert context.covered
    assert torch.allclose(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True), atol=1e-5)


def test_a_mask_changed_in_place_is_read_again() -> None:
    query, key, value = rows(3 * 5, 16, torch.float32).view(3, 1, 1, 5, 16)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with invariant():
        before = F.scaled_dot_product_attention(query, key, value, mask)
        mask[..., 3:] = False
        after = F.scaled_dot_product_attention(query, key, value, mask)
        assert not torch.equal(before, after)
        assert torch.equal(after, F.scaled_dot_product_attention(query, key[:, :, :3], value[:, :, :3]))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("aten::convolution", lambda: F.conv1d(torch.ones(1, 2, 8), torch.ones(2, 2, 3))),
        ("aten::mm", lambda: torch.ones(2, 2).double() @ torch.ones(2, 2).double()),
        ("aten::_softmax", lambda: torch.ones(1, 2, 3, 4).softmax(-1)),
        ("aten::index_add", lambda: torch.zeros(3).index_add(0, torch.tensor([0, 0]), torch.ones(2))),
        ("aten::add", lambda: torch.add(torch.ones(2), torch.ones(2), alpha=0.3)),
        ("aten::pow", lambda: torch.ones(3) ** 0.3),
        ("aten::pow", lambda: 2.0 ** torch.ones(3)),
        ("aten::exp2", lambda: torch.ones(3).exp2()),
        ("aten::sqrt", lambda: torch.ones(3).double().sqrt()),
        ("aten::div", lambda: torch.ones(3, dtype=torch.complex64) / torch.ones(3, dtype=torch.complex64)),
        ("aten::sgn", lambda: torch.sgn(torch.ones(3, dtype=torch.complex64))),
        ("aten::multinomial", lambda: torch.multinomial(torch.ones(3), 1)),
        ("scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(*[ONES] * 3, dropout_p=0.5)),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_named(
    name: str, operation: Callable[[], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), invariant() as context:
        operation()
    assert name in context.uncovered
    assert name in caplog.text


def test_what_has_a_form_of_its_own_is_not_said_to_be_exact() -> None:
    # Real numbers are multiplied exactly by torch, complex ones in two ways.
    names = {packet.__name__.rstrip("_") for packet in REPLACEMENTS}
    assert names & (MOVES | EXACT) == {"mul"}


def test_moves_and_exact_arithmetic_are_covered() -> None:
    with invariant() as context:
        x = torch.arange(24.0).view(2, 3, 4)
        y = torch.cat([x, x.transpose(0, 1).reshape(2, 3, 4)], -1)[..., ::2].contiguous().clone()
        y[0] = torch.where(y[1] > 3, y[1] * 2 - 1, y[1].clamp(max=2))
        torch.zeros(4, dtype=torch.int64).scatter_add_(0, torch.tensor([0, 0]), torch.ones(2, dtype=torch.int64))
        assert y.to(torch.bfloat16).argmax(-1).unsqueeze(0).shape == (1, 2, 3)
        F.embedding(torch.tensor([1]), torch.ones(2, 2))
        F.dropout(x, 0.5, training=False)
    assert "aten::scatter_add_" not in context.uncovered
    assert context.covered, context.uncovered


def test_under_inference_mode_too() -> None:
    given = rows(33, 97, torch.float32)
    with torch.no_grad(), invariant():
        wanted = ROW_WISE["linear"](given), ROW_WISE["softmax"](given), ROW_WISE["matmul"](given)
    with torch.inference_mode(), invariant() as context:
        found = ROW_WISE["linear"](given), ROW_WISE["softmax"](given), ROW_WISE["matmul"](given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert context.covered, context.uncovered


def test_gradients_pass_through() -> None:
    weight = torch.nn.Parameter(rows(5, 8, torch.float32))
    given = rows(3, 8, torch.float32)
    with invariant():
        loss = F.silu(F.linear(given, weight)).sum()
    loss.backward()
    grad = weight.grad
    weight.grad = None
    F.silu(F.linear(given, weight)).sum().backward()
    assert grad is not None and weight.grad is not None
    assert torch.allclose(grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_it_ends_with_its_block_and_refuses_autocast() -> None:
    given = rows(5, 97, torch.float32)
    outside = F.linear(given, _matrix(given).T.contiguous())
    with pytest.raises(ZeroDivisionError), invariant():
        raise ZeroDivisionError
    assert torch.equal(F.linear(given, _matrix(given).T.contiguous()), outside)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"), invariant():
        pass


def test_outside_is_torchs_own_and_recorded_nowhere() -> None:
    rows, kernel = torch.randn(3, 4, 9), torch.randn(5, 4, 3)
    wanted = torch.nn.functional.linear(rows[0].T, rows[1, :, :].T)
    with invariant() as outer, invariant() as inner:
        with outside():
            torch.nn.functional.conv1d(rows, kernel)
            assert torch.equal(torch.nn.functional.linear(rows[0].T, rows[1, :, :].T), wanted)
        assert outer.covered and inner.covered
        torch.nn.functional.fractional_max_pool2d(torch.randn(1, 1, 8, 8), 3, output_size=2)
    assert not inner.covered
