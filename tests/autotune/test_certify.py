"""Certificates of numerics classes: what they catch, what they refuse to prove, and that they come out alike again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.certificate import Certificate, changes
from tilecast.autotune.certify import BATCHES, certify, check_usable, claimed_configs, spread
from tilecast.environment import cuda_environment
from tilecast.errors import DeviceError, InputError
from tilecast.kernels import registry
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.settings import child_environment

DEEP = replace(LAYER, hidden=96, intermediate=80, experts=2)
FEW = 24


class SortedRows(TorchKernel):
    """Writes and reads the intermediate's rows in expert order."""

    def order(self, gemm, config):
        return "sorted"

    def up(self, config, hidden, weights, route, out):
        by_slot = torch.full_like(out, torch.nan)
        super().up(config, hidden, weights, route, by_slot)
        count = int(route.offsets[-1])
        out[:count] = by_slot[route.slots[:count].long()]

    def down(self, config, intermediate, weights, route, topk_weights, out):
        count = int(route.offsets[-1])
        assert torch.isnan(intermediate[count:]).all(), "rows past the last present one are not poisoned"
        by_slot = torch.zeros_like(intermediate)
        by_slot[route.slots[:count].long()] = intermediate[:count]
        super().down(config, by_slot, weights, route, topk_weights, out)


class Renamed(TorchKernel):
    """Claims a class for each row block: more classes than there are orders of summation."""

    def numerics(self, gemm, config, environment):
        return {**super().numerics(gemm, config, environment), "row_block": config["row_block"]}

    def default(self, gemm, tokens, environment, like=None):
        config = super().default(gemm, tokens, environment, like)
        return config if like is None else config.with_params(row_block=like["row_block"])


class FirstColumn(TorchKernel):
    """Its `misclassed` variant is wrong only in one column of the last row of larger batches."""

    def up(self, config, hidden, weights, route, out):
        super().up(config.with_params(variant="ordered"), hidden, weights, route, out)
        if config["variant"] == "misclassed" and route.tokens > 1:
            out[-1, 3] = torch.nextafter(out[-1, 3], torch.tensor(torch.inf, dtype=out.dtype))


def run(
    kernel: TorchKernel, *configs: TileConfig, gemm: ExpertGemm = DEEP.up, inputs: int = FEW, **more: object
) -> Certificate:
    return certify(gemm, configs, HERE, Registry((kernel,)), inputs=inputs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [TorchKernel, SortedRows])
@pytest.mark.parametrize("name", ["up", "down"])
def test_an_honest_class_is_equal(kind: type[TorchKernel], name: str) -> None:
    kernel, gemm = kind(), DEEP.up if name == "up" else DEEP.down
    members = [kernel.config(row_block=16), kernel.config(row_block=64, layout="transposed")]
    (result,) = run(kernel, *members, gemm=gemm).classes
    assert result.verdict == "equal" and result.reason is None
    assert [(m.config, m.equal, m.different) for m in result.members] == [(m, FEW, 0) for m in members]
    assert 2 * result.control > FEW
    assert not result.certified, "a few inputs are no certificate"
    assert replace(result, inputs=1000, control=900).certified


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("variant", ["misclassed", "batch_order"])
def test_a_member_with_another_order_of_k_is_caught(dtype: str, name: str, variant: str) -> None:
    kernel, layer = TorchKernel(variant), replace(DEEP, dtype=dtype)
    liar = kernel.config(variant=variant)
    (result,) = run(kernel, kernel.config(), liar, gemm=layer.up if name == "up" else layer.down).classes
    honest, caught = result.members
    assert (honest.equal, honest.different) == (FEW, 0)
    assert caught.different > FEW / 2 and caught.first is not None
    assert result.verdict == "different"
    assert "variant=" + variant in str(result.reason) and "column" in str(result.reason)


def test_the_first_difference_names_row_column_and_both_bits() -> None:
    kernel = FirstColumn("misclassed")
    layer = replace(DEEP, dtype="fp32", top_k=1)
    (result,) = run(kernel, kernel.config(), kernel.config(variant="misclassed"), gemm=layer.up).classes
    first = result.members[1].first
    assert first is not None
    assert (first.batch, first.row, first.column, first.dtype) == (BATCHES[0], BATCHES[0] - 1, 3, "float32")
    assert abs(int(first.got, 16) - int(first.expected, 16)) == 1
    # The last row of each of the four small batches and of the one large one.
    assert result.members[1].different in (4, 5)
    assert result.members[1].equal + result.members[1].different == FEW


def test_a_control_that_cannot_fail_is_told() -> None:
    kernel = TorchKernel("zeros")
    (result,) = run(kernel, kernel.config(), gemm=replace(DEEP, hidden=1).up).classes
    assert result.verdict == "control failed"
    assert f"only 0 of {FEW}" in str(result.reason)
    assert not replace(result, inputs=1000).certified


def test_what_a_kernel_raises_is_told() -> None:
    kernel = TorchKernel("raises")
    (result,) = run(kernel, kernel.config(), kernel.config(variant="raises")).classes
    assert result.verdict == "raised"
    assert str(result.reason).endswith("raised RuntimeError: the planted failure")
    assert result.members[0].equal == FEW


def test_a_class_whose_reference_raises_does_not_stop_the_others() -> None:
    class Broken(TorchKernel):
        def up(self, config, hidden, weights, route, out):
            if config["chunk_k"] == 0:
                raise RuntimeError("no chains")
            super().up(config, hidden, weights, route, out)

    kernel = Broken()
    broken, sound = run(kernel, kernel.config(), kernel.config(chunk_k=64)).classes
    assert (broken.verdict, broken.outputs, broken.members) == ("raised", "", ())
    assert "no chains" in str(broken.reason)
    assert sound.verdict == "equal"


def test_classes_that_are_alike_after_all_are_told_and_not_merged() -> None:
    kernel = Renamed()
    configs = [kernel.config(), kernel.config(row_block=16), kernel.config(chunk_k=64)]
    certificate = run(kernel, *configs)
    plain, blocked, chunked = (result.numerics for result in certificate.classes)
    assert [(pair.first, pair.second) for pair in certificate.alike] == [(plain, blocked)]
    differing = {(pair.first, pair.second): pair.different for pair in certificate.comparisons}
    assert differing[plain, chunked] > FEW / 2
    assert certificate.classes[0].outputs == certificate.classes[1].outputs != certificate.classes[2].outputs


def test_a_kernel_that_promises_nothing_is_left_out() -> None:
    kernel = TorchKernel("matmul")
    certificate = run(kernel, kernel.config(), kernel.config(variant="matmul"))
    assert (len(certificate.classes), certificate.unpromised) == (1, 1)
    assert run(kernel, kernel.config(variant="matmul")).classes == ()


def test_the_seed_decides_the_digest() -> None:
    kernel = TorchKernel()
    first, again, other = (run(kernel, kernel.config(), inputs=8, seed=seed) for seed in (0, 0, 1))
    assert first.classes[0].outputs == again.classes[0].outputs != other.classes[0].outputs


IN_A_PROCESS = """
from tests.autotune.test_certify import *
print(run(TorchKernel(), TorchKernel().config(), inputs=8).classes[0].outputs)
"""


def test_two_processes_give_one_digest() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env=child_environment({"OMP_NUM_THREADS": "1"}), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    here = run(TorchKernel(), TorchKernel().config(), inputs=8)
    assert done.stdout.strip() == here.classes[0].outputs


def test_json_is_read_back_and_compared() -> None:
    kernel = TorchKernel("misclassed")
    configs = (kernel.config(), kernel.config(variant="misclassed"), kernel.config(chunk_k=64))
    certificate = run(kernel, *configs, inputs=8)
    again = Certificate.from_json(json.loads(json.dumps(certificate.to_json())))
    assert again == certificate
    assert changes([again], [certificate]) == ((), 2)
    other_bits = replace(certificate.classes[0], outputs="0" * 64)
    ((change,), compared) = changes([certificate], [replace(certificate, classes=(other_bits,))])
    assert (change.numerics, change.before, compared) == (certificate.classes[0].numerics, "0" * 64, 1)
    assert changes([certificate], [replace(certificate, seed=1)]) == ((), 0)


def test_a_certificate_that_was_changed_is_refused() -> None:
    document = json.loads(json.dumps(run(TorchKernel(), TorchKernel().config(), inputs=2).to_json()))
    with pytest.raises(InputError, match="digest"):
        Certificate.from_json({**document, "environment": {**document["environment"], "driver": "x"}})
    with pytest.raises(InputError, match="inputs"):
        Certificate.from_json({**document, "inputs": 0})
    with pytest.raises(InputError, match="unknown"):
        Certificate.from_json({**document, "more": 1})


def test_a_spread_shows_every_value_early() -> None:
    configs = claimed_configs(DEEP.up, (1, 64), HERE, Registry((TorchKernel(),)))
    chosen = spread(configs, 4)
    assert chosen[0] == configs[0] and len(set(chosen)) == 4
    for name in ("row_block", "chunk_k", "layout"):
        assert {c[name] for c in chosen} == {c[name] for c in configs}
    assert set(spread(configs, 1000)) == set(configs)


def test_progress_rises_to_the_end() -> None:
    seen: list[float] = []
    kernel = TorchKernel()
    run(kernel, kernel.config(), kernel.config(chunk_k=64), inputs=2, report=lambda share, text: seen.append(share))
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] < 1


def test_every_input_has_a_sum() -> None:
    """Where a token has one slot, none may be absent: it would be equal whatever the kernel does."""
    kernel = TorchKernel()
    gemm = replace(DEEP, top_k=1, dtype="fp32").up
    (result,) = run(kernel, kernel.config(), gemm=gemm, inputs=100).classes
    assert result.control == 100


def test_a_device_that_was_left_unusable_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    check_usable(torch.device("cpu"), "x")
    with pytest.raises(DeviceError, match="k m=1 raised it, and left the device unusable"):
        check_usable(torch.device("cuda"), "k m=1 raised it")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    check_usable(torch.device("cuda"), "x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_classes_on_a_gpu() -> None:
    """Few members and the whole number of inputs: the claim itself, on whatever device this is."""
    here, layer = cuda_environment(), replace(DEEP, hidden=512, intermediate=256)
    for gemm in layer.gemms:
        configs = claimed_configs(gemm, (1, 64, 1024), here, registry)
        certificate = certify(gemm, configs, here, registry, members=4)
        assert [(result.numerics, result.reason) for result in certificate.classes if not result.certified] == []
