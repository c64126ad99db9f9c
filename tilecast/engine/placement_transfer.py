"""What goes between a near device and host memory: rows there and back, and whole experts' weights.

Every tensor keeps its own dtype on the way: no dtype is named here. Host buffers are pinned where the near device can
copy from them by itself; one serves all layers for each use, dtype and size class, and is used again once the copy out
of it is done. Copies run on a stream of their own, so that neither device waits for the other's kernels. Where the near
device is the CPU, or any that copies at once, the same code makes plain copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from tilecast.errors import UsageError
from tilecast.kernels.gpu import build

SMALLEST = 1 << 10
"""Elements of the smallest size class; the others are powers of two."""


class HostBuffer:
    """Host memory of one size class. `tensor` is what it holds in its present use."""

    def __init__(self, size: int, like: torch.Tensor, *, pinned: bool) -> None:
        """Allocate `size` elements of `like`'s dtype."""
        # In inference mode it would be good for nothing outside of that.
        with torch.inference_mode(False):
            self.storage = torch.empty(size, dtype=like.dtype, pin_memory=pinned)
        self.tensor = self.storage
        self.busy: torch.cuda.Event | None = None
        """When the copy into or out of it is done; None where that is so already."""

    def wait(self) -> torch.Tensor:
        """Return `tensor` after the copy into it is done. Other Python threads run meanwhile."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None
        return self.tensor


class _OfThread(threading.local):
    """What one Python thread has for itself, so that calls from several never share a buffer."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, int, torch.device], HostBuffer] = {}
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


_mine = _OfThread()


class Transfer:
    """Copies between one near device and host memory."""

    def __init__(self, near: torch.device) -> None:
        """Take the near device, with its index."""
        self.near = near
        self.asynchronous = near.type == "cuda"

    def check_capture(self) -> None:
        """Raise UsageError while a CUDA graph is captured: which rows are sent is known on the host only."""
        if not self.asynchronous:
            return
        with build.device_guard(self.near):
            captured = torch.cuda.is_current_stream_capturing()
        if captured:
            raise UsageError(
                "experts placed on two devices cannot be captured in a CUDA graph, as the host decides what is sent; "
                "capture the layers around them"
            )

    def buffer(self, name: str, shape: Sequence[int], like: torch.Tensor) -> HostBuffer:
        """Return this thread's buffer for one use, contents undefined, its `tensor` of a shape and `like`'s dtype."""
        count = 1
        for size in shape:
            count *= size
        size = max(SMALLEST, 1 << max(0, count - 1).bit_length())
        key = (name, like.dtype, size, self.near)
        found = _mine.buffers.get(key)
        if found is None:
            with build.device_guard(self.near) if self.asynchronous else nullcontext():
                found = _mine.buffers[key] = HostBuffer(size, like, pinned=self.asynchronous)
        found.wait()
        found.tensor = found.storage[:count].view(*shape)
        return found

    def mark(self) -> torch.cuda.Event | None:
        """Return where near's current stream stands now."""
        if not self.asynchronous:
            return None
        with build.device_guard(self.near):
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.near))
            return event

    def fetch(
        self, name: str, source: torch.Tensor, after: torch.cuda.Event | None, rows: torch.Tensor | None = None
    ) -> HostBuffer:
        """Start the copy of a near tensor to the host, or of some of its rows, given as host indices.

        What is there at `after` is copied. The source must live until the buffer's `wait` returned.
        """
        shape = source.shape if rows is None else (rows.shape[0], *source.shape[1:])
        buffer = self.buffer(name, shape, source)
        staged = None if rows is None else self.stage(f"{name} rows", rows)
        with self._copying() as stream:
            if stream is not None and after is not None:
                stream.wait_event(after)
            if staged is not None:
                # Gathered where the rows are, so that nothing else crosses.
                source = source.index_select(0, self._across(staged))
            buffer.tensor.copy_(source, non_blocking=True)
            buffer.busy = _recorded(stream)
        return buffer

    def stage(self, name: str, source: torch.Tensor) -> HostBuffer:
        """Return a buffer that holds a host tensor, ready to be sent."""
        buffer = self.buffer(name, source.shape, source)
        buffer.tensor.copy_(source)
        return buffer

    def send(self, buffer: HostBuffer) -> torch.Tensor:
        """Return what a buffer holds as a fresh near tensor that kernels launched from now on can read."""
        with self._copying() as stream:
            arrived = self._across(buffer)
        if stream is not None:
            self._current().wait_stream(stream)
            arrived.record_stream(self._current())
        return arrived

    def send_weights(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], free: torch.cuda.Event | None) -> None:
        """Copy host tensors into near ones, (to, from), once `free`; kernels launched from now on find them there."""
        with self._copying() as stream:
            if stream is not None and free is not None:
                stream.wait_event(free)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            arrived = _recorded(stream)
        if arrived is not None:
            with build.device_guard(self.near):
                self._current().wait_event(arrived)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a host tensor as the near device copies from it fastest: pinned where it can, else as it is."""
        return tensor.pin_memory() if self.asynchronous else tensor

    def _across(self, buffer: HostBuffer) -> torch.Tensor:
        arrived = torch.empty(buffer.tensor.shape, dtype=buffer.tensor.dtype, device=self.near)
        arrived.copy_(buffer.tensor, non_blocking=True)
        buffer.busy = _recorded(torch.cuda.current_stream(self.near) if self.asynchronous else None)
        return arrived

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.near)

    @contextmanager
    def _copying(self) -> Iterator[torch.cuda.Stream | None]:
        """Run what is within on this thread's copying stream of the near device."""
        if not self.asynchronous:
            yield None
            return
        with build.device_guard(self.near):
            stream = _mine.streams.get(self.near)
            if stream is None:
                stream = _mine.streams[self.near] = torch.cuda.Stream(self.near)
            with torch.cuda.stream(stream):
                yield stream


def _recorded(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event
