from __future__ import annotations

from dataclasses import replace

import pytest

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.prescreen import anchors, prescreen
from tilecast.errors import DeviceError
from tilecast.kernels.spec import Registry


def test_the_default_comes_first_and_every_config_once() -> None:
    kernel = TorchKernel()
    screened = prescreen(LAYER.up, 16, HERE, Registry((kernel,)))
    configs = [c.config for c in screened.candidates]
    assert configs[0] == kernel.default(LAYER.up, 16, HERE)
    assert [c.is_default for c in screened.candidates].count(True) == 1
    assert screened.default.is_default
    assert len(configs) == len(set(configs)) == 9


def test_every_rejection_has_its_reason() -> None:
    class Strict(TorchKernel):
        def space(self, gemm, tokens, environment):
            yield self.config(row_block=17)
            yield from super().space(gemm, tokens, environment)

    idle = TorchKernel(name="idle.moe_gemm", rejection="it is asleep")
    foreign = TorchKernel(name="gpu.moe_gemm")
    foreign.device_kind = "cuda"
    screened = prescreen(LAYER.up, 4, HERE, Registry((Strict(), idle, foreign)))
    reasons = {(r.kernel, r.reason) for r in screened.rejections}
    assert ("idle.moe_gemm", "it is asleep") in reasons
    assert ("gpu.moe_gemm", "runs on cuda, this environment is cpu") in reasons
    assert ("torch.moe_gemm", "chunks of K need the plain layout") in reasons
    assert any("row_block=17" in reason for _, reason in reasons)
    rejected = {r.config for r in screened.rejections}
    assert rejected.isdisjoint(c.config for c in screened.candidates)


def test_classes_layouts_and_invariance_are_the_kernels() -> None:
    kernel = TorchKernel("matmul")
    found = prescreen(LAYER.up, 4, HERE, Registry((kernel,))).by_config
    plain, chunked = found[kernel.config()], found[kernel.config(chunk_k=64)]
    transposed, matmul = found[kernel.config(layout="transposed")], found[kernel.config(variant="matmul")]
    assert plain.numerics == transposed.numerics != chunked.numerics
    assert (plain.layout, transposed.layout) == ("plain", "torch.moe_gemm:transposed")
    assert plain.batch_invariant and not matmul.batch_invariant


def test_an_anchors_group_is_in_every_bucket() -> None:
    class Restless(TorchKernel):
        """Prefers another layout from 16 tokens on, and offers nothing but its default."""

        def default(self, gemm, tokens, environment, like=None):
            if like is None and tokens >= 16:
                return self.config(layout="transposed")
            return super().default(gemm, tokens, environment, like)

        def space(self, gemm, tokens, environment):
            return iter(())

    registry = Registry((Restless(),))
    held = anchors(LAYER.up, (1, 4, 16), HERE, registry)
    assert [config["layout"] for config in held] == ["plain", "transposed"]
    for tokens in (1, 4, 16):
        screened = prescreen(LAYER.up, tokens, HERE, registry, anchors=held)
        assert {c.layout for c in screened.candidates} == {"plain", "torch.moe_gemm:transposed"}
        marked = [c.layout for c in screened.candidates if c.is_default or c.is_anchor]
        assert marked == sorted(set(marked), key=marked.index) and len(marked) == 2


def test_no_kernel_is_a_device_error_with_the_reasons() -> None:
    registry = Registry((TorchKernel(rejection="it is asleep"),))
    with pytest.raises(DeviceError, match="it is asleep"):
        prescreen(LAYER.up, 4, HERE, registry)
    with pytest.raises(DeviceError):
        prescreen(LAYER.up, 4, replace(HERE, device_kind="cuda"), registry)


def test_a_default_that_is_not_valid_is_a_device_error() -> None:
    class Broken(TorchKernel):
        def default(self, gemm, tokens, environment, like=None):
            return self.config(row_block=3)

    with pytest.raises(DeviceError, match="row_block=3"):
        prescreen(LAYER.up, 4, HERE, Registry((Broken(),)))
