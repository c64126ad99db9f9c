from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilecast.errors import ModelError
from tilecast.models import layer_for_rank, shard, split, uneven_note
from tilecast.models.sharding import check_cut
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=64, intermediate=10, experts=5, top_k=2)


def test_one_rank_holds_the_layer_itself() -> None:
    (only,) = shard(LAYER)
    assert (only.ranks, only.layer) == ((0,), LAYER)
    assert uneven_note((only,)) is None


def test_even_shards_are_one_layer() -> None:
    (only,) = shard(LAYER, tp=5)
    assert only.ranks == (0, 1, 2, 3, 4)
    assert only.layer.intermediate == 2
    assert only.layer.experts == only.layer.global_experts == 5


def test_uneven_shards_are_different_layers_larger_first() -> None:
    shards = shard(LAYER, tp=4)
    assert [(part.ranks, part.layer.intermediate) for part in shards] == [((0, 1), 3), ((2, 3), 2)]
    note = uneven_note(shards)
    assert note is not None
    assert "different layers" in note
    assert "ranks 0, 1 E5 H64 I3" in note
    assert "\n" not in note


def test_experts_split_and_stay_global() -> None:
    shards = shard(LAYER, ep=2)
    assert [(part.ranks, part.layer.experts, part.layer.global_experts) for part in shards] == [
        ((0,), 3, 5),
        ((1,), 2, 5),
    ]
    assert all(part.layer.top_k == 2 for part in shards)


def test_one_expert_a_rank_may_be_fewer_than_top_k() -> None:
    (only,) = shard(LAYER, ep=5)
    assert (only.layer.experts, only.layer.top_k) == (1, 2)


def test_rank_order_is_expert_outside_tensor_inside() -> None:
    sizes = [
        (part.experts, part.intermediate) for part in (layer_for_rank(LAYER, rank, tp=3, ep=2) for rank in range(6))
    ]
    assert sizes == [(3, 4), (3, 3), (3, 3), (2, 4), (2, 3), (2, 3)]


def test_split_covers_in_order() -> None:
    assert split(10, 4) == (range(0, 3), range(3, 6), range(6, 8), range(8, 10))
    assert split(0, 2) == (range(0), range(0))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_shards_add_up(intermediate: int, experts: int, tp: int, ep: int) -> None:
    layer = ExpertLayer(hidden=8, intermediate=intermediate, experts=experts, top_k=1)
    if intermediate < tp or experts < ep:
        with pytest.raises(ModelError):
            shard(layer, tp=tp, ep=ep)
        return
    shards = shard(layer, tp=tp, ep=ep)
    assert sorted(rank for part in shards for rank in part.ranks) == list(range(tp * ep))
    assert len({part.layer for part in shards}) == len(shards)
    assert (
        sum(part.layer.intermediate * part.layer.experts * len(part.ranks) for part in shards) == intermediate * experts
    )
    for rank in range(tp * ep):
        (mine,) = [part.layer for part in shards if rank in part.ranks]
        assert mine == layer_for_rank(layer, rank, tp=tp, ep=ep)
        assert mine.intermediate == len(split(intermediate, tp)[rank % tp])
        assert mine.experts == len(split(experts, ep)[rank // tp])


@pytest.mark.parametrize(
    ("tp", "ep", "says"),
    [
        (11, 1, "tp is 11, more than the 10 columns"),
        (1, 6, "ep is 6, more than the 5 experts"),
        (0, 1, "tp is 0"),
        (1, -1, "ep is -1"),
        (True, 1, "tp is True"),
        (1 << 17, 1, "tp is 131072"),
    ],
)
def test_refusals(tp: int, ep: int, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        shard(LAYER, tp=tp, ep=ep)


@pytest.mark.parametrize("rank", [-1, 2, True])
def test_no_such_rank(rank: int) -> None:
    with pytest.raises(ModelError, match="rank is"):
        layer_for_rank(LAYER, rank, tp=2)


def test_experts_are_not_split_twice() -> None:
    with pytest.raises(ModelError, match="already"):
        shard(shard(LAYER, ep=2)[0].layer, ep=2)


def test_cuts_inside_what_shares_a_scale_are_refused_when_a_model_is_split() -> None:
    layer = ExpertLayer(experts=8, hidden=4096, intermediate=14336, top_k=2, weight_format="awq_g128")
    assert [part.layer.intermediate for part in shard(layer, tp=8)] == [1792]
    with pytest.raises(ModelError, match=r"inside a group of 128 .*; tp that work: 1, 2, 4, 7, 8, 14, 16, 28, …$"):
        shard(layer, tp=3)
    with pytest.raises(ModelError, match="inside a block of 128"):
        shard(replace(layer, weight_format="fp8_block128", intermediate=768), tp=4)
    assert len(shard(replace(layer, weight_format="fp8_tensor"), tp=3)) == 2
    with pytest.raises(ModelError, match="intermediate size I is 100, which cuts a group of 128"):
        shard(replace(layer, intermediate=100))
    by_row = replace(layer, weight_format="int8_channel", intermediate=100)
    check_cut(by_row, 2)
    with pytest.raises(ModelError, match=r"inside a word of 4 packed codes \(int8_channel\); tp that work: 1, 5, 25$"):
        check_cut(by_row, 2, word=4)
