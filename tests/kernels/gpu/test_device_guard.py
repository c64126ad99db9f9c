"""Every launch happens while the device of its tensors is the current one: on the second GPU it would crash else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from tests.cases import ODD, operands, run_down, run_up
from tilecast.kernels import registry
from tilecast.kernels.gpu import build as build_module
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.router import route_device
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.spec import Kernel
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

HERE = parse_target("cuda:90").environment()
GPU_KERNELS = [kernel for kernel in registry if kernel.device_kind == "cuda"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches launches in Triton's interpreter")


class Watched:
    """Which device the guard has made current, and under which each launch happened."""

    def __init__(self) -> None:
        self.current: list[torch.device] = []
        self.launches: list[str] = []

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        self.current.append(device)
        try:
            yield
        finally:
            self.current.pop()

    def saw(self, name: str, given: list[Any]) -> None:
        # A descriptor holds the tensor that it describes.
        tensors = [value if isinstance(value, torch.Tensor) else getattr(value, "base", None) for value in given]
        devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
        assert devices, f"{name} was launched without a tensor"
        assert self.current and devices == {self.current[-1]}, f"{name} on {devices} under {self.current}"
        self.launches.append(name)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watch Triton itself, so that a launch which goes round `Build.launch` is seen too."""
    found = Watched()
    launch = interpreter.GridExecutor.__call__

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.saw(self.fn.__name__, [*args, *kwargs.values()])
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(build_module, "device_guard", found.guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watching)
    return found


def copying(size: int = 16) -> Build:
    return Build(
        module="tests.kernels.gpu.guarded_kernels",
        function="copy",
        signature=(("source", "*fp32"), ("target", "*fp32")),
        constants=(("BLOCK", size),),
        num_warps=1,
        num_stages=1,
    )


def test_a_build_launches_under_the_guard(watched: Watched) -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    copying().launch((1,), source.device, source, target)
    assert torch.equal(source, target) and watched.launches == ["copy"] and watched.current == []
    copying().launch((0,), source.device, source, target)
    assert watched.launches == ["copy"]


def test_a_launch_without_the_guard_or_under_another_devices_is_seen(watched: Watched) -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    with pytest.raises(AssertionError, match="copy on"):
        copying().kernel[(1,)](source, target, BLOCK=16)
    with pytest.raises(AssertionError, match=r"copy on .*meta"):
        copying().launch((1,), torch.device("meta"), source, target)


def test_the_guard_makes_a_gpu_the_current_device_and_leaves_the_cpu_alone() -> None:
    guard = build_module.cuda_guard(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    with build_module.cuda_guard(torch.device("cpu")):
        pass


def quickest(kernel: Kernel, gemm: ExpertGemm) -> TileConfig | None:
    """Return a valid config of few programs and steps, as the interpreter is slow; None if the space has none."""
    valid = [
        config
        for tokens in (3, 512)
        for config in islice(kernel.space(gemm, tokens, HERE), 500)
        if registry.invalid(gemm, config, HERE) is None
    ]
    return max(valid, key=lambda c: (c.integer("block_n") * c.integer("block_k"), c.sort_key), default=None)


@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_of_a_layer_is_under_the_guard(kernel: Kernel, watched: Watched) -> None:
    # K is long enough to be split in one GEMM.
    layer = ExpertLayer(hidden=1024, intermediate=64, experts=2, top_k=1)
    if kernel.rejects(layer.up, HERE) is not None:
        layer = replace(layer, weight_format="fp8_block128")
    given = operands(layer, 3)
    up, down = quickest(kernel, layer.up), quickest(kernel, layer.down)
    assert up is not None or down is not None
    for config, run in ((up, run_up), (down, run_down)):
        before = len(watched.launches)
        if config is not None:
            run(kernel, config, given)
            assert len(watched.launches) > before and watched.current == []


def test_the_routers_launches_are_under_the_guard(watched: Watched) -> None:
    route_device(torch.randn(3, ODD.hidden), torch.randn(ODD.experts, ODD.hidden), ODD.top_k)
    assert watched.launches and watched.current == []
