from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.draws import typical_active_experts, uniform_ids
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.workload import Workload, check_memory, normal_stack
from tilecast.errors import DeviceError
from tilecast.kernels.spec import GemmWeights, Registry
from tilecast.problem import ExpertGemm, ExpertLayer

WIDE = ExpertLayer(hidden=32, intermediate=32, experts=64, top_k=8)
SHARE = ExpertLayer(hidden=32, intermediate=32, experts=4, top_k=2, global_experts=64)


@pytest.mark.parametrize("layer", [LAYER, WIDE, SHARE])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_routing_has_distinct_experts_and_the_typical_number_of_active_ones(layer: ExpertLayer, tokens: int) -> None:
    ids = uniform_ids(layer, tokens, seed=3)
    assert ids.dtype == torch.int32 and ids.shape == (tokens, layer.top_k)
    assert int(ids.min()) >= 0 and int(ids.max()) < layer.global_experts
    assert all(len(set(row)) == layer.top_k for row in ids.tolist())
    active = len({e for row in ids.tolist() for e in row if e < layer.experts})
    assert active >= 1
    assert abs(active - typical_active_experts(layer, tokens)) <= 2


def test_every_expert_is_reached_over_the_seeds() -> None:
    seen = {e for seed in range(100) for row in uniform_ids(LAYER, 1, seed).tolist() for e in row}
    assert seen == {0, 1, 2, 3}


def test_seeds_decide_routing() -> None:
    assert torch.equal(uniform_ids(WIDE, 16, 1), uniform_ids(WIDE, 16, 1))
    assert not torch.equal(uniform_ids(WIDE, 16, 1), uniform_ids(WIDE, 16, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_normal_and_no_two_rows_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.workload.POOL_ELEMENTS", 5000)
    stack = normal_stack((6, 50, 40), dtype, 0.25, seed=1)
    assert stack.dtype == dtype and bool(torch.isfinite(stack).all())
    assert stack.float().std().item() == pytest.approx(0.25, rel=0.05)
    assert stack.float().mean().item() == pytest.approx(0, abs=0.02)
    assert len({tuple(row) for row in stack.float().view(-1, 40).tolist()}) == 300


def test_weights_rotate_through_four_times_the_cache_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LAYER.up.weight_bytes()
    work = Workload(replace(HERE, llc_bytes=stack))
    assert work.copies(LAYER.up) == 4
    assert Workload(replace(HERE, llc_bytes=stack // 8)).copies(LAYER.up) == 1
    assert Workload(replace(HERE, llc_bytes=stack * 1000)).copies(LAYER.up) == 64
    monkeypatch.setattr("tilecast.autotune.workload.MAX_ROTATION_BYTES", 2 * stack + 1)
    assert work.copies(LAYER.up) == 2


def test_packed_layouts_hold_the_weights_of_their_plain_copy() -> None:
    kernel = TorchKernel()
    work = Workload(HERE)
    plain = work.weights(LAYER.up, kernel, "plain", 1)
    packed = work.weights(LAYER.up, kernel, "transposed", 1)
    assert torch.equal(packed.data, plain.data.transpose(1, 2))
    assert work.weights(LAYER.up, kernel, "transposed", 1) is packed
    assert not torch.equal(work.weights(LAYER.up, kernel, "plain", 0).data, plain.data)
    assert torch.equal(work.plain(LAYER.up).data, work.weights(LAYER.up, kernel, "plain", 0).data)


def test_operands_of_one_gemm_are_dropped_for_the_next() -> None:
    kernel = TorchKernel()
    work = Workload(HERE)
    first = work.weights(LAYER.up, kernel, "plain")
    work.weights(LAYER.down, kernel, "plain")
    again = work.weights(LAYER.up, kernel, "plain")
    assert again is not first and torch.equal(again.data, first.data)


def test_packed_layouts_of_two_kernels_are_not_mixed_up() -> None:
    work = Workload(HERE)
    one, two = TorchKernel(), TorchKernel(name="other.moe_gemm")
    assert work.weights(LAYER.up, one, "transposed") is not work.weights(LAYER.up, two, "transposed")


def test_the_cache_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.autotune.workload._memory_bytes", lambda device: 6 * LAYER.up.weight_bytes())
    work, kernel = Workload(HERE), TorchKernel()
    first = work.weights(LAYER.up, kernel, "plain", 0)
    for copy in range(1, 5):
        work.weights(LAYER.up, kernel, "plain", copy)
    assert work.weights(LAYER.up, kernel, "plain", 0) is not first


@pytest.mark.parametrize(("stacks_in_memory", "most"), [(2, 2), (4, 2), (8, 4), (16, 8)])
def test_weights_never_take_more_memory_than_was_checked(
    monkeypatch: pytest.MonkeyPatch, stacks_in_memory: int, most: int
) -> None:
    """Two layouts of one large stack must do where only two fit; else half of the memory stays free."""
    monkeypatch.setattr(
        "tilecast.autotune.workload._memory_bytes", lambda device: stacks_in_memory * LAYER.up.weight_bytes()
    )
    check_memory(LAYER.up)
    alive: weakref.WeakSet[GemmWeights] = weakref.WeakSet()
    peaks = []

    class Counting(TorchKernel):
        def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
            packed = super().pack(weights, layout)
            alive.update((weights, packed))
            peaks.append(len(alive))
            return packed

    work, kernels = Workload(HERE), [Counting(name=f"kernel{number}") for number in range(9)]
    for turn in range(18):
        alive.add(work.weights(LAYER.up, kernels[turn % 9], "transposed" if turn % 5 else "plain"))
    assert max(peaks) <= most


class Doubled(TorchKernel):
    """Holds more than the weights in its packed layout."""

    def stack_bytes(self, gemm: ExpertGemm, layout: str) -> int:
        return 2 * gemm.weight_bytes()


def test_a_layout_that_holds_more_than_the_weights_takes_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LAYER.up.weight_bytes()
    monkeypatch.setattr("tilecast.autotune.workload._memory_bytes", lambda device: 8 * stack)
    work, plain, doubled = Workload(HERE), TorchKernel(name="other.moe_gemm"), Doubled()
    kept = work.weights(LAYER.up, plain, "plain")
    first = work.weights(LAYER.up, doubled, "transposed")
    assert work.weights(LAYER.up, plain, "plain") is kept, "one of both fits beside a source"
    work.weights(LAYER.up, doubled, "transposed", 1)
    assert work.weights(LAYER.up, plain, "plain") is kept, "the oldest goes first"
    assert work.weights(LAYER.up, doubled, "transposed") is not first
    assert work.fits(LAYER.up, [stack, 2 * stack]) and not work.fits(LAYER.up, [2 * stack, 2 * stack])
    assert work.fits(LAYER.up, [9 * stack]), "a single one always stands alone"


def test_the_largest_layout_is_what_has_to_fit_beside_the_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LAYER.up.weight_bytes()
    measurers = [DeviceMeasurer(HERE, Registry((kernel,))) for kernel in (TorchKernel(), Doubled())]
    monkeypatch.setattr("tilecast.autotune.workload._memory_bytes", lambda device: 3 * stack)
    for measurer in measurers:
        measurer.prepare(LAYER.up)
    monkeypatch.setattr("tilecast.autotune.workload._memory_bytes", lambda device: 3 * stack - 1)
    measurers[0].prepare(LAYER.up)
    with pytest.raises(DeviceError, match="for weights in two layouts"):
        measurers[1].prepare(LAYER.up)


def test_inputs_have_the_shapes_of_their_gemm() -> None:
    work = Workload(HERE)
    up, down = work.inputs(LAYER.up, 5, 0), work.inputs(LAYER.down, 5, 0)
    assert up.rows.shape == (5, 96) and down.rows.shape == (10, 80)
    assert up.rows.dtype == torch.bfloat16 and up.topk_weights.dtype == torch.float32
    torch.testing.assert_close(up.topk_weights.sum(1), torch.ones(5))


def test_bias_is_made_where_the_layer_has_one() -> None:
    layer = replace(LAYER, bias=True)
    bias = Workload(HERE).plain(layer.up).bias
    assert bias is not None and bias.shape == (4, 160)


def test_weights_beyond_memory_are_a_device_error() -> None:
    huge = ExpertLayer(hidden=1 << 16, intermediate=1 << 16, experts=1024, top_k=2)
    with pytest.raises(DeviceError, match="GiB"):
        check_memory(huge.up)
