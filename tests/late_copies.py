"""A device whose copies happen as late as they may: when somebody waits for them, or their stream does more.

Until then what they write holds garbage, and what they read can still change: whoever forgets to wait, or writes into
a buffer that a copy still reads, gets other numbers. Kernels of the near device itself are done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.pending: list[Callable[[], None]] = []
        self.done = 0
        self.waited: list[Event] = []

    @property
    def end(self) -> int:
        return self.done + len(self.pending)

    def run_to(self, place: int) -> None:
        while self.done < place:
            self.pending.pop(0)()
            self.done += 1

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        event.synchronize()

    def wait_stream(self, other: Stream) -> None:
        other.run_to(other.end)


class Event:
    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.end

    def synchronize(self) -> None:
        self.stream.run_to(self.place)


class LateCopies(TorchDispatchMode):
    """Within it, and with `torch.cuda` replaced, tensors of the CPU stand for those of both devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self.late = self.pinned = 0
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None, raising=False)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor), raising=False)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned += 1
        return tensor.clone()

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.pinned += bool(kwargs.pop("pin_memory", False))
        if function is torch.ops.aten.copy_.default and (args[2:] or [kwargs.get("non_blocking")])[0]:
            target, source = args[:2]
            if self.current is not self.main:
                self.late += 1
                target.view(torch.uint8).fill_(0x7F)
                self.current.pending.append(lambda: target.detach().copy_(source))
                return target
        self.current.run_to(self.current.end)
        return function(*args, **kwargs)
