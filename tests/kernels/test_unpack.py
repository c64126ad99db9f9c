"""Every kernel gives back, bit for bit, the weights that it packed."""

from __future__ import annotations

import pytest
import torch

from tilecast.environment import cpu_environment
from tilecast.kernels import registry
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.gpu.layouts import LAYOUTS, plain_again, relayout
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, ExpertLayer

LAYERS = [
    ExpertLayer(hidden=48, intermediate=40, experts=3, top_k=2, dtype="bf16"),
    ExpertLayer(hidden=33, intermediate=7, experts=2, top_k=1, dtype="fp32", gated=False, activation="relu2"),
    ExpertLayer(hidden=65, intermediate=72, experts=2, top_k=2, dtype="fp16", bias=True),
]


def stack(gemm: ExpertGemm) -> GemmWeights:
    generator = torch.Generator().manual_seed(7)
    dtype = TORCH_DTYPES[gemm.layer.dtype]
    data = torch.randn((gemm.layer.experts, gemm.n, gemm.k), generator=generator).to(dtype)
    bias = torch.randn((gemm.layer.experts, gemm.n), generator=generator) if gemm.layer.bias else None
    return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=bias)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
@pytest.mark.parametrize("name", ["up", "down"])
def test_what_a_cpu_kernel_packed_is_given_back(layer: ExpertLayer, name: str) -> None:
    here = cpu_environment()
    gemm = getattr(layer, name)
    plain = stack(gemm)
    layouts = set()
    for kernel in registry:
        if kernel.rejects(gemm, here) is not None:
            continue
        for config in kernel.space(gemm, 4, here):
            layout = kernel.layout(gemm, config)
            if registry.invalid(gemm, config, here) is None and (kernel.name, layout) not in layouts:
                layouts.add((kernel.name, layout))
                found = kernel.unpack(kernel.pack(plain, layout))
                assert found.layout == PLAIN
                assert torch.equal(found.data, plain.data), (kernel.name, layout)
    assert len(layouts) >= 3


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_gpu_layouts_store_is_given_back(layer: ExpertLayer, layout: str) -> None:
    for gemm in layer.gemms:
        plain = stack(gemm)
        found = plain_again(relayout(plain, layout))
        assert found.layout == PLAIN and found.data.is_contiguous()
        assert torch.equal(found.data, plain.data)
        if plain.bias is not None:
            assert found.bias is not None and torch.equal(found.bias, plain.bias)
