"""The linear on a packed copy: the bits of the one on plain weights, whatever the number of rows."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.kernels.test_linear import DTYPES, draw
from tilecast.errors import InputError
from tilecast.kernels.cpu import packed_linear
from tilecast.kernels.cpu.linear import multiply
from tilecast.kernels.cpu.packed_linear import PackedLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(97, 64), (47, 33), (1, 7), (70, 700)])
def test_bits_are_those_of_plain_weights(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    rows, weight = draw(1, 300, k, dtype=dtype, seed=1), draw(1, n, k, dtype=dtype, seed=2)
    added = draw(1, n, dtype=dtype, seed=3) if bias else None
    wanted = multiply(rows, weight, added)[0]
    packed = PackedLinear(weight[0])
    for count in (300, 1, 2, 3, 7, 8, 9, 16, 31, 257):
        found = packed(rows[0, :count], None if added is None else added[0])
        assert torch.equal(found, wanted[:count]), count
        assert torch.equal(packed(rows[0, -count:], None if added is None else added[0]), wanted[-count:]), count


def test_threads_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = draw(5, 300, dtype=torch.bfloat16, seed=1), draw(530, 300, dtype=torch.bfloat16, seed=2)
    packed = PackedLinear(weight)
    alone = packed(rows)
    monkeypatch.setattr(packed_linear, "WORK_OF_A_THREAD", 1)
    assert torch.equal(packed(rows), alone)


def test_it_is_a_copy_that_copies_share() -> None:
    rows, weight = draw(3, 8, dtype=torch.float32, seed=1), draw(6, 8, dtype=torch.float32, seed=2)
    packed = PackedLinear(weight.T.contiguous().T)
    before = packed(rows)
    weight *= 2
    assert torch.equal(packed(rows), before)
    assert torch.equal(packed(rows.T.contiguous().T), before)
    assert copy.deepcopy(packed) is packed
    assert packed.nbytes >= weight.nbytes
    assert packed(rows[:0]).shape == (0, 6)


def test_wrong_operands() -> None:
    packed = PackedLinear(torch.ones(4, 3))
    with pytest.raises(InputError, match="rows are"):
        packed(torch.ones(2, 4))
    with pytest.raises(InputError, match="rows are"):
        packed(torch.ones(2, 3, dtype=torch.float64))
    for weight in (torch.ones(4), torch.ones(0, 3), torch.ones(4, 3, dtype=torch.float64)):
        with pytest.raises(InputError, match="weight is"):
            PackedLinear(weight)
