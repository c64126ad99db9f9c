"""Generating in one process: the same tokens as transformers' own loop, alone and in batches, greedy and sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests.tiny_models import save_tiny, save_tokenizer
from tilecast.engine.generate import (
    Generation,
    Sampling,
    TextStream,
    decode,
    encode,
    generate,
    parse_ids,
    summary,
)
from tilecast.engine.load import Loaded, load_model
from tilecast.errors import InputError, UsageError

PROMPTS = [[5, 6, 7], [11, 3, 60, 2, 9, 44, 8], [5, 6, 7], [90]]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(save_tiny("mixtral", tmp_path_factory.mktemp("mixtral")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("texts"), vocab_size=300)
    return load_model(save_tokenizer(folder), experts="eager")


def ids(generation: Generation) -> list[tuple[int, ...]]:
    return [output.ids for output in generation.outputs]


def test_greedy_tokens_are_those_of_transformers_own_loop(mixtral: Loaded) -> None:
    own = load_model(mixtral.folder, experts="eager").model
    for prompt in PROMPTS:
        wanted = own.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0)
        seen = generate(mixtral, [prompt], max_new_tokens=9)
        assert list(seen.outputs[0].ids) == wanted[0, len(prompt) :].tolist()
        assert not seen.outputs[0].stopped and seen.outputs[0].logits_digest is None


def test_a_batch_gives_each_prompt_the_tokens_and_logits_that_it_has_alone(mixtral: Loaded) -> None:
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        together = generate(
            mixtral, PROMPTS, max_new_tokens=6, batch=4, reproducible=True, digests=True, sampling=sampling
        )
        assert together.uncovered == ()
        for place in (0, 1, 3):
            alone = generate(
                mixtral, [PROMPTS[place]], max_new_tokens=6, reproducible=True, digests=True, sampling=sampling
            )
            assert alone.outputs[0] == together.outputs[place]


def test_a_digest_tells_other_logits(mixtral: Loaded) -> None:
    one, other = (generate(mixtral, [prompt], max_new_tokens=2, digests=True) for prompt in ([5, 6], [5, 7]))
    assert one.outputs[0].logits_digest != other.outputs[0].logits_digest


def test_sampling_depends_on_the_seed_and_on_how_often_a_prompt_came(mixtral: Loaded) -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        return ids(generate(mixtral, PROMPTS, max_new_tokens=8, batch=2, sampling=Sampling(temperature=1.5, seed=seed)))

    first = run(0)
    assert first == run(0) != run(1)
    assert PROMPTS[0] == PROMPTS[2] and first[0] != first[2]


def test_one_token_to_choose_from_is_the_greedy_one(mixtral: Loaded) -> None:
    greedy = ids(generate(mixtral, PROMPTS[:2], max_new_tokens=5))
    assert ids(generate(mixtral, PROMPTS[:2], max_new_tokens=5, sampling=Sampling(temperature=2.0, top_k=1))) == greedy


def test_generation_ends_at_an_end_token_while_others_go_on(mixtral: Loaded) -> None:
    free = ids(generate(mixtral, PROMPTS[:2], max_new_tokens=6, batch=2))
    end = free[0][2]
    assert end not in free[1] and end not in free[0][:2]
    kept = mixtral.model.generation_config.eos_token_id
    mixtral.model.generation_config.eos_token_id = end
    try:
        seen = []
        ended = generate(
            mixtral, PROMPTS[:2], max_new_tokens=6, batch=2, on_token=lambda place, token: seen.append((place, token))
        )
    finally:
        mixtral.model.generation_config.eos_token_id = kept
    assert [(output.ids, output.stopped) for output in ended.outputs] == [(free[0][:2], True), (free[1], False)]
    assert [token for place, token in seen if place == 0] == list(free[0][:2])
    assert ended.decode_tokens == 2 + 5


def test_penalties_of_the_checkpoint_do_not_come_on_top(mixtral: Loaded) -> None:
    wanted = ids(generate(mixtral, PROMPTS[:1], max_new_tokens=6))
    kept = mixtral.model.generation_config
    try:
        mixtral.model.generation_config = type(kept)(repetition_penalty=50.0, do_sample=True, temperature=9.0)
        assert ids(generate(mixtral, PROMPTS[:1], max_new_tokens=6)) == wanted
        assert mixtral.model.generation_config.repetition_penalty == 50.0
    finally:
        mixtral.model.generation_config = kept


def test_speed_is_counted_apart(mixtral: Loaded) -> None:
    done = generate(mixtral, PROMPTS, max_new_tokens=4, batch=3)
    assert done.prefill_tokens == sum(map(len, PROMPTS)) and done.decode_tokens == 4 * 3
    assert done.prefill_s > 0 and done.decode_s > 0
    assert done.decode_per_s == done.decode_tokens / done.decode_s
    assert summary(done).startswith("16 new tokens; prefill 14 tokens in ")
    assert replace(done, decode_s=0.0).decode_per_s == 0


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "pattern"),
    [
        ([[]], {}, InputError, "the prompt is empty"),
        ([[1], [97]], {}, InputError, "prompt 2 has token 97, expected 0 to 96"),
        ([[-1]], {}, InputError, "token -1"),
        ([[1] * 500], {"max_new_tokens": 20}, InputError, "500 tokens, with 20 new ones more than the model's 512"),
        ([[1]], {"max_new_tokens": 0}, UsageError, "max_new_tokens is 0"),
        ([[1]], {"batch": 0}, UsageError, "batch 0"),
    ],
)
def test_what_cannot_be_generated_is_told(mixtral: Loaded, prompts, options, kind, pattern) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=pattern):
        generate(mixtral, prompts, **options)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_out_of_range_is_told(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_no_prompts_give_no_outputs(mixtral: Loaded) -> None:
    assert generate(mixtral, []).outputs == ()


def test_ids_stand_for_text_without_a_tokenizer(mixtral: Loaded) -> None:
    assert encode(mixtral, "1, 2 3,4") == parse_ids("1 2 3 4") == [1, 2, 3, 4]
    assert decode(mixtral, [7, 8]) == "7 8"
    stream = TextStream(None)
    assert [stream.push(7), stream.push(8), stream.end()] == ["7", " 8", ""]
    with pytest.raises(InputError, match="'once' is not a token id; without a tokenizer"):
        encode(mixtral, "once upon")


def test_text_appears_in_whole_characters_and_all_of_it(texts: Loaded) -> None:
    text = "zwölf\nBoxkämpfer 🙂 jagen\n\n"
    tokens = encode(texts, text)
    assert len(tokens) == len(text.encode()) and decode(texts, tokens) == text
    stream = TextStream(texts.tokenizer)
    pieces = [stream.push(token) for token in tokens] + [stream.end()]
    assert "".join(pieces) == text
    assert "🙂" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_indents_appear_where_decoding_drops_the_first_space() -> None:
    """As SentencePiece's decoders do: a line after the first one keeps all of its spaces."""
    vocabulary = ["▁if", "x", ":", "<0x0A>", "▁▁▁", "▁return"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: place for place, piece in enumerate(vocabulary)}, merges=[])
    )
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in (0, 1, 2, 3, 4, 5, 1, 3, 3, 5)] + [stream.end()]
    assert "".join(pieces) == "ifx:\n    returnx\n\n return"


def test_attention_that_a_model_writes_out_is_row_wise_too(tmp_path: Path) -> None:
    loaded = load_model(save_tiny("gpt_oss", tmp_path))
    own = loaded.model.config._attn_implementation
    done = [
        generate(loaded, prompts, max_new_tokens=4, batch=4, reproducible=True, digests=True)
        for prompts in (PROMPTS, PROMPTS[:1])
    ]
    assert [generation.uncovered for generation in done] == [(), ()]
    assert done[0].outputs[0].logits_digest == done[1].outputs[0].logits_digest
    assert loaded.model.config._attn_implementation == own


def test_experts_that_may_depend_on_the_batch_are_named(mixtral: Loaded) -> None:
    fastest = load_model(mixtral.folder, policy="fastest")
    done = generate(fastest, PROMPTS[:1], max_new_tokens=2, reproducible=True)
    assert done.uncovered == ("experts under the policy fastest",)


def test_what_is_cut_off_in_a_character_is_shown_at_the_end(texts: Loaded) -> None:
    stream = TextStream(texts.tokenizer)
    pieces = [stream.push(token) for token in encode(texts, "a🙂")[:-1]]
    assert pieces == ["a", "", "", ""] and stream.end() == "\ufffd"


def test_text_is_generated_from_text(texts: Loaded) -> None:
    done = generate(texts, [encode(texts, "Hello"), encode(texts, "Hi")], max_new_tokens=5, batch=2)
    assert [len(output.ids) for output in done.outputs] == [5, 5]
    assert encode(texts, "") == [] and all(isinstance(decode(texts, output.ids), str) for output in done.outputs)
