"""Runs a model over prompts and keeps what goes into and out of every operation, one row a token.

However prompts are arranged (alone, in a batch, padded, in chunks), a token's row has the same place in a trace,
so that traces of different arrangements, models and processes can be compared bit for bit.

A run may be *forced*: every operation then gets the inputs of an earlier trace, and what comes after it gets that
trace's outputs. What an operation gives in a forced run is its own doing: nothing is carried over from others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tilecast.engine.compare_collectives import Collectives
from tilecast.engine.compare_operations import Operation, operations

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes that hold the bits of an element of so many bytes."""


CANNOT = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What models raise for an arrangement or a dtype that they do not support."""


@dataclass(frozen=True)
class Prompts:
    """Token ids of some prompts; token t of prompt p has row `starts[p] + t` in every trace."""

    ids: tuple[tuple[int, ...], ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """The row of each prompt's first token."""
        return tuple(sum(map(len, self.ids[:prompt])) for prompt in range(len(self.ids)))

    @property
    def rows(self) -> int:
        """How many tokens there are."""
        return sum(map(len, self.ids))

    def place(self, row: int) -> tuple[int, int]:
        """Return prompt and position of a row."""
        prompt = max(p for p, start in enumerate(self.starts) if start <= row)
        return prompt, row - self.starts[prompt]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Sequences that go through the model together, shorter ones padded on the left.

    `prompts` are their numbers, `length` cuts them, `chunk` feeds so many tokens at a time through a cache, and
    `last_only` keeps only the last sequence's rows (of copies, or beside others that are there to fill the batch).
    """

    prompts: tuple[int, ...]
    length: int | None = None
    chunk: int | None = None
    last_only: bool = False


@dataclass
class Record:
    """What one operation got and gave: tensors [rows, values], on the host; `seen` tells the rows it was run for."""

    operation: Operation
    seen: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


Trace = dict[str, Record]
"""Records by operation's name, in the order in which the operations first ended: inner ones before outer ones."""


def run(model: nn.Module, prompts: Prompts, passes: Sequence[Pass], forced: Trace | None = None) -> Trace:
    """Run the passes and return the trace; with `forced`, all operations get the inputs of that trace."""
    with watched(model, prompts.rows, forced) as watcher, torch.no_grad():
        for part in passes:
            _run_pass(model, prompts, part, watcher)
    return watcher.trace


def alone(prompts: Prompts, length: int | None = None) -> list[Pass]:
    """Return the passes that run every prompt on its own, in one piece."""
    return [Pass(prompts=(prompt,), length=length) for prompt in range(len(prompts.ids))]


def digests(trace: Trace) -> dict[str, list[str]]:
    """Return for every operation one short digest a row, over all its outputs; empty for rows it was not run for."""
    found = {}
    for name, record in trace.items():
        parts = [bits(tensor).contiguous().view(torch.uint8).numpy() for tensor in record.outputs]
        rows = []
        for row, seen in enumerate(record.seen.tolist()):
            joined = b"".join(part[row].tobytes() for part in parts)
            rows.append(blake2b(joined, digest_size=8).hexdigest() if seen else "")
        found[name] = rows
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as integers, so that comparing them holds for NaN and tells -0 from 0."""
    return tensor.view(BITS[tensor.element_size()])


class Watcher:
    """The hooks on a model's operations, and the trace that they fill."""

    def __init__(self, rows: int, forced: Trace | None) -> None:
        """Expect `rows` tokens in all; `forced` is the trace whose inputs and outputs take the place of the own."""
        self.trace: Trace = {}
        self._rows = rows
        self._forced = forced
        self._shape = (0, 0)
        self._places = torch.empty(0, dtype=torch.long)
        self._calls: dict[str, int] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._running: list[Operation] = []
        self.collectives = Collectives(self.exchanged)

    def expect(self, places: torch.Tensor) -> None:
        """Say which row each token [batch, length] of the coming forward has; -1 for padding."""
        self._shape = (places.shape[0], places.shape[1])
        self._places = places.flatten()
        self._calls.clear()

    def before(self, operation: Operation, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Keep the inputs, or put those of the forced trace in their place."""
        known = None if self._forced is None else self._forced.get(self._key(operation))
        given = [(None, index, value) for index, value in enumerate(args)]
        given += [(name, 0, value) for name, value in kwargs.items() if not _is_context(name)]
        taken = [item for item in given if self._flat(item[2]) is not None]
        taken = taken if operation.kind == "experts" else taken[:1]
        args, kwargs = list(args), dict(kwargs)
        kept = []
        for number, (name, index, value) in enumerate(taken):
            if known is not None and number < len(known.inputs):
                value = self._replaced(value, known.inputs[number])
                if name is None:
                    args[index] = value
                else:
                    kwargs[name] = value
            flat = self._flat(value)
            assert flat is not None
            kept.append(flat.detach().clone())
        self._inputs[operation.name] = kept
        self.collectives.flush()
        self._running.append(operation)
        return tuple(args), kwargs

    def after(self, operation: Operation, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Keep the outputs; return those of the forced trace in their place."""
        self.collectives.flush()
        self._running.pop()
        key = self._key(operation)
        self._calls[operation.name] = self._calls.get(operation.name, 0) + 1
        known = None if self._forced is None else self._forced.get(key)
        parts = list(output) if isinstance(output, tuple) else [output]
        taken = [index for index, part in enumerate(parts) if self._flat(part) is not None]
        taken = taken if operation.kind == "router" else taken[:1]
        kept = [flat for index in taken if (flat := self._flat(parts[index])) is not None]
        self.keep(operation, key, self._inputs.pop(operation.name, []), kept)
        if known is None:
            return None
        for index, stored in zip(taken, known.outputs, strict=False):
            parts[index] = self._replaced(parts[index], stored)
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    def exchanged(self, share: torch.Tensor, result: torch.Tensor) -> None:
        """Keep a collective of the running operation as an operation of its own, inside that one."""
        around = self._running[-1] if self._running else None
        given, got = self._flat(share), self._flat(result)
        if around is None or given is None or got is None:
            return
        operation = Operation(name=f"{around.name}.collective", kind="collective", layer=around.layer)
        key = self._key(operation)
        self._calls[operation.name] = self._calls.get(operation.name, 0) + 1
        self.keep(operation, key, [given], [got])

    def keep(
        self, operation: Operation, key: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Put the rows of one call into the trace."""
        real = self._places >= 0
        places = self._places[real]
        record = self.trace.get(key)
        if record is None:
            record = Record(operation=replace(operation, name=key), seen=torch.zeros(self._rows, dtype=torch.bool))
            self.trace[key] = record
        record.seen[places] = True
        for into, values in ((record.inputs, inputs), (record.outputs, outputs)):
            for number, value in enumerate(values):
                if len(into) <= number:
                    into.append(torch.zeros(self._rows, value.shape[1], dtype=value.dtype))
                into[number][places] = value.detach().cpu()[real]

    def _key(self, operation: Operation) -> str:
        """A module that runs several times in one forward has a record for each time."""
        call = self._calls.get(operation.name, 0)
        return operation.name if call == 0 else f"{operation.name}#{call + 1}"

    def _flat(self, value: Any) -> torch.Tensor | None:
        """Return a tensor as [tokens, values]; None if it does not have a row for every token."""
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return None
        batch, length = self._shape
        if tuple(value.shape[:2]) == self._shape or value.shape[0] == batch * length:
            return value.reshape(batch * length, -1)
        return None

    def _replaced(self, value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Return `value` with the rows of real tokens taken from `stored`, in its own dtype."""
        flat = self._flat(value)
        if flat is None or flat.shape[1] != stored.shape[1]:
            return value
        real = (self._places >= 0).to(value.device)
        result = flat.detach().clone()
        result[real] = stored[self._places[self._places >= 0]].to(device=value.device, dtype=value.dtype)
        return result.view(value.shape)


@contextmanager
def watched(model: nn.Module, rows: int, forced: Trace | None = None) -> Iterator[Watcher]:
    """Hook all operations of a model while the block lasts."""
    watcher = Watcher(rows, forced)
    handles = []
    try:
        for operation, module in operations(model):
            before: Callable[..., Any] = partial(watcher.before, operation)
            after: Callable[..., Any] = partial(watcher.after, operation)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        # A mode slows every operation down, so it is there only where ranks have something to exchange.
        exchange = dist.is_initialized() and dist.get_world_size() > 1
        with watcher.collectives if exchange else nullcontext():
            yield watcher
    finally:
        for handle in handles:
            handle.remove()


def _is_context(name: str) -> bool:
    """Whether a keyword argument is not a stream of token vectors, though its shape may look like one."""
    return any(word in name for word in ("mask", "position", "cache", "past", "labels"))


def _run_pass(model: Any, prompts: Prompts, part: Pass, watcher: Watcher) -> None:
    sequences = [prompts.ids[prompt][: part.length] for prompt in part.prompts]
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    places = torch.full((len(sequences), width), -1)
    for row, (prompt, sequence) in enumerate(zip(part.prompts, sequences, strict=True)):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
        if not part.last_only or row == len(sequences) - 1:
            places[row, width - len(sequence) :] = prompts.starts[prompt] + torch.arange(len(sequence))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step = width if part.chunk is None else part.chunk
    device, cache = model.device, None
    for start in range(0, width, step):
        columns = slice(start, min(start + step, width))
        watcher.expect(places[:, columns])
        extra = {} if part.chunk is None else {"past_key_values": cache}
        output = model(
            input_ids=ids[:, columns].to(device),
            attention_mask=mask[:, : columns.stop].to(device),
            position_ids=positions[:, columns].to(device),
            use_cache=part.chunk is not None,
            **extra,
        )
        cache = getattr(output, "past_key_values", None)
