"""What crosses between devices: in its own dtype, only what is needed, through buffers that are never overwritten."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.tables import LAYER, inputs, weights
from tests.late_copies import LateCopies
from tilecast.engine import placement, placement_stream, placement_transfer
from tilecast.engine.experts import prepare_experts
from tilecast.engine.placement import PlacedExperts, place_experts
from tilecast.engine.placement_transfer import SMALLEST, HostBuffer, Transfer
from tilecast.engine.runtime import use_table
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.gpu import build
from tilecast.problem import ExpertLayer

CPU = torch.device("cpu")
DTYPES = tuple(TORCH_DTYPES)
FLOATS = {
    "float", "double", "half", "bfloat16", "float16", "float32", "float64", "fp16", "fp32", "bf16", "float8_e4m3fn",
}  # fmt: skip
"""Names of dtypes, and of the methods that convert to them."""


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[object, HostBuffer]]:
    """The buffers of this test alone."""
    mine = placement_transfer._OfThread()
    monkeypatch.setattr(placement_transfer, "_mine", mine)
    monkeypatch.setattr(placement_stream, "_rings", {})
    yield mine.buffers  # type: ignore[misc]


def placed(layer: ExpertLayer, near_experts: tuple[int, ...], stream_from: int | None = None) -> PlacedExperts:
    w = weights(layer)
    return place_experts(
        w.w13, w.w2, top_k=layer.top_k, near_experts=near_experts, near="cpu", stream_from=stream_from
    )  # fmt: skip


def named_dtypes(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name):
                found += [name] if name in FLOATS else []
            case ast.Name(id=name) | ast.Constant(value=str(name)):
                # Python's own float is none.
                found += [name] if name in FLOATS - {"float"} else []
    return found


@pytest.mark.parametrize("name", ["placement", "placement_part", "placement_stream", "placement_transfer"])
def test_no_dtype_is_named_where_tensors_cross(name: str) -> None:
    source = Path(placement.__file__).with_name(f"{name}.py").read_text()
    assert named_dtypes(source) == []


def test_the_check_finds_a_named_dtype() -> None:
    for line in ("x.to(torch.bfloat16)", "x.half()", "torch.empty(3, dtype=float32)", "y = 'fp16'"):
        assert len(named_dtypes(line)) == 1, line


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_cross_in_the_models_dtype_and_slots_as_they_are_added(
    dtype: str, no_buffers: dict[tuple[str, torch.dtype, int, torch.device], HostBuffer]
) -> None:
    use_table(None)
    layer = replace(LAYER, dtype=dtype)
    experts = placed(layer, (0, 2), stream_from=9)
    for tokens in (3, 9):
        experts(*inputs(layer, tokens))
    by_name = {name: key for name, *key in no_buffers}
    assert {name: buffer.storage.dtype for (name, *_), buffer in no_buffers.items()} == {
        "ids": torch.int32, "weights": torch.float32, "rows": TORCH_DTYPES[dtype], "rows rows": torch.int64,
        "results": torch.float32, "slots": torch.int64, "chunk ids": torch.int32,
    }  # fmt: skip
    assert by_name["rows"][0] is TORCH_DTYPES[dtype]


def test_only_rows_with_a_far_slot_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    use_table(None)
    experts = placed(LAYER, (0, 1))
    sent: dict[str, torch.Size] = {}
    fetch = Transfer.fetch

    def noted(self, name, source, after, rows=None):  # type: ignore[no-untyped-def]
        buffer = fetch(self, name, source, after, rows)
        sent[name] = buffer.tensor.shape
        return buffer

    monkeypatch.setattr(Transfer, "fetch", noted)
    hidden, ids, scales = inputs(LAYER, 6)
    ids[:] = torch.tensor([[0, 1], [2, 0], [1, 0], [3, 2], [-1, 9], [1, 3]])
    experts(hidden, ids, scales)
    assert sent["rows"] == (3, 64)
    sent.clear()
    experts(hidden[:1], ids[:1], scales[:1])
    assert "rows" not in sent


def test_a_buffer_serves_its_size_class_and_all_layers(no_buffers: dict[object, HostBuffer]) -> None:
    transfer, like = Transfer(CPU), torch.zeros(1)
    first = transfer.buffer("a", (3, 5), like)
    assert first.tensor.shape == (3, 5) and first.storage.numel() == SMALLEST
    assert transfer.buffer("a", (SMALLEST,), like) is first is Transfer(CPU).buffer("a", (2,), like)
    assert transfer.buffer("a", (SMALLEST + 1,), like).storage.numel() == 2 * SMALLEST
    assert transfer.buffer("a", (3,), like.half()) is not first and transfer.buffer("b", (3,), like) is not first
    use_table(None)
    layers = placed(LAYER, (0, 2)), placed(LAYER, (1,))
    layers[0](*inputs(LAYER, 5))
    made = len(no_buffers)
    for seed in range(3):
        for layer in layers:
            layer(*inputs(LAYER, 5, seed=seed))
    assert len(no_buffers) == made


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    use_table(None)
    experts, operands = placed(LAYER, (0, 2), stream_from=8), inputs(LAYER, 5)
    with torch.inference_mode():
        inside = experts(*operands)
        many = experts(*inputs(LAYER, 8))
    assert torch.equal(experts(*operands), inside)
    assert torch.equal(experts(*inputs(LAYER, 8)), many)


def test_threads_do_not_share_buffers() -> None:
    use_table(None)
    experts = placed(LAYER, (0, 2), stream_from=20)
    batches = [inputs(LAYER, tokens, seed=tokens) for tokens in (3, 5, 7, 24)]
    wanted = [experts(*batch) for batch in batches]
    wrong: list[int] = []

    def call(place: int) -> None:
        for _ in range(40):
            if not torch.equal(experts(*batches[place]), wanted[place]):
                wrong.append(place)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


# As on a GPU: copies that happen late ------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCopies]:
    monkeypatch.setattr(placement_stream, "CHUNK_BYTES", 1)
    before = Transfer.__init__

    def asynchronous(self: Transfer, near: torch.device) -> None:
        before(self, near)
        self.asynchronous = True

    monkeypatch.setattr(Transfer, "__init__", asynchronous)
    mode = LateCopies(monkeypatch)
    with mode:
        yield mode


@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_needs_a_late_copy_waits_for_it(dtype: str, late: LateCopies) -> None:
    use_table(None)
    layer = replace(LAYER, dtype=dtype, experts=8, global_experts=8, top_k=3)
    w = weights(layer)
    alone = prepare_experts(w.w13, w.w2, top_k=3)
    experts = placed(layer, (1, 6), stream_from=20)
    for seed, tokens in enumerate((1, 5, 5, 24, 24, 1)):
        operands = inputs(layer, tokens, seed=seed)
        assert torch.equal(experts(*operands), alone(*operands)), tokens
    assert late.late > 40 and late.pinned >= 7


def test_whoever_does_not_wait_gets_other_numbers(late: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    use_table(None)
    experts, operands = placed(LAYER, (1,)), inputs(LAYER, 5)
    wanted = experts(*operands)
    monkeypatch.setattr(HostBuffer, "wait", lambda self: self.tensor)
    assert not torch.equal(experts(*operands), wanted)


def test_a_room_is_not_overwritten_while_it_is_read(late: LateCopies) -> None:
    use_table(None)
    layer = replace(LAYER, experts=8, global_experts=8)
    experts = placed(layer, (), stream_from=1)
    experts(*inputs(layer, 30))
    assert experts._stream is not None and experts._stream.chunk == 1
    (stream,) = placement_transfer._mine.streams.values()
    free = [event for event in experts._stream._ring.free if event is not None]
    assert len(free) == 2
    # The copies of each chunk but the first two waited for the kernels that ran on its room.
    waited = [event for event in stream.waited if event.stream is late.main]  # type: ignore[attr-defined]
    experts(*inputs(layer, 30, seed=4))
    again = [event for event in stream.waited if event.stream is late.main]  # type: ignore[attr-defined]
    assert len(again) - len(waited) >= 8 and set(map(id, free)) <= set(map(id, again))


def test_streams_events_and_copies_are_under_the_launch_guard(
    late: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        guarded.append(device)
        yield
        guarded.pop()

    def checked(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            assert guarded and set(guarded) == {CPU}
            seen.add(function.__name__)
            return function(*args, **options)

        return call

    seen: set[str] = set()
    monkeypatch.setattr(build, "device_guard", guard)
    for name in ("Event", "Stream", "stream", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, checked(getattr(torch.cuda, name)))
    monkeypatch.setattr(placement_transfer, "HostBuffer", checked(HostBuffer))
    use_table(None)
    experts = placed(LAYER, (1,), stream_from=9)
    for tokens in (5, 9):
        experts(*inputs(LAYER, tokens))
    assert seen == {"Event", "Stream", "_within", "<lambda>", "HostBuffer"}
