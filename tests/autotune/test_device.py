"""Everything that measuring makes is on the environment's device, with the values it has on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.pretend_device import DEVICE, PretendDevice
from tests.torch_kernel import SortedTorchKernel, TorchKernel
from tilecast.autotune import measure
from tilecast.autotune.classes import ClassVerifier
from tilecast.autotune.clock import HostClock
from tilecast.autotune.gate import Gate
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.workload import Workload, check_memory, device_of, poisoned_output
from tilecast.errors import DeviceError
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertLayer

GPU = replace(HERE, device_kind="cuda", device="H200", arch="sm_90")
SMALL = ExpertLayer(hidden=24, intermediate=20, experts=3, top_k=2, bias=True)
SHARE = replace(SMALL, global_experts=8)


@pytest.fixture
def pretended() -> Iterator[torch.device]:
    with PretendDevice(), torch.no_grad():
        yield DEVICE


def test_the_pretended_device_refuses_what_a_gpu_refuses(pretended: torch.device) -> None:
    with pytest.raises(RuntimeError, match="and on the CPU"):
        torch.ones(3, device=pretended) + torch.ones(3)
    assert (torch.ones(3).to(pretended) * 2).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("order", ["slot", "sorted"])
def test_operands_are_on_the_device_with_the_values_of_the_cpu(pretended: torch.device, name: str, order: str) -> None:
    gemm, kernel = (SHARE.up if name == "up" else SHARE.down), TorchKernel()
    there, here = Workload(GPU, device=pretended), Workload(HERE)
    for layout in ("plain", "transposed"):
        a, b = (work.weights(gemm, kernel, layout, 1) for work in (there, here))
        assert a.data.device == pretended and torch.equal(a.data.cpu(), b.data)
        assert a.bias is not None and b.bias is not None and torch.equal(a.bias.cpu(), b.bias)
    x, y = (work.inputs(gemm, 5, 3, order) for work in (there, here))
    assert torch.equal(x.rows.cpu().nan_to_num(), y.rows.nan_to_num())
    assert torch.equal(x.topk_weights.cpu(), y.topk_weights)
    assert x.route.offsets.tolist() == y.route.offsets.tolist()
    assert x.rows.device == x.topk_weights.device == x.route.slots.device == pretended
    assert poisoned_output(gemm, 5, device=pretended).device == pretended


@pytest.mark.parametrize("order", ["slot", "sorted"])
@pytest.mark.parametrize("layer", [SMALL, SHARE], ids=lambda layer: layer.label)
def test_the_gate_runs_on_the_device(pretended: torch.device, layer: ExpertLayer, order: str) -> None:
    kernel = SortedTorchKernel("off_by_one")
    gate, same = Gate(Workload(GPU, device=pretended)), Gate(Workload(HERE))
    for gemm in layer.gemms:
        for config in (kernel.config(order=order), kernel.config(order=order, layout="transposed")):
            verdict = gate.check(gemm, 20, config, kernel)
            assert (verdict.status, verdict.detail) == ("ok", "")
            assert verdict == same.check(gemm, 20, config, kernel)
        assert gate.check(gemm, 20, kernel.config(order=order, variant="off_by_one"), kernel).status == "wrong_result"


@pytest.mark.parametrize("order", ["slot", "sorted"])
def test_the_class_check_runs_on_the_device(pretended: torch.device, order: str) -> None:
    kernel = SortedTorchKernel("misclassed")
    verifier = ClassVerifier(GPU, Registry((kernel,)), device=pretended)
    layer = replace(SMALL, hidden=32, intermediate=32, bias=False)
    for gemm in layer.gemms:
        bucket = Bucket(above=2, tokens=3)
        assert verifier.verify(gemm, kernel.config(order=order, row_block=16), bucket) is None
        assert verifier.control(gemm, kernel.config(order=order)) is None
        reason = verifier.verify(gemm, kernel.config(order=order, variant="misclassed"), bucket)
        assert reason is not None and "differs from the same row alone" in reason


def test_samples_are_taken_on_the_device(pretended: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.workload.device_of", lambda environment: pretended)
    kernel = SortedTorchKernel()
    measurer = DeviceMeasurer(GPU, Registry((kernel,)), clock=HostClock())
    for gemm in SMALL.gemms:
        measurer.prepare(gemm)
        for order in ("slot", "sorted"):
            assert measurer.check(gemm, 4, kernel.config(order=order)).status == "ok"
            assert len(measurer.sample(gemm, 4, kernel.config(order=order), round=0, count=2)) == 2
        measurer.release(gemm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_measuring_a_gpu_without_one_is_one_clear_line() -> None:
    with pytest.raises(DeviceError, match="H200 is to be measured, but PyTorch sees no GPU here"):
        DeviceMeasurer(GPU, Registry((TorchKernel(),)))
    verifier = ClassVerifier(GPU, Registry((TorchKernel(),)))
    with pytest.raises(DeviceError, match="sees no GPU"):
        verifier.verify(LAYER.up, TorchKernel().config(), Bucket(above=0, tokens=1))


def test_the_memory_of_a_gpu_is_what_is_free_and_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LAYER.up.weight_bytes()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (stack, 9 * stack))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * stack)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * stack)
    check_memory(LAYER.up, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * stack + 1)
    with pytest.raises(DeviceError, match="cuda:0 has left"):
        check_memory(LAYER.up, torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("message", "status", "lost"),
    [
        ("out of resource: shared memory, Required: 270336, Hardware limit: 232448.", "resource", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "resource", False),
        ("CUDA error: too many resources requested for launch", "resource", False),
        ("PassManager::run failed", "compile_error", False),
        ("PTXAS error: Internal Triton PTX codegen error", "compile_error", False),
        ("CUDA error: an illegal memory access was encountered", "runtime_error", True),
        ("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported", "runtime_error", True),
        ("CUDA error: unspecified launch failure; compile with `TORCH_USE_CUDA_DSA`", "runtime_error", True),
        ("CUDA error: invalid argument", "runtime_error", False),
    ],
)
def test_what_a_gpu_raises_is_classified(message: str, status: str, lost: bool) -> None:
    found, detail = measure.failure(RuntimeError(message))
    assert (found, measure.device_lost(detail)) == (status, lost)
    assert "\n" not in detail


def test_a_lost_device_ends_the_class_check_instead_of_failing_every_class() -> None:
    class Loses(TorchKernel):
        def up(self, config, hidden, weights, route, out):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    verifier = ClassVerifier(HERE, Registry((Loses(),)))
    with pytest.raises(DeviceError, match="left the device unusable"):
        verifier.verify(LAYER.up, TorchKernel().config(), Bucket(above=0, tokens=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("order", ["slot", "sorted"])
def test_a_gpu_is_measured(order: str) -> None:
    kernel = SortedTorchKernel("off_by_one")
    measurer = DeviceMeasurer(replace(GPU, llc_bytes=50 << 20), Registry((kernel,)))
    for gemm in SMALL.gemms:
        assert device_of(GPU).type == "cuda"
        measurer.prepare(gemm)
        assert measurer.check(gemm, 4, kernel.config(order=order)).status == "ok"
        wrong = kernel.config(order=order, variant="off_by_one")
        assert measurer.check(gemm, 4, wrong).status == "wrong_result"
        assert min(measurer.sample(gemm, 4, kernel.config(order=order), round=0, count=2)) > 0
        measurer.release(gemm)
