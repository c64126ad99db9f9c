"""Experts on two devices of which one is a GPU: its kernels under the interpreter, and on one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.cases import assert_as_good_as_torch
from tests.engine.test_placement import EMPTY, SHAPE, SPLITS, WIDE, given, placed, prepared, routed
from tests.pretend_device import DEVICE, PretendDevice
from tests.torch_kernel import TorchKernel
from tilecast.autotune.classes import same_bits
from tilecast.engine import placement
from tilecast.engine.placement_part import add_slots, launch_add
from tilecast.engine.runtime import use_table
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import InputError, UsageError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import Registry


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_of_two_devices_never_meet(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A near device that is none: operations on operands of both devices fail there, as on a GPU."""
    use_table(None)
    # The kernel adds products one by one, each an operation that the device looks at: few do.
    layer = replace(SHAPE, hidden=24, intermediate=16, dtype=dtype, bias=True)
    kernel = TorchKernel()
    kernel.device_kind = DEVICE.type
    environment = replace(cpu_environment(), device_kind=DEVICE.type)
    near = Runtime(EMPTY, environment=environment, registry=Registry((kernel,)), policy="fastest")
    monkeypatch.setattr(placement, "_device", lambda name, device, kinds: torch.device(device))
    far = Runtime(EMPTY, environment=cpu_environment(), registry=Registry((TorchKernel(),)), policy="fastest")
    alone = prepared(layer, far)
    with PretendDevice():
        for near_experts in ((), (1, 4, 6)):
            experts = placed(layer, near_experts, near=DEVICE, near_runtime=near, far_runtime=far, stream_from=9)
            for tokens in (1, 5, 9):
                operands = routed(layer, tokens)
                found = experts(*(tensor.to(DEVICE) for tensor in operands))
                assert found.device == DEVICE
                assert torch.equal(found.cpu(), alone(*operands)), (near_experts, tokens)
            with pytest.raises(InputError, match="hidden is on cpu, expected meta, the near device"):
                experts(*routed(layer, 2))


def triton_runtime(policy: str = "fastest") -> Runtime:
    """Return a GPU's runtime, whose kernels Triton's interpreter runs on tensors of the CPU."""
    kernels = Registry((Grouped(), Decode()))
    found = Runtime(EMPTY, environment=parse_target("cuda:90").environment(), registry=kernels, policy=policy)
    found.devices.add(torch.device("cpu"))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use where there is a GPU")
@pytest.mark.parametrize("form", ["dense", "awq_g32"])
def test_a_gpus_kernels_run_the_near_share_and_chunks(form: str) -> None:
    """Up to the sums inside the interpreter's products, which are numpy's: those depend on the shape."""
    use_table(None)
    layer = replace(SHAPE, hidden=64, intermediate=32, experts=4, global_experts=4, weight_format=form, bias=True)
    near = triton_runtime()
    alone = prepared(layer)
    for near_experts, stream_from in (((0, 3), None), ((0, 3), 2), ((), 1), ((0, 1, 2, 3), None)):
        experts = placed(layer, near_experts, near_runtime=near, stream_from=stream_from, policy="fastest")
        for tokens in (1, 5):
            operands = routed(layer, tokens)
            torch.testing.assert_close(experts(*operands), alone(*operands), rtol=1e-5, atol=1e-5)


def assert_added_alike(dtype: str, device: torch.device) -> None:
    layer = replace(WIDE, dtype=dtype, top_k=5)
    _, ids, _ = routed(layer, 6)
    slots = torch.randn(30, layer.hidden, generator=torch.Generator().manual_seed(1)) * 100
    slots[((ids < 0) | (ids >= layer.experts)).flatten()] = 0
    here = torch.full((6, layer.hidden), torch.nan, dtype=TORCH_DTYPES[dtype])
    there = here.to(device, copy=True)
    add_slots(slots, layer, ids, here)
    launch_add(slots.to(device), layer, ids.to(device), there)
    assert same_bits(here, there.cpu()) and not torch.equal(here, here.flip(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use where there is a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_gpus_kernel_adds_slots_with_the_same_bits(dtype: str) -> None:
    # Not bf16, which the interpreter cuts where a GPU rounds.
    assert_added_alike(dtype, torch.device("cpu"))


# On a GPU -------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_gpu() -> Iterator[torch.device]:
    use_table(None)
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_near_a_gpu_the_error_is_no_larger_than_on_either_device(dtype: str, on_gpu: torch.device) -> None:
    layer = replace(SHAPE, hidden=256, intermediate=128, dtype=dtype, bias=True)
    (w13, w2), options = given(layer)
    bias13, bias2 = options["bias13"], options["bias2"]
    for tokens in (1, 4, 64):
        hidden, ids, scales = routed(layer, tokens)
        route = sort_slots(ids, layer.experts)
        exact = reference_layer(layer, hidden, w13, w2, route, scales, bias13, bias2)
        torchs = reference_layer(layer, hidden, w13, w2, route, scales, bias13, bias2, TORCH_DTYPES[dtype])
        for near_experts in SPLITS:
            for stream_from in (None, 4) if len(near_experts) < 8 else (None,):
                experts = placed(layer, near_experts, near=on_gpu, stream_from=stream_from, policy="fastest")
                operands = [tensor.to(on_gpu) for tensor in (hidden, ids, scales)]
                found = experts(*operands)
                assert found.device == on_gpu
                assert_as_good_as_torch(found.cpu(), exact, torchs)
                for _ in range(20):
                    assert torch.equal(experts(*operands), found)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_gpu_adds_slots_with_the_same_bits(dtype: str, on_gpu: torch.device) -> None:
    assert_added_alike(dtype, on_gpu)


@pytest.mark.gpu
@needs_gpu
def test_near_a_gpu_rows_are_free_of_the_batch_and_graphs_are_refused(on_gpu: torch.device) -> None:
    layer = replace(SHAPE, hidden=256, intermediate=128, dtype="bf16")
    experts = placed(layer, (1, 4, 6), near=on_gpu)
    operands = [tensor.to(on_gpu) for tensor in routed(layer, 64)]
    whole = experts(*operands)
    for row in (0, 1, 33):
        assert torch.equal(experts(*(tensor[row : row + 1] for tensor in operands))[0], whole[row])
    with (
        pytest.raises(UsageError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        experts(*operands)


@pytest.mark.gpu
@needs_gpu
def test_near_a_gpu_calls_run_on_the_current_stream(on_gpu: torch.device) -> None:
    layer = replace(SHAPE, hidden=256, intermediate=128, dtype="bf16")
    experts = placed(layer, (1, 4, 6), near=on_gpu, stream_from=16, policy="fastest")
    for tokens in (4, 64):
        operands = [tensor.to(on_gpu) for tensor in routed(layer, tokens)]
        wanted = experts(*operands)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late = [tensor.clone() for tensor in operands]
            found = experts(*late)
            late[0].zero_()
        side.synchronize()
        assert torch.equal(found, wanted)
