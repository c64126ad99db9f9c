"""Sharding in one process; sums over ranks are in test_ranks.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.tables import LAYER, inputs, weights
from tilecast.engine.experts import prepare_experts
from tilecast.engine.group import Group
from tilecast.engine.parallel import TensorParallelExperts, all_reduce_ordered, local_ids, shard_experts
from tilecast.engine.runtime import use_table
from tilecast.errors import InputError, ModelError
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.models.sharding import layer_for_rank
from tilecast.problem import ExpertLayer

CASES = [
    (LAYER, 1, 1),
    (LAYER, 2, 1),
    (replace(LAYER, intermediate=47), 4, 1),
    (replace(LAYER, gated=False, activation="gelu", bias=True), 3, 1),
    (replace(LAYER, bias=True, intermediate=47), 2, 2),
    (replace(LAYER, experts=5, global_experts=5), 1, 3),
]


@pytest.mark.parametrize(("layer", "tp", "ep"), CASES)
def test_the_shards_add_up_to_the_layer(layer: ExpertLayer, tp: int, ep: int) -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(layer), inputs(layer, 7)
    total = torch.zeros(7, layer.hidden)
    first = held = 0
    for rank in range(tp * ep):
        shard = shard_experts(w.w13, w.w2, tp=tp, ep=ep, rank=rank, gated=layer.gated, bias13=w.bias13, bias2=w.bias2)
        part = prepare_experts(
            shard.w13, shard.w2, top_k=layer.top_k, activation=layer.activation, gated=layer.gated,
            bias13=shard.bias13, bias2=shard.bias2, global_experts=layer.global_experts,
        )  # fmt: skip
        assert part.layer == layer_for_rank(layer, rank, tp=tp, ep=ep)
        if rank % tp == 0:
            first += held
        held = part.layer.experts
        total += part(hidden, local_ids(ids, first, held), scales, out_dtype=torch.float32)
    wanted = reference_layer(layer, hidden, w.w13, w.w2, sort_slots(ids, layer.experts), scales, w.bias13, w.bias2)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_shard_is_a_copy_of_its_own() -> None:
    w = weights(LAYER)
    shard = shard_experts(w.w13, w.w2, tp=1, rank=0)
    assert torch.equal(shard.w13, w.w13) and shard.w13.data_ptr() != w.w13.data_ptr()
    assert torch.equal(shard.w2, w.w2) and shard.w2.data_ptr() != w.w2.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 97, "rank": 0}, "tp is 97, expected 1 to 96"),
        ({"tp": 0, "rank": 0}, "tp is 0"),
        ({"tp": 1, "ep": 5, "rank": 0}, "ep is 5, expected 1 to 4"),
        ({"tp": 2, "rank": 2}, "rank is 2, expected 0 to 1"),
    ],
)
def test_impossible_shards(options: dict[str, int], message: str) -> None:
    w = weights(LAYER)
    with pytest.raises(ModelError, match=message):
        shard_experts(w.w13, w.w2, **options)


def test_weights_that_do_not_fit_each_other_are_not_cut() -> None:
    w = weights(LAYER)
    with pytest.raises(InputError, match="w13 is float32"):
        shard_experts(w.w13, w.w2[:, :, 1:].contiguous(), tp=2, rank=0)


def test_local_ids_leave_their_input_alone() -> None:
    ids = torch.tensor([[0, 3], [5, -1]], dtype=torch.int32)
    assert local_ids(ids, 3, 2).tolist() == [[-1, 0], [-1, -1]]
    assert ids.tolist() == [[0, 3], [5, -1]]


def test_one_rank_runs_the_layer_itself() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 5)
    layer = TensorParallelExperts(w.w13, w.w2, top_k=2, group=Group.alone())
    assert torch.equal(layer(*operands), prepare_experts(w.w13, w.w2, top_k=2)(*operands))
    assert layer.layer == LAYER
    with pytest.raises(ModelError, match="tp=2 times ep=1 is not the number of ranks, 1"):
        TensorParallelExperts(w.w13, w.w2, top_k=2, tp=2, group=Group.alone())


def test_a_sum_of_one_is_a_fresh_copy() -> None:
    partial = torch.ones(2, 3)
    total = all_reduce_ordered(partial)
    assert torch.equal(total, partial) and total.data_ptr() != partial.data_ptr()
