"""The linear on plain weights: as exact as torch, and one row's bits whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from tests.cases import error
from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.cpu import linear
from tilecast.kernels.cpu.linear import multiply
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertLayer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-4, 5, shape, generator=generator))
    return (torch.randn(*shape, generator=generator) * spread / 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(97, 64), (47, 33), (1, 7), (70, 700)])
def test_rows_are_exact_and_alone(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    rows, weight = draw(1, 300, k, dtype=dtype, seed=1), draw(1, n, k, dtype=dtype, seed=2)
    added = draw(1, n, dtype=dtype, seed=3) if bias else None
    result = multiply(rows, weight, added)
    wanted = rows.double() @ weight.double().mT + (0 if added is None else added.double())
    torchs = torch.nn.functional.linear(rows[0], weight[0], None if added is None else added[0])
    assert error(result[0], wanted[0]) <= 2 * error(torchs, wanted[0]) + 2**-22
    for count in (1, 2, 3, 5, 6, 7, 8, 16, 31, 64, 129, 255, 256, 257, 299):
        assert torch.equal(multiply(rows[:, :count], weight, added), result[:, :count]), count
        assert torch.equal(multiply(rows[:, -count:], weight, added), result[:, -count:]), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_products_is_each_product(dtype: torch.dtype) -> None:
    rows, weights = draw(5, 9, 40, dtype=dtype, seed=1), draw(5, 13, 40, dtype=dtype, seed=2)
    result = multiply(rows, weights)
    for number in range(5):
        one = slice(number, number + 1)
        assert torch.equal(multiply(rows[one], weights[one]), result[one])


def test_threads_and_layouts_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = draw(1, 40, 300, dtype=torch.bfloat16, seed=1), draw(1, 130, 300, dtype=torch.bfloat16, seed=2)
    result = multiply(rows, weight)
    monkeypatch.setattr(linear, "WORK_OF_A_THREAD", 1)
    assert torch.equal(multiply(rows, weight), result)
    kernel, here = MoeGemm(), cpu_environment()
    layer = ExpertLayer(
        hidden=300, intermediate=130, experts=1, top_k=1, dtype="bf16", activation="identity", gated=False
    )
    plain = GemmWeights(gemm=layer.up, layout=PLAIN, data=weight)
    config = kernel.default(layer.up, 40, here)
    packed = kernel.pack(plain, kernel.layout(layer.up, config))
    out = torch.empty(40, 130, dtype=TORCH_DTYPES["bf16"])
    kernel.up(config, rows[0], packed, sort_slots(torch.zeros(40, 1, dtype=torch.int64), 1), out)
    assert torch.equal(out, result[0])


def test_transposed_weights_and_changes_in_place() -> None:
    rows, weight = draw(1, 3, 8, dtype=torch.float32, seed=1), draw(1, 6, 8, dtype=torch.float32, seed=2)
    result = multiply(rows, weight)
    assert torch.equal(multiply(rows, weight.mT.contiguous().mT), result)
    weight *= 2
    assert torch.equal(multiply(rows, weight), 2 * result)


def test_empty_and_wrong_operands() -> None:
    one = torch.ones(1, 2, 3)
    assert multiply(one[:, :0], one).shape == (1, 0, 2)
    assert torch.equal(multiply(torch.ones(1, 2, 0), torch.ones(1, 4, 0), torch.ones(1, 4)), torch.ones(1, 2, 4))
    with pytest.raises(InputError, match="of one dtype"):
        multiply(one, one.double())
    with pytest.raises(InputError, match="of one dtype"):
        multiply(one, torch.ones(1, 2, 4))
    with pytest.raises(InputError, match="bias is"):
        multiply(one, one, torch.ones(1, 3))
