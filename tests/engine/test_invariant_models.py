"""Whole tiny models inside of `invariant()`: a request's logits alone, in any batch, in chunks and token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tiny_models import VOCABULARY, tiny_model
from tilecast.engine import around_linears
from tilecast.engine.around_linears import TilecastLinear
from tilecast.engine.invariant import Invariant, invariant, request_seed, sample_row
from tilecast.engine.invariant_attention import use_attention
from tilecast.engine.transformers import register_transformers

LENGTHS = (23, 7, 40, 31, 12)
PROMPTS = [
    torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS
]


PARTS = range(2)
"""Of two hundred mixes: each ends in time on a machine that is busy, too."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_of(family: str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> Any:
    """Return a tiny model on Tilecast's experts and norms; with `packed` its linears are packed as larger ones are."""
    register_transformers()
    model: Any = tiny_model(family, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if packed:
            patch.setattr(around_linears, "LEAST_WEIGHTS", 1)
        model.set_experts_implementation("tilecast")
    assert packed == any(type(module) is TilecastLinear for module in model.modules())
    use_attention(model)
    return model


def logits(model: Any, sequences: list[torch.Tensor], *, pad: int = 0, chunks: tuple[int, ...] = ()) -> Any:
    """Return each sequence's logits from one batch, padded on the left, the last chunk taking what is left."""
    longest = max(len(s) for s in sequences) + pad
    ids = torch.stack([torch.nn.functional.pad(s, (longest - len(s), 0), value=1) for s in sequences])
    mask = torch.stack([torch.arange(longest) >= longest - len(s) for s in sequences]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past, parts, begin = None, [], 0
    for size in (*chunks, longest - sum(chunks)):
        end = begin + size
        result = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past, begin = result.past_key_values, end
        parts.append(result.logits)
    together = torch.cat(parts, 1)
    return [row[-len(s) :] for row, s in zip(together, sequences, strict=True)]


def differing(model: Any, context: Invariant | None, mixes: int = 4, seed: int = 5) -> list[str]:
    """Return in which settings some request's logits differ from those that it has alone."""
    given = PROMPTS
    alone = [logits(model, [s])[0] for s in given]
    found = []
    draw = random.Random(seed)
    for number in range(mixes):
        chosen = [draw.randrange(len(given)) for _ in range(draw.randint(2, 8))]
        pad = draw.choice((0, 3))
        longest = max(len(given[i]) for i in chosen) + pad
        cut = draw.choice(((), (longest // 3,), (longest - 2, 1)))
        rows = logits(model, [given[i] for i in chosen], pad=pad, chunks=cut)
        if not all(torch.equal(row, alone[i]) for row, i in zip(rows, chosen, strict=True)):
            found.append(f"mix {number}: {chosen}, {pad} more padding, chunks {cut}")
    for name, chunks in (("chunks", (3, 9)), ("token by token", (15, *[1] * 7))):
        if not torch.equal(logits(model, [given[0]], chunks=chunks)[0], alone[0]):
            found.append(name)
    assert context is None or context.covered, context.uncovered
    return found


@pytest.mark.parametrize(("family", "packed"), [("mixtral", False), ("qwen3_moe", True)])
def test_a_request_has_the_same_logits_in_any_company(family: str, packed: bool) -> None:
    model = model_of(family, packed=packed)
    with invariant() as context:
        assert differing(model, context) == []
    # The negative control: without the context, and with torch's linears, the same comparison fails.
    assert differing(model_of(family), None) != []


def test_sinks_and_sliding_windows_too() -> None:
    model = model_of("gpt_oss")
    with invariant() as context:
        assert differing(model, context, mixes=2) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.long) for f in ("qwen3_moe", "deepseek_v3", "olmoe"))]
)
@pytest.mark.parametrize("part", PARTS)
def test_two_hundred_random_mixes(part: int, family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype, packed=True)
    with invariant() as context:
        assert differing(model, context, mixes=200 // len(PARTS), seed=part) == []


def test_sampled_tokens_do_not_depend_on_the_company() -> None:
    model = model_of("mixtral")
    given = PROMPTS[:3]
    seeds = [request_seed(9, request) for request in range(3)]

    def sampled(requests: list[int]) -> dict[int, list[int]]:
        tokens = {request: list(given[request].tolist()) for request in requests}
        for step in range(4):
            rows = logits(model, [torch.tensor(tokens[request]) for request in requests])
            for request, row in zip(requests, rows, strict=True):
                tokens[request].append(sample_row(row[-1], seeds[request], step, 1.2, 0.95, 40))
        return {request: found[-4:] for request, found in tokens.items()}

    with invariant():
        alone = {request: sampled([request])[request] for request in range(3)}
        assert sampled([2, 0, 1]) == alone
        assert sampled([1, 2]) == {1: alone[1], 2: alone[2]}


def test_attention_that_is_written_out_is_named() -> None:
    model = model_of("mixtral")
    model.set_attn_implementation("eager")
    with invariant() as context:
        logits(model, PROMPTS[:1])
    assert "aten::_softmax" in context.uncovered


def test_attention_by_sdpa_is_taken_over() -> None:
    model = model_of("mixtral")
    with invariant():
        wanted = logits(model, PROMPTS[:3])
    model.set_attn_implementation("sdpa")
    with invariant() as context:
        found = logits(model, PROMPTS[:3])
    assert context.covered
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
