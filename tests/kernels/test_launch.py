"""What launches of the generated CPU kernels share."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from tests.cases import operands, run_down, run_up
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu import attention, launch
from tilecast.kernels.cpu.linear import multiply
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.packed_linear import PackedLinear
from tilecast.kernels.cpu.sparse import SparseExperts
from tilecast.kernels.ranges import full_ranges
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=48, intermediate=40, experts=4, top_k=2, dtype="bf16", activation="relu")
ROWS = torch.linspace(-1, 1, 5 * 48).to(torch.bfloat16).view(5, 48)


def experts(kernel: MoeGemm | SparseExperts) -> torch.Tensor:
    given = operands(LAYER, 5)
    up, down = (kernel.default(gemm, 5, cpu_environment()) for gemm in LAYER.gemms)
    return torch.cat([run_up(kernel, up, given).flatten(), run_down(kernel, down, given).flatten()])


def attended() -> torch.Tensor:
    operand = torch.linspace(-1, 1, 2 * 4 * 7 * 16).view(2, 4, 7, 16)
    return attention.attend(operand, operand, operand, full_ranges(operand, operand), scale=0.25)


CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "experts": lambda: experts(MoeGemm()),
    "sparse experts": lambda: experts(SparseExperts()),
    "linear": lambda: multiply(ROWS[None], ROWS[None]),
    "packed linear": lambda: PackedLinear(ROWS)(ROWS),
    "one row": lambda: PackedLinear(ROWS).one_row(ROWS[:1]),
    "attention": attended,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_holds_its_scratch_until_it_has_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = CALLS[name]()
    taken: list[weakref.ref[torch.Tensor]] = []
    launches = 0
    take, run = launch.take_scratch, launch.run

    def take_and_watch(name: str, size: int) -> torch.Tensor:
        buffer = take(name, size)
        taken.append(weakref.ref(buffer))
        return buffer

    def look_and_run(address: int, arguments: int, threads: int) -> None:
        nonlocal launches
        launches += 1
        # Before it runs: writing to memory that was given back ends the process.
        assert taken and all(buffer() is not None for buffer in taken)
        run(address, arguments, threads)
        taken.clear()

    monkeypatch.setattr(launch, "_buffers", launch._Buffers())
    monkeypatch.setattr(launch, "KEPT_SCRATCH_BYTES", 0)
    for module in (launch, attention):
        monkeypatch.setattr(module, "take_scratch", take_and_watch)
        monkeypatch.setattr(module, "run", look_and_run)
    assert torch.equal(CALLS[name](), wanted)
    assert launches


@pytest.mark.parametrize("name", ["linear", "packed linear", "one row"])
def test_another_default_device_is_not_where_results_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = CALLS[name]()
    monkeypatch.setattr(launch, "_buffers", launch._Buffers())
    with torch.device("meta"):
        assert torch.equal(CALLS[name](), wanted)


def test_scratch_has_room_from_a_multiple_of_64_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_buffers", launch._Buffers())
    first = launch.take_scratch("some", 1000)
    for size in (1, 1000, 1001, 1000 + 4096, 1000 + 4097):
        buffer = launch.take_scratch("some", size)
        begin = launch.aligned(buffer)
        assert begin % 64 == 0 and buffer.data_ptr() <= begin
        assert begin + size <= buffer.data_ptr() + buffer.numel() - 4096 + 64, size
        assert (buffer is first) == (size <= 1000), size
