"""What `invariant()` runs on a GPU: here its kernels under the interpreter, as if CPU tensors were on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("transformers")

from tests.engine.test_invariant import ROW_WISE, rows
from tests.engine.test_invariant_models import PROMPTS, logits, model_of
from tests.interpreter import patch_once
from tests.tensor_core import tensor_core
from tilecast.engine import invariant_attention
from tilecast.engine import invariant_forms as forms
from tilecast.engine.invariant import invariant
from tilecast.kernels.gpu import rowwise

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
LEFT_TO_TORCH = {"softplus", "expm1", "log", "log1p", "tanh", "erf", "powers", "cumsum", "topk"}
"""Operations that torch's own are run for on a GPU, and named."""


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the GPU's forms taken for CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, for tensors on the device alone")
    patch_once()
    monkeypatch.setattr(forms, "_on_gpu", lambda tensor: True)
    for module in (forms, invariant_attention):
        monkeypatch.setattr(module, "attend", rowwise.attend)
    monkeypatch.setattr(forms, "multiply", rowwise.multiply)
    with tensor_core(16, 25):
        yield


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(ROW_WISE.keys() - LEFT_TO_TORCH - {"complex products"}))
def test_operations_row_by_row(as_if: None, name: str) -> None:
    given = rows(12, 60, torch.float32)
    wanted = ROW_WISE[name](given)
    with invariant():
        whole = ROW_WISE[name](given)
        for first in (0, 7, 10):
            assert torch.equal(ROW_WISE[name](given[first : first + 2]), whole[first : first + 2])
    assert torch.allclose(whole, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.long
def test_a_model_has_the_same_logits_in_a_batch_and_in_pieces(as_if: None) -> None:
    model = model_of("mixtral")
    given = [PROMPTS[0][:6], PROMPTS[1][:4]]
    with torch.no_grad():
        wanted = logits(model, given[:1])[0]
        with invariant() as context:
            alone = logits(model, given[:1])[0]
            assert torch.equal(logits(model, given[::-1], pad=2)[1], alone)
            assert torch.equal(logits(model, given[:1], chunks=(3, 1))[0], alone)
    assert context.covered, context.uncovered
    assert torch.allclose(alone, wanted, rtol=1e-3, atol=1e-3) and not torch.equal(alone, wanted)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ROW_WISE))
def test_operations_on_a_device(name: str, dtype: torch.dtype) -> None:
    given = rows(300, 96, dtype).cuda()
    try:
        with invariant() as context:
            whole = ROW_WISE[name](given)
    except RuntimeError as error:
        assert "device" in str(error)  # the table's weights are on the CPU
        pytest.skip("takes a weight that is on the CPU")
    assert context.covered == (name not in LEFT_TO_TORCH), context.uncovered
    if context.covered:
        with invariant():
            for count in (1, 2, 33, 257):
                assert torch.equal(ROW_WISE[name](given[:count]), whole[:count])
                assert torch.equal(ROW_WISE[name](given[-count:]), whole[-count:])


@needs_gpu
@pytest.mark.gpu
def test_products_and_attention_on_a_device() -> None:
    given, weight = rows(300, 96, torch.bfloat16).cuda(), rows(64, 96, torch.bfloat16).cuda()
    query = rows(2 * 4 * 33, 64, torch.bfloat16).view(2, 4, 33, 64).cuda() / 8
    with invariant() as context:
        whole = F.linear(given, weight)
        assert torch.equal(F.linear(given[:3], weight), whole[:3])
        causal = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        last = F.scaled_dot_product_attention(query[:1, :, -1:], query[:1], query[:1])
        assert torch.equal(last, causal[:1, :, -1:])
    assert context.covered, context.uncovered
