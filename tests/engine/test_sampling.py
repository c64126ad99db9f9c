"""Sampling of one row: its distribution, and that nothing but the row, the seed and the step decides."""

from __future__ import annotations

import pytest
import torch

from tilecast.engine.sampling import request_seed, sample_row
from tilecast.errors import InputError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 2.0, float("-inf")])


def test_zero_temperature_takes_the_first_of_the_largest() -> None:
    assert sample_row(LOGITS, 1, 0, temperature=0) == 1


def test_a_row_gives_the_same_tokens_whatever_was_sampled_before() -> None:
    alone = [sample_row(LOGITS, 7, step) for step in range(50)]
    torch.manual_seed(3)
    mixed = []
    for step in range(50):
        sample_row(LOGITS.flip(0), request_seed(7, step), step)
        mixed.append(sample_row(torch.stack([LOGITS, LOGITS * 2])[0], 7, step))
    assert mixed == alone
    assert len(set(alone)) > 1


def test_seeds_and_steps_give_other_draws() -> None:
    seeds = [request_seed(5, request) for request in range(30)]
    assert len({*seeds, request_seed(6, 0)}) == 31
    assert len({tuple(sample_row(LOGITS, seed, step) for step in range(20)) for seed in seeds}) == 30


def test_frequencies_are_the_probabilities() -> None:
    drawn = torch.tensor([sample_row(LOGITS, 11, step, temperature=0.8) for step in range(4000)])
    frequencies = torch.bincount(drawn, minlength=6) / 4000
    wanted = (LOGITS.double() / 0.8).softmax(0)
    # Four standard deviations of the widest.
    assert (frequencies - wanted).abs().max() < 4 * 0.5 / 4000**0.5
    assert frequencies[5] == 0


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    assert {sample_row(LOGITS, 1, step, top_k=2) for step in range(60)} == {1, 4}
    assert {sample_row(LOGITS, 1, step, top_k=1) for step in range(20)} == {1}
    assert {sample_row(LOGITS, 1, step, top_p=0.6) for step in range(60)} == {1, 4}
    assert {sample_row(LOGITS, 1, step, top_p=1e-9) for step in range(20)} == {1}


def test_rounded_logits_are_taken_as_they_are() -> None:
    rounded = LOGITS[:5].bfloat16()
    assert [sample_row(rounded, 2, s) for s in range(9)] == [sample_row(rounded.float(), 2, s) for s in range(9)]


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (LOGITS[None], {}, "expected floats"),
        (torch.arange(4), {}, "expected floats"),
        (torch.tensor([0.0, float("nan")]), {}, "nothing can be sampled"),
        (torch.full((3,), float("-inf")), {}, "nothing can be sampled"),
        (LOGITS, {"temperature": -1.0}, "temperature"),
        (LOGITS, {"temperature": float("nan")}, "temperature"),
        (LOGITS, {"top_p": 0.0}, "top_p"),
        (LOGITS, {"top_k": -1}, "top_k"),
    ],
)
def test_bad_input_is_one_line(logits: torch.Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_row(logits, 0, 0, **options)  # type: ignore[arg-type]
