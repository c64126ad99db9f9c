from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import pytest
import torch

from tilecast.autotune.clock import CudaQueue, DeviceClock, HostClock, Launch, clock_for


class VirtualQueue:
    """A device whose time passes by what it is given to do: a launch takes 7 µs, a flush 50, host work nothing.

    `log` has everything in the order of submission; a device that `resists` cannot be captured.
    """

    def __init__(self, *, resists: bool = False) -> None:
        self.resists = resists
        self.log: list[str] = []
        self.now_us = 0.0
        self.capturing: list[str] | None = None
        self.guarded = 0
        self.captures = 0

    def launch(self, name: str) -> Launch:
        def run() -> None:
            assert self.guarded and not gc.isenabled()
            if self.capturing is not None:
                if self.resists:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                self.capturing.append(name)
                return
            self.log.append(name)
            self.now_us += 7

        return run

    @contextmanager
    def guard(self) -> Iterator[None]:
        self.guarded += 1
        try:
            yield
        finally:
            self.guarded -= 1

    def capture(self, launches: Sequence[Launch]) -> Launch:
        self.captures += 1
        self.capturing = []
        try:
            for launch in launches:
                launch()
            held = self.capturing
        finally:
            self.capturing = None

        def replay() -> None:
            self.log.append(f"replay {' '.join(held)}")
            self.now_us += 7 * len(held)

        return replay

    def flush(self) -> None:
        self.log.append("flush")
        self.now_us += 50

    def mark(self) -> float:
        self.log.append("mark")
        return self.now_us

    def wait_us(self, start: float, end: float) -> float:
        self.log.append("wait")
        return end - start


def test_a_sample_is_a_flush_and_one_replay_between_two_marks() -> None:
    queue = VirtualQueue()
    time_us = DeviceClock(queue).time([queue.launch("a"), queue.launch("b")])
    assert queue.log == ["a", "b", "replay a b", "flush", "mark", "replay a b", "mark", "wait"]
    assert time_us == 7
    assert queue.guarded == 0 and gc.isenabled()


def test_every_sample_is_captured_anew() -> None:
    queue = VirtualQueue()
    clock = DeviceClock(queue)
    assert clock.time([queue.launch("a")]) == 7 and clock.time([queue.launch("b")]) == 7
    assert queue.captures == 2 and queue.log.count("replay b") == 2


def test_launches_that_resist_capture_are_timed_one_by_one_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = VirtualQueue(resists=True)
    clock = DeviceClock(queue)
    with caplog.at_level("WARNING"):
        assert clock.time([queue.launch("a"), queue.launch("b")]) == 7
        assert clock.time([queue.launch("a")]) == 7
    assert queue.log[:10] == ["a", "b", "a", "b", "flush", "mark", "a", "b", "mark", "wait"]
    (record,) = caplog.records
    assert record.getMessage().endswith("(operation not permitted when stream is capturing)")


def test_what_the_first_launch_raises_passes_through() -> None:
    queue = VirtualQueue()

    def broken() -> None:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError, match="out of resource"):
        DeviceClock(queue).time([queue.launch("a"), broken])
    assert queue.captures == 0 and queue.guarded == 0 and gc.isenabled()


def test_the_cpu_runs_each_launch_once() -> None:
    ran: list[int] = []
    clock = clock_for(torch.device("cpu"), 1 << 20)
    assert isinstance(clock, HostClock)
    assert clock.time([lambda: ran.append(1), lambda: ran.append(2)]) > 0
    assert ran == [1, 2] and gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_replays_the_launches(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.zeros((), dtype=torch.int64, device=device)
    clock = DeviceClock(CudaQueue(device, 1 << 20))
    with caplog.at_level("WARNING"):
        assert clock.time([lambda: count.add_(1), lambda: count.add_(10)]) > 0  # type: ignore[func-returns-value]
    # Once eagerly, once to upload the graph, once timed.
    assert int(count) == 33 and caplog.records == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_launch_that_waits_for_the_gpu_cannot_be_captured_but_timed(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = torch.ones(8, device=device)
    clock = DeviceClock(CudaQueue(device, 1 << 20))
    with caplog.at_level("WARNING"):
        assert clock.time([lambda: tensor.sum().item()]) > 0  # type: ignore[list-item,return-value]
        assert clock.time([lambda: tensor.add_(1)]) > 0  # type: ignore[list-item,return-value]
    assert len(caplog.records) == 1 and float(tensor[0]) > 1


class FakeGraph:
    """A CUDA graph as far as its memory goes: a pool counts the graphs that hold it, and must be held to be shared."""

    holders: ClassVar[dict[int, int]] = {}
    recording: ClassVar[set[int]] = set()
    invalid: ClassVar[bool] = False

    def __init__(self) -> None:
        self.number = 0

    def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        assert pool is None or self.holders[pool] > 0, "torch: the pool of graphs that are gone cannot be shared"
        assert pool not in self.recording, "torch: already recording to the pool"
        self.number = len(self.holders) + 1 if pool is None else pool
        self.recording.add(self.number)
        self.holders[self.number] = self.holders.get(self.number, 0) + 1

    def capture_end(self) -> None:
        if self.invalid:
            # As in torch, which then does not come to telling the allocator.
            type(self).invalid = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self.recording.discard(self.number)

    def pool(self) -> int:
        return self.number

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self.number:
            self.holders[self.number] -= 1


class FakeStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


def test_captures_share_memory_but_not_with_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGraph, "holders", {})
    monkeypatch.setattr(FakeGraph, "recording", set())
    monkeypatch.setattr("torch.cuda.CUDAGraph", FakeGraph)
    monkeypatch.setattr("torch.cuda.Stream", FakeStream)
    monkeypatch.setattr("torch.cuda.current_stream", FakeStream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("tilecast.autotune.clock.MIN_FLUSH_BYTES", 64)
    queue = CudaQueue(torch.device("cpu"), 32)
    for _ in range(3):
        queue.capture([lambda: None])()

    gc.collect()
    assert FakeGraph.holders == {1: 1}

    def resists() -> None:
        FakeGraph.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error"):
        queue.capture([resists])
    for _ in range(2):
        queue.capture([lambda: None])()
    gc.collect()
    assert FakeGraph.holders[2] == 1 and len(FakeGraph.holders) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_samples_do_not_reserve_more_and_more_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clock = DeviceClock(CudaQueue(device, 1 << 20))
    reserved = []
    for _ in range(6):
        clock.time([lambda: torch.empty(64 << 20, dtype=torch.uint8, device=device).zero_()])  # type: ignore[list-item,return-value]
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[-1] == reserved[1]
