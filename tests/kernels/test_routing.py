from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilecast import kernels
from tilecast.errors import InputError
from tilecast.kernels.routing import ExpertLayout, ordered_sum, route, router_logits, sort_slots

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Sort = Callable[[torch.Tensor, int], ExpertLayout]
SORTS: dict[str, Sort] = {"torch": sort_slots, "device": kernels.sort_slots}
sorts = pytest.mark.parametrize("sort", SORTS.values(), ids=SORTS)
"""One contract, both implementations: plain torch, and what the device's own kernels do."""


def wide(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw values of very different sizes, so that another sum order gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return (values * torch.exp(1.5 * torch.randn(rows, columns, generator=generator))).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("experts", "hidden"),
    [(1, 64), (2, 777), (3, 1024), (8, 1024), (8, 777), (17, 96), (60, 2048), (128, 512), (512, 256), (512, 33)],
)
def test_bits_of_a_token_do_not_depend_on_the_batch(
    experts: int, hidden: int, dtype: torch.dtype, scoring: str
) -> None:
    # Small weights, so that scores do not all saturate.
    rows, weight = wide(64, hidden, dtype, 1), wide(experts, hidden, dtype, 2) * 0.02
    top_k = min(4, experts)
    logits = router_logits(rows, weight)
    ids, weights = route(rows, weight, top_k, scoring=scoring)
    for tokens in range(1, 65):
        start = (7 * tokens) % (65 - tokens)
        part = slice(start, start + tokens)
        assert same_bits(router_logits(rows[part], weight), logits[part])
        some_ids, some_weights = route(rows[part], weight, top_k, scoring=scoring)
        assert torch.equal(some_ids, ids[part])
        assert same_bits(some_weights, weights[part])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    moved_ids, moved_weights = route(rows[order], weight, top_k, scoring=scoring)
    assert torch.equal(moved_ids, ids[order])
    assert same_bits(moved_weights, weights[order])


@pytest.mark.parametrize(("experts", "hidden"), [(2, 777), (8, 4096), (60, 2048), (512, 1024)])
def test_bits_do_not_depend_on_the_number_of_threads(experts: int, hidden: int) -> None:
    rows, weight = wide(64, hidden, torch.float32, 1), wide(experts, hidden, torch.float32, 2) * 0.02
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [router_logits(rows, weight), torch.cat([router_logits(row[None], weight) for row in rows])]
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


def test_the_check_above_can_fail() -> None:
    """torch's own matmul, which picks a kernel by shape, is what the check is for."""
    rows, weight = wide(64, 777, torch.float32, 1), wide(8, 777, torch.float32, 2)
    product = rows @ weight.T
    alone = torch.cat([rows[token : token + 1] @ weight.T for token in range(64)])
    backwards = rows.flip(1) @ weight.flip(1).T
    assert not (same_bits(product, alone) and same_bits(product, backwards))


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("hidden", [1, 7, 16, 777, 1024])
def test_bits_do_not_depend_on_alignment_or_strides(experts: int, hidden: int) -> None:
    rows, weight = wide(5, hidden, torch.float32, 1), wide(experts, hidden, torch.float32, 2)
    expected = router_logits(rows, weight)
    for offset in (1, 3, 8):
        shifted_rows = torch.empty(rows.numel() + offset)[offset:].view_as(rows).copy_(rows)
        shifted_weight = torch.empty(weight.numel() + offset)[offset:].view_as(weight).copy_(weight)
        assert same_bits(router_logits(shifted_rows, weight), expected)
        assert same_bits(router_logits(rows, shifted_weight), expected)
    assert same_bits(router_logits(rows.T.contiguous().T, weight.T.contiguous().T), expected)


@pytest.mark.parametrize("tokens", [1000, 8192])
def test_large_batches_have_the_bits_of_single_tokens(tokens: int) -> None:
    rows, weight = wide(tokens, 64, torch.float32, 1), wide(8, 64, torch.float32, 2) * 0.05
    for scoring in ("softmax", "sigmoid"):
        ids, weights = route(rows, weight, 2, scoring=scoring)
        for token in range(0, tokens, 97):
            one_id, one_weight = route(rows[token : token + 1], weight, 2, scoring=scoring)
            assert torch.equal(one_id[0], ids[token])
            assert same_bits(one_weight[0], weights[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_as_good_as_float32_gets(dtype: torch.dtype) -> None:
    rows, weight = wide(16, 1024, dtype, 1), wide(24, 1024, dtype, 2)
    exact = rows.double() @ weight.double().T
    size = rows.double().abs() @ weight.double().abs().T
    logits = router_logits(rows, weight)
    assert logits.dtype == torch.float32
    assert ((logits.double() - exact).abs() / size).max() < 1024 * 2**-24


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_the_scores(scoring: str, renormalize: bool) -> None:
    rows, weight = wide(9, 64, torch.float32, 1), wide(12, 64, torch.float32, 2) * 0.005
    ids, weights = route(rows, weight, 3, scoring=scoring, renormalize=renormalize)
    logits = rows.double() @ weight.double().T
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    values, indices = scores.topk(3, dim=-1)
    assert torch.equal(ids.long(), indices)
    expected = values / values.sum(-1, keepdim=True) if renormalize else values
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    assert ids.dtype == torch.int32
    assert ids.is_contiguous()
    assert weights.dtype == torch.float32
    assert weights.is_contiguous()
    assert bool((weights.diff(dim=-1) <= 0).all())


def test_sigmoid_at_the_ends() -> None:
    rows = torch.tensor([[1.0], [-1.0]])
    _, weights = route(rows, torch.tensor([[200.0]]), 1, scoring="sigmoid", renormalize=False)
    assert weights.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("experts", [2, 8, 64, 512])
def test_ties_go_to_the_lower_expert(experts: int) -> None:
    rows, weight = torch.ones(3, 16), torch.ones(experts, 16)
    top_k = min(10, experts)
    ids, weights = route(rows, weight, top_k)
    assert ids.tolist() == [list(range(top_k))] * 3
    assert len(set(weights.flatten().tolist())) == 1


def test_ties_below_a_winner() -> None:
    weight = torch.zeros(100, 16)
    weight[70] = 1
    ids, _ = route(torch.ones(1, 16), weight, 4)
    assert ids.tolist() == [[70, 0, 1, 2]]


def test_renormalisation_sums_in_ascending_position() -> None:
    # 1 + 2**-24 rounds back to 1, twice; the other order would give 1 + 2**-23.
    weights = torch.tensor([[1.0, 2.0**-24, 2.0**-24]])
    assert ordered_sum(weights).item() == 1.0
    assert ordered_sum(weights.flip(-1)).item() == 1.0 + 2.0**-23
    assert ordered_sum(torch.ones(2, 3, 1)).shape == (2, 3, 1)


def test_no_tokens() -> None:
    ids, weights = route(torch.empty(0, 64), torch.ones(8, 64), 2)
    assert ids.shape == weights.shape == (0, 2)
    layout = sort_slots(ids, 8)
    assert layout.tokens == 0
    assert layout.slots.numel() == 0
    assert layout.offsets.tolist() == [0] * 9


REFUSED_NAMES = ("hidden", "weight", "top_k", "scoring", "says")
REFUSED = [
    ((4, 8), (3, 8), 0, "softmax", "top-k is 0, expected 1 to 3"),
    ((4, 8), (3, 8), 4, "softmax", "top-k is 4"),
    ((4, 8), (3, 8), 2, "tanh", "scoring is 'tanh'"),
    ((4, 8), (3, 7), 2, "softmax", r"\(4, 8\) and \(3, 7\)"),
    ((2, 4, 8), (3, 8), 2, "softmax", "expected"),
    ((4, 8), (8,), 2, "softmax", "expected"),
]
"""What no router takes, and what it says."""


@pytest.mark.parametrize(REFUSED_NAMES, REFUSED)
def test_route_refuses(hidden: tuple[int, ...], weight: tuple[int, ...], top_k: int, scoring: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        route(torch.zeros(hidden), torch.zeros(weight), top_k, scoring=scoring)


@sorts
def test_slots_are_sorted_by_expert_then_slot(sort: Sort) -> None:
    layout = sort(torch.tensor([[2, 0], [0, 3], [2, 2]]), 4)
    assert layout.slots.tolist() == [1, 2, 0, 4, 5, 3]
    assert layout.offsets.tolist() == [0, 2, 2, 5, 6]
    assert layout.slots.dtype == layout.offsets.dtype == layout.ids.dtype == torch.int32
    assert (layout.tokens, layout.top_k, layout.experts) == (3, 2, 4)


@sorts
@pytest.mark.parametrize("absent", [-1, -(2**40), 4, 5, 2**31, 2**32, 2**32 + 1, 2**40])
def test_ids_outside_the_experts_are_absent(absent: int, sort: Sort) -> None:
    layout = sort(torch.tensor([[1, absent], [absent, 1]]), 4)
    assert layout.offsets.tolist() == [0, 0, 2, 2, 2]
    assert layout.slots[:2].tolist() == [0, 3]
    assert all(not 0 <= expert < 4 for expert in (int(layout.ids[0, 1]), int(layout.ids[1, 0])))


@sorts
def test_no_slots(sort: Sort) -> None:
    layout = sort(torch.empty(0, 2, dtype=torch.int64), 8)
    assert (layout.tokens, layout.slots.numel(), layout.offsets.tolist()) == (0, 0, [0] * 9)


@sorts
def test_all_slots_absent(sort: Sort) -> None:
    assert sort(torch.full((3, 2), -1), 4).offsets.tolist() == [0] * 5


@sorts
@given(st.integers(1, 9), st.lists(st.tuples(*[st.integers(-2, 10)] * 3), max_size=20))
def test_layout_holds_every_present_slot_once(sort: Sort, experts: int, ids: list[tuple[int, int, int]]) -> None:
    layout = sort(torch.tensor(ids, dtype=torch.int64).reshape(-1, 3), experts)
    flat = [expert for row in ids for expert in row]
    offsets = layout.offsets.tolist()
    for expert in range(experts):
        mine = layout.slots[offsets[expert] : offsets[expert + 1]].tolist()
        assert mine == [slot for slot, seen in enumerate(flat) if seen == expert]
    assert offsets[-1] == sum(0 <= expert < experts for expert in flat)


@sorts
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype: torch.dtype, sort: Sort) -> None:
    ids = torch.tensor([[1, 0], [100, 1]], dtype=dtype)
    assert sort(ids, 2).slots[:3].tolist() == [1, 0, 3]
    assert sort(ids, 512).slots.tolist() == [1, 0, 3, 2]


@sorts
@pytest.mark.parametrize("ids", [torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64),
                                 torch.zeros(4, 2, dtype=torch.bool)])  # fmt: skip
def test_sort_slots_refuses(ids: torch.Tensor, sort: Sort) -> None:
    with pytest.raises(InputError, match="expected integers"):
        sort(ids, 4)
