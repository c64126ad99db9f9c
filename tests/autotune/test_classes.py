from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.classes import ClassVerifier, same_bits, tokens_cap, wide_operands
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertLayer, TileConfig

BUCKETS = [Bucket(above=0, tokens=1), Bucket(above=1, tokens=4), Bucket(above=4, tokens=20)]
DEEP = replace(LAYER, hidden=160, intermediate=144)


class Swapped(TorchKernel):
    """Its reference configs sum in chunks where the config does not, and the other way round."""

    def default(self, gemm, tokens, environment, like=None):
        config = super().default(gemm, tokens, environment, like)
        return config if like is None else config.with_params(chunk_k=64 - like.integer("chunk_k"))

    def numerics(self, gemm, config, environment):
        return {"kernel": self.name}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_members_of_a_class_pass(dtype: str, name: str, bucket: Bucket) -> None:
    kernel = TorchKernel()
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    layer = replace(DEEP, dtype=dtype)
    gemm = layer.up if name == "up" else layer.down
    for config in (
        kernel.config(row_block=64),
        kernel.config(row_block=16, chunk_k=64),
        kernel.config(row_block=16, layout="transposed"),
    ):
        assert verifier.verify(gemm, config, bucket) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_another_class_fails_the_same_check(dtype: str, name: str, bucket: Bucket) -> None:
    kernel = Swapped()
    layer = replace(DEEP, dtype=dtype)
    gemm = layer.up if name == "up" else layer.down
    for chunk_k in (0, 64):
        reason = ClassVerifier(HERE, Registry((kernel,))).verify(gemm, kernel.config(chunk_k=chunk_k), bucket)
        assert reason is not None and "differs from the same row alone" in reason


@pytest.mark.parametrize("variant", ["misclassed", "batch_order"])
def test_a_config_that_lies_about_its_class_fails(variant: str) -> None:
    kernel = TorchKernel(variant)
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    for gemm in DEEP.gemms:
        assert verifier.verify(gemm, kernel.config(variant=variant), BUCKETS[2]) is not None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["up", "down"])
def test_the_inputs_tell_the_reversed_sum_from_the_sum(dtype: str, name: str) -> None:
    kernel = TorchKernel()
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    layer = replace(DEEP, dtype=dtype)
    gemm = layer.up if name == "up" else layer.down
    for config in (kernel.config(chunk_k=64), kernel.config(layout="transposed")):
        assert verifier.control(gemm, config) is None
        assert verifier.verify(gemm, config, BUCKETS[2]) is None


def test_inputs_that_cannot_tell_classes_apart_are_told() -> None:
    """A sum of one product has one order; zeros have the same bits in any."""
    kernel = TorchKernel("zeros")
    registry = Registry((kernel,))
    single = replace(LAYER, hidden=1)
    assert "0 of " in str(ClassVerifier(HERE, registry).control(single.up, kernel.config()))
    assert "0 of " in str(ClassVerifier(HERE, registry).control(DEEP.down, kernel.config(variant="zeros")))


def test_a_control_that_raises_is_a_reason() -> None:
    kernel = TorchKernel("raises")
    reason = ClassVerifier(HERE, Registry((kernel,))).control(DEEP.up, kernel.config(variant="raises"))
    assert reason is not None and reason.startswith("RuntimeError")


def test_a_reference_of_another_layout_or_class_is_a_reason() -> None:
    class Plain(TorchKernel):
        def default(self, gemm, tokens, environment, like=None):
            return self.config()

    kernel = Plain()
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    for config in (kernel.config(layout="transposed"), kernel.config(chunk_k=64)):
        assert "another class or layout" in str(verifier.verify(DEEP.up, config, BUCKETS[0]))


def test_a_kernel_that_raises_fails() -> None:
    kernel = TorchKernel("raises")
    reason = ClassVerifier(HERE, Registry((kernel,))).verify(DEEP.up, kernel.config(variant="raises"), BUCKETS[0])
    assert reason is not None and reason.startswith("RuntimeError")


@pytest.mark.parametrize(
    "layer",
    [
        replace(LAYER, hidden=33, intermediate=1, top_k=1),
        replace(LAYER, hidden=64, intermediate=64, experts=2, global_experts=16, top_k=8, bias=True),
        replace(LAYER, hidden=64, intermediate=64, experts=1, global_experts=1, top_k=1, activation="swiglu_oai"),
    ],
    ids=lambda layer: layer.label,
)
def test_odd_layers_can_be_checked(layer: ExpertLayer) -> None:
    kernel = TorchKernel()
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    for gemm in layer.gemms:
        assert verifier.verify(gemm, kernel.config(row_block=16), BUCKETS[2]) is None


def test_batches_stand_at_the_edges_of_the_bucket() -> None:
    verifier = ClassVerifier(HERE, Registry())
    assert verifier.token_counts(LAYER.up, Bucket(above=0, tokens=1)) == (1,)
    assert verifier.token_counts(LAYER.up, Bucket(above=4, tokens=16)) == (5, 15, 16)
    mixtral = ExpertLayer(hidden=4096, intermediate=14336, experts=8, top_k=2).up
    cap = tokens_cap(mixtral)
    assert cap < 256
    assert verifier.token_counts(mixtral, Bucket(above=256, tokens=4096)) == (cap,)


def test_inputs_show_every_other_order_of_summation() -> None:
    layer = replace(DEEP, dtype="fp32", gated=False, activation="relu")
    operands = wide_operands(layer.up, 0)
    rows, weight = operands.rows[:, 0], operands.weights.data[0]
    products = rows[:8, None, :] * weight[None]
    forward, backward = torch.zeros(8, layer.up.n), torch.zeros(8, layer.up.n)
    for k in range(layer.up.k):
        forward += products[..., k]
        backward += products[..., layer.up.k - 1 - k]
    assert (forward != backward).float().mean() > 0.9
    exponents = torch.frexp(products[products != 0].abs()).exponent
    assert int(exponents.max() - exponents.min()) >= 24


def test_same_bits_tells_zeros_apart_and_nans_together() -> None:
    nan = torch.full((2,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


def test_release_drops_what_was_kept() -> None:
    kernel = TorchKernel()
    verifier = ClassVerifier(HERE, Registry((kernel,)))
    config: TileConfig = kernel.config()
    assert verifier.verify(DEEP.up, config, BUCKETS[0]) is None
    verifier.release()
    assert verifier.verify(DEEP.down, config, BUCKETS[0]) is None
