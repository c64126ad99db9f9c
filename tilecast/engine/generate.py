"""Generating tokens with a loaded model: greedy or sampled, alone or in batches, on one rank or many.

transformers' own loop runs the model, so that every family's cache works; each step's token is chosen here, row by
row, on rank 0, and told to the other ranks. So a row's choice depends on its own logits alone, and ranks never part.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tilecast.engine.load import Loaded
from tilecast.engine.sampling import sample_row
from tilecast.engine.watch import together
from tilecast.errors import InputError, TilecastError, UsageError

MAX_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits: temperature 0 takes the largest; `top_k` 0 and `top_p` 1 leave all tokens.

    Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, expected 0 or above")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}, expected above 0 and at most 1")
        if self.top_k < 0 or self.seed < 0:
            raise UsageError(f"top_k is {self.top_k} and seed {self.seed}, expected 0 or above")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit always wins."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one prompt gave. `stopped` tells an end token from the end of `max_new_tokens`.

    `logits_digest` is the SHA-256 of the float32 logits [V] of every step in turn, None unless it was asked for.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    stopped: bool
    logits_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All prompts' results in their order, and how long it took.

    Prefill counts the prompts' tokens until each batch's first new token; decode counts the tokens after that.
    `uncovered` names operations that ran although nothing vouches that their bits do not depend on the batch; None
    where bits were not asked to be independent of it.
    """

    outputs: tuple[Generated, ...]
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    uncovered: tuple[str, ...] | None = None

    @property
    def prefill_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_per_s(self) -> float:
        """New tokens per second, without each prompt's first."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    batch: int = 1,
    reproducible: bool = False,
    digests: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_stuck: Callable[[TilecastError], None] | None = None,
) -> Generation:
    """Continue prompts of token ids, `batch` of them at a time, padded on the left to the longest.

    `on_token` is called with (prompt's place, token) as tokens come, end tokens left out. `reproducible` runs the
    model's other operations row by row, too (`invariant`), so that bits do not depend on the batch; what it cannot
    vouch for is named in the result. A sampled request's draws come from the seed and the prompt itself (the n-th of
    equal prompts draws anew), not from its place. On several ranks all must call it alike; `on_stuck` is as
    `watch.together` says.

    Raises UsageError for numbers out of range, InputError for prompts that the model cannot take, and on every rank
    what any of them raises.
    """
    if max_new_tokens < 1 or not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, batch {batch}; expected ≥ 1 and 1 to {MAX_BATCH}")
    chosen = sampling or Sampling()
    check_prompts(loaded, prompts, max_new_tokens)
    seeds = _seeds(chosen.seed, prompts)
    outputs: list[Generated] = []
    clock = _Clock()
    with together(loaded.group, on_stuck), _row_by_row(loaded.model, reproducible) as context:
        for start in range(0, len(prompts), batch):
            rows = [tuple(prompt) for prompt in prompts[start : start + batch]]
            steps = _Steps(
                loaded, rows, chosen, seeds[start : start + batch], start, clock, digests=digests, on_token=on_token
            )
            outputs += _run(loaded, rows, steps, max_new_tokens)
    uncovered = None if context is None else tuple(sorted(context.uncovered))
    return Generation(
        outputs=tuple(outputs),
        prefill_tokens=sum(len(prompt) for prompt in prompts),
        prefill_s=clock.prefill_s,
        decode_tokens=clock.decode_tokens,
        decode_s=clock.decode_s,
        uncovered=uncovered,
    )


def check_prompts(loaded: Loaded, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError for a prompt that is empty, has ids outside the vocabulary, or leaves no room to continue."""
    config = loaded.model.config.get_text_config(decoder=True)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    longest = getattr(config, "max_position_embeddings", None)
    for place, prompt in enumerate(prompts):
        which = f"prompt {place + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise InputError(f"{which} is empty, expected at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocabulary]
        if wrong:
            raise InputError(f"{which} has token {wrong[0]}, expected 0 to {vocabulary - 1}")
        if isinstance(longest, int) and len(prompt) + max_new_tokens > longest:
            raise InputError(
                f"{which} has {len(prompt)} tokens, with {max_new_tokens} new ones more than the model's {longest}"
            )


def encode(loaded: Loaded, text: str) -> list[int]:
    """Return a text's token ids by the checkpoint's tokenizer; without one, the numbers that the text lists.

    An empty text gives the begin token where there is one. Raises InputError for words where numbers are needed.
    """
    if loaded.tokenizer is not None:
        ids = [int(token) for token in loaded.tokenizer(text)["input_ids"]]
        begin = loaded.tokenizer.bos_token_id
        return ids if ids or begin is None else [int(begin)]
    return parse_ids(text)


def parse_ids(text: str) -> list[int]:
    """Return token ids from a text such as `1,2,3` or `1 2 3`. Raises InputError."""
    words = text.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= 9):
            raise InputError(
                f"{word!r:.40} is not a token id; without a tokenizer a prompt is a list of ids such as 1,2,3"
            )
    return [int(word) for word in words]


class TextStream:
    """Turns tokens into text as they come: what is returned never has to be taken back.

    Without a tokenizer the text is the ids, parted by spaces.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        """Start an empty text."""
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._shown = 0
        self._first = True

    def push(self, token: int) -> str:
        """Return the text that is certain once `token` has come."""
        if self._tokenizer is None:
            space, self._first = "" if self._first else " ", False
            return f"{space}{token}"
        self._pending.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""  # A character whose bytes are in several tokens is not whole yet.
        new, self._shown = text[self._shown :], len(text)
        if text.endswith("\n"):
            # The last token stays: some decoders drop a text's first space, which would be the next line's.
            self._pending = [token]
            self._shown = len(self._text())
        return new

    def end(self) -> str:
        """Return what is left when no token comes any more."""
        if self._tokenizer is None:
            return ""
        new, self._pending, self._shown = self._text()[self._shown :], [], 0
        return new

    def _text(self) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(self._pending, skip_special_tokens=True)) if self._pending else ""


def decode(loaded: Loaded, ids: Sequence[int]) -> str:
    """Return the text of generated ids; without a tokenizer the ids, parted by spaces."""
    if loaded.tokenizer is None:
        return " ".join(str(token) for token in ids)
    return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True))


# One batch -----------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0


@dataclass
class _Steps:
    """Chooses each step's tokens, as a logits processor of transformers: only the chosen one is left to be taken."""

    loaded: Loaded
    rows: list[tuple[int, ...]]
    sampling: Sampling
    seeds: list[int]
    first_place: int
    clock: _Clock
    digests: bool
    on_token: Callable[[int, int], None] | None
    ends: frozenset[int] = field(init=False)
    ids: list[list[int]] = field(init=False)
    stopped: list[bool] = field(init=False)
    hashes: list[Any] = field(init=False)
    step: int = field(init=False, default=0)
    since: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.ends = _end_tokens(self.loaded)
        self.ids = [[] for _ in self.rows]
        self.stopped = [False] * len(self.rows)
        self.hashes = [hashlib.sha256() for _ in self.rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self._choose(scores)
        now = time.perf_counter()
        if self.step == 0:
            self.clock.prefill_s += now - self.since
        else:
            self.clock.decode_s += now - self.since
        for row, token in enumerate(tokens):
            if self.stopped[row]:
                continue
            self.clock.decode_tokens += self.step > 0
            if token in self.ends:
                self.stopped[row] = True
                continue
            self.ids[row].append(token)
            if self.on_token is not None:
                self.on_token(self.first_place + row, token)
        self.step, self.since = self.step + 1, time.perf_counter()
        only = torch.full_like(scores, -math.inf)
        return only.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)

    def _choose(self, scores: torch.Tensor) -> list[int]:
        tokens = torch.zeros(len(self.rows), dtype=torch.int64)
        if self.loaded.group.rank == 0:
            for row, logits in enumerate(scores.detach().float().cpu()):
                if self.digests and not self.stopped[row]:
                    self.hashes[row].update(logits.numpy().tobytes())
                if not self.stopped[row]:
                    tokens[row] = self._token(row, logits)
        if self.loaded.group.world_size > 1:
            tokens = tokens.to(scores.device)
            dist.broadcast(tokens, src=0)
        return [int(token) for token in tokens.tolist()]

    def _token(self, row: int, logits: torch.Tensor) -> int:
        chosen = self.sampling
        return sample_row(logits, self.seeds[row], self.step, chosen.temperature, chosen.top_p, chosen.top_k)

    def outputs(self) -> list[Generated]:
        return [
            Generated(
                prompt=prompt,
                ids=tuple(self.ids[row]),
                stopped=self.stopped[row],
                logits_digest=self.hashes[row].hexdigest() if self.digests else None,
            )
            for row, prompt in enumerate(self.rows)
        ]


def _run(loaded: Loaded, rows: list[tuple[int, ...]], steps: _Steps, max_new_tokens: int) -> list[Generated]:
    width = max(len(row) for row in rows)
    pad = _pad_token(loaded)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=loaded.device)
    with _own_settings(loaded, max_new_tokens, pad), torch.inference_mode():
        steps.since = time.perf_counter()
        loaded.model.generate(ids, attention_mask=mask, logits_processor=[steps])
    return steps.outputs()


@contextlib.contextmanager
def _own_settings(loaded: Loaded, max_new_tokens: int, pad: int) -> Iterator[None]:
    """Replace the checkpoint's generation settings: penalties and its own sampling would come on top of ours."""
    made = importlib.import_module("transformers").GenerationConfig
    kept = loaded.model.generation_config
    loaded.model.generation_config = made(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad,
        eos_token_id=sorted(_end_tokens(loaded)) or None, bos_token_id=kept.bos_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        loaded.model.generation_config = kept


def _end_tokens(loaded: Loaded) -> frozenset[int]:
    ends = loaded.model.generation_config.eos_token_id
    if ends is None and loaded.tokenizer is not None:
        ends = loaded.tokenizer.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def _pad_token(loaded: Loaded) -> int:
    """Return a token for places that the attention mask hides; any will do."""
    own = loaded.model.generation_config.pad_token_id
    return own if own is not None else min(_end_tokens(loaded), default=0)


def _seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return a seed for each prompt, of what it says and how many equal ones came before it."""
    before: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        text = json.dumps([seed, before[prompt], prompt])
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
        before[prompt] += 1
    return seeds


@contextlib.contextmanager
def _row_by_row(model: Any, wanted: bool) -> Iterator[Any | None]:
    if not wanted:
        yield None
        return
    # Imported here: they are large, and only this needs them.
    from tilecast.engine.invariant_attention import row_by_row

    with row_by_row(model) as context:
        yield context


def summary(generation: Generation) -> str:
    """Return one line that says how fast it was."""
    new = sum(len(output.ids) for output in generation.outputs)
    return (
        f"{new} new tokens; prefill {generation.prefill_tokens} tokens in {generation.prefill_s:.2f} s "
        f"({generation.prefill_per_s:.1f}/s), decode {generation.decode_tokens} in {generation.decode_s:.2f} s "
        f"({generation.decode_per_s:.1f}/s)"
    )
