"""Models that keep a state of the past, inside of `invariant()`: linear attention, state spaces, short convolutions."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from tests.engine.test_invariant_models import PARTS, PROMPTS, differing, logits, model_of
from tests.tiny_models import tiny_model
from tilecast.engine.invariant import invariant, outside
from tilecast.engine.invariant_attention import row_by_row, without_form

FAMILIES = ("qwen3_next", "jamba", "granitemoehybrid", "nemotron_h", "lfm2_moe")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", [*FAMILIES[:2], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[2:])])
def test_a_request_has_the_same_logits_in_any_company_and_any_cut(family: str) -> None:
    model = model_of(family)
    assert without_form(model) == set()
    with invariant() as context:
        assert differing(model, context, mixes=2) == []
    # The negative control: without the context the same comparison fails.
    assert differing(model, None, mixes=2) != []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_two_hundred_random_mixes(part: int, family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype, packed=True)
    with invariant() as context:
        assert differing(model, context, mixes=200 // len(PARTS), seed=part) == []


@pytest.mark.parametrize("family", [*FAMILIES[:2], FAMILIES[3]])
def test_logits_are_transformers_own_up_to_rounding(family: str) -> None:
    model = model_of(family)
    prompt = PROMPTS[0]
    wanted = logits(model, [prompt])[0]
    with invariant():
        found, cut = logits(model, [prompt])[0], logits(model, [prompt], chunks=(5, 1, 1, 7))[0]
        with outside():
            assert torch.equal(logits(model, [prompt])[0], wanted)
    # Cut as well: transformers itself begins each piece of a prompt with an empty state in Jamba.
    assert torch.equal(found, cut)
    assert not torch.equal(found, wanted)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_layer_without_such_a_form_is_named() -> None:
    model = tiny_model("minimax")
    with row_by_row(model) as context:
        pass
    assert context.uncovered == {"the state that MiniMaxLightningAttention keeps": 1}


def test_a_model_that_was_offered_forms_can_be_copied_and_offered_again() -> None:
    model = model_of("jamba")
    again = copy.deepcopy(model)
    with row_by_row(again), row_by_row(again):
        found = logits(again, PROMPTS[:1])[0]
    with invariant():
        assert torch.equal(logits(model, PROMPTS[:1])[0], found)
    mixers = [m for m in again.modules() if type(m).__name__ == "JambaMambaMixer"]
    assert [len(m._forward_pre_hooks) for m in mixers] == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_of_single_channels_are_cut_anywhere(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 24, 40, generator=draw).to(dtype)
    taps, bias = torch.randn(24, 1, 4, generator=draw).to(dtype), torch.randn(24, generator=draw).to(dtype)
    with invariant() as context:
        whole = F.conv1d(rows, taps, bias, padding=3, groups=24)[..., :40]
        for first in range(5):
            for cut in (3, 17, 39):
                part = F.conv1d(rows[first : first + 1, :, cut - 3 :], taps, bias, groups=24)
                assert torch.equal(part, whole[first : first + 1, :, cut:])
    assert context.covered, context.uncovered
    wanted = F.conv1d(rows.double(), taps.double(), bias.double(), padding=3, groups=24)[..., :40]
    assert torch.allclose(whole.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)
