"""The oracle against a second, slower one: Python floats, one token, one slot, one column at a time."""

from __future__ import annotations

import math

import pytest
import torch

from tilecast.errors import InputError
from tilecast.kernels.reference import activate, reference_down, reference_layer, reference_up
from tilecast.kernels.routing import sort_slots
from tilecast.problem import ACTIVATIONS, ExpertLayer

TOKENS = 5
H, I, E, K = 6, 4, 3, 2  # noqa: E741


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def activation_value(name: str, x: float) -> float:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    values = {
        "silu": x * sigmoid(x),
        "gelu": x * (1 + math.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + math.tanh(inner)) / 2,
        "relu": max(x, 0.0),
        "relu2": max(x, 0.0) ** 2,
        "drelu": max(x, 0.0),
        "identity": x,
        "swiglu_oai": min(x, 7.0) * sigmoid(1.702 * min(x, 7.0)),
    }
    return values[name]


def naive_up(layer: ExpertLayer, x: list[float], weight: torch.Tensor, bias: torch.Tensor | None) -> list[float]:
    """One slot's intermediate: weight [N, H] with gate rows first, bias [N]."""
    rows = weight.double().tolist()
    shift = [0.0] * len(rows) if bias is None else bias.double().tolist()
    products = [sum(a * b for a, b in zip(x, row, strict=True)) + s for row, s in zip(rows, shift, strict=True)]
    out = []
    for column in range(layer.intermediate):
        value = activation_value(layer.activation, products[column])
        if layer.gated:
            up = products[layer.intermediate + column]
            up = max(-7.0, min(up, 7.0)) + 1 if layer.activation == "swiglu_oai" else up
            value *= max(up, 0.0) if layer.activation == "drelu" else up
        out.append(value)
    return out


def naive_layer(
    layer: ExpertLayer, hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor,
    weights: torch.Tensor, bias13: torch.Tensor | None, bias2: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(hidden.shape[0], layer.hidden, dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < layer.experts:
                continue
            x = hidden[token].double().tolist()
            middle = naive_up(layer, x, w13[expert], None if bias13 is None else bias13[expert])
            for row in range(layer.hidden):
                product = sum(a * b for a, b in zip(middle, w2[expert, row].double().tolist(), strict=True))
                product += 0.0 if bias2 is None else float(bias2[expert, row])
                out[token, row] += product * float(weights[token, slot])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        (name, gated)
        for name in ACTIVATIONS
        for gated in (False, True)
        if (name, gated) not in (("identity", True), ("drelu", False))
    ],
)
def test_reference_is_the_naive_loop(activation: str, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layer = ExpertLayer(hidden=H, intermediate=I, experts=E, top_k=K, activation=activation, gated=gated, bias=bias)
    # Large enough that gate and up reach the clamps of swiglu_oai.
    hidden, w13, w2 = draw(TOKENS, H) * 3, draw(E, layer.up.n, H), draw(E, H, I)
    bias13, bias2 = (draw(E, layer.up.n), draw(E, H)) if bias else (None, None)
    ids = torch.tensor([[0, 1], [1, 1], [-1, 0], [E, -1], [0, 2**40]])
    weights = torch.rand(TOKENS, K, generator=generator)
    route = sort_slots(ids, E)

    result = reference_layer(layer, hidden, w13, w2, route, weights, bias13, bias2)
    expected = naive_layer(layer, hidden, w13, w2, ids, weights, bias13, bias2)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not result[3].any()

    middle = reference_up(layer, hidden, w13, route, bias13)
    assert middle.shape == (TOKENS * K, I)
    assert not middle[[4, 6, 7, 9]].any()
    assert torch.equal(reference_down(layer, middle, w2, route, weights, bias2), result)


def test_swiglu_oai_clamps_as_gpt_oss_does() -> None:
    gate, up = torch.tensor([100.0, -100.0, 1.0, 1.0]).double(), torch.tensor([1.0, 1.0, 100.0, -100.0]).double()
    at_one = 1 / (1 + math.exp(-1.702))
    expected = [14 / (1 + math.exp(-1.702 * 7)), -200 / (1 + math.exp(170.2)), 8 * at_one, -6 * at_one]
    torch.testing.assert_close(
        activate(gate, up, "swiglu_oai"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match=r"activation is 'tanh', expected one of silu.*swiglu_oai"):
        activate(torch.zeros(1), None, "tanh")


def test_a_lower_dtype_rounds_between_the_gemms() -> None:
    layer = ExpertLayer(hidden=H, intermediate=I, experts=E, top_k=1)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, H, generator=generator).bfloat16()
    w13, w2 = (
        torch.randn(E, 2 * I, H, generator=generator).bfloat16(),
        torch.randn(E, H, I, generator=generator).bfloat16(),
    )
    route, weights = sort_slots(torch.tensor([[0], [1], [2], [0], [1]]), E), torch.ones(TOKENS, 1)
    exact = reference_layer(layer, hidden, w13, w2, route, weights)
    low = reference_layer(layer, hidden, w13, w2, route, weights, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert not torch.equal(low.double(), exact)
    torch.testing.assert_close(low.double(), exact, rtol=0.1, atol=0.1)


def test_no_tokens() -> None:
    layer = ExpertLayer(hidden=H, intermediate=I, experts=E, top_k=K)
    route = sort_slots(torch.empty(0, K, dtype=torch.int64), E)
    out = reference_layer(
        layer, torch.empty(0, H), torch.ones(E, 2 * I, H), torch.ones(E, H, I), route, torch.empty(0, K)
    )
    assert out.shape == (0, H)


def test_one_expert_takes_all() -> None:
    layer = ExpertLayer(hidden=2, intermediate=1, experts=4, top_k=1, activation="relu", gated=False)
    route, weights = sort_slots(torch.full((3, 1), 2), 4), torch.full((3, 1), 0.5)
    w13 = torch.full((4, 1, 2), math.nan)
    w2 = torch.full((4, 2, 1), math.nan)
    w13[2], w2[2] = 1, 2
    out = reference_layer(layer, torch.ones(3, 2), w13, w2, route, weights)
    # The experts that nobody chose hold NaN and must not show: relu(1 + 1) * 2 * 0.5.
    assert out.tolist() == [[2.0, 2.0]] * 3
