"""Sums and norms of rows: exact to rounding, and the same bits whatever lies beside a row."""

from __future__ import annotations

import pytest
import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu.rows import FORMS, rms_norm, row_sum

WIDTHS = (1, 5, 31, 32, 33, 64, 1000, 4099)


@pytest.mark.parametrize("width", WIDTHS)
def test_sums(width: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(700, width)
    found = row_sum(rows)
    error = (found.double() - rows.double().sum(-1)).abs() / rows.double().abs().sum(-1)
    assert error.max() < 1e-6
    assert torch.equal(row_sum(rows[3:4].clone()), found[3:4])
    # The order that the module promises.
    chains = torch.zeros(700, 32)
    for start in range(0, width, 32):
        part = rows[:, start : start + 32]
        chains[:, : part.shape[1]] += part
    while chains.shape[1] > 1:
        low, high = chains.chunk(2, 1)
        chains = low + high
    assert torch.equal(found, chains[:, 0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype, form: str) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(40, width).to(dtype), (1 + 0.2 * torch.randn(width)).to(dtype)
    wide = rows.double()
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = normal * (weight.double() + (form == "one_more"))
    found = rms_norm(rows, weight, 1e-6, form)
    # Up to two roundings into the dtype, four in float32 and the sum's.
    allowed = 1.1 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    assert ((found.double() - wanted).abs() / wanted.abs().clamp(min=1e-3)).max() < allowed
    assert torch.equal(rms_norm(rows[7:8].clone(), weight, 1e-6, form), found[7:8])


def test_what_does_not_fit_is_refused() -> None:
    rows, weight = torch.ones(3, 8), torch.ones(8)
    for wrong in (rows.double(), rows[:, ::2], rows.T, torch.ones(())):
        with pytest.raises(InputError, match=r"llvm\.rows"):
            rms_norm(wrong, weight, 1e-6, "scaled")
    with pytest.raises(InputError, match="form 'other'"):
        rms_norm(rows, weight, 1e-6, "other")
    with pytest.raises(InputError, match="contiguous float32"):
        row_sum(rows.T)
    assert row_sum(torch.ones(2, 0)).tolist() == [0, 0] and rms_norm(torch.ones(0, 8), weight, 0, "scaled").numel() == 0
