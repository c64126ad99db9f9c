"""Which experts are near: numbers, auto, files and records, and one line for each that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tilecast.autotune.plan import make_plan
from tilecast.autotune.record import Calls, LayerRecord, Load, ServingRecord
from tilecast.autotune.routing_profiles import histogram_of, parse_profile, plain_histogram
from tilecast.engine.placed_choice import (
    Candidate,
    Choice,
    near_ids,
    near_numbers,
    profile_of_shares,
    read_choice,
    shares_of,
)
from tilecast.environment import cpu_environment
from tilecast.errors import InputError, TilecastError, UsageError
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
OTHER = replace(LAYER, intermediate=48)


def candidate(index: int, layer: ExpertLayer = LAYER, size: int = 100) -> Candidate:
    return Candidate(index=index, name=f"model.layers.{index}.mlp.experts", layer=layer, expert_bytes=size)


TWO = [candidate(1), candidate(3)]


def record_of(*loads: tuple[int, ...], layer: ExpertLayer = LAYER, world_size: int = 1) -> ServingRecord:
    seen = LayerRecord(layer=layer, tokens={1: Calls(3)}, loads=tuple(Load(slots) for slots in loads))
    return ServingRecord(layers=(seen,), world_size=world_size)


def saved(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_numbers_take_the_first_experts_without_counts() -> None:
    assert near_ids(read_choice(2), TWO, None) == [(0, 1), (0, 1)]
    assert near_ids(read_choice("0"), TWO, None) == [(), ()]
    assert near_ids(read_choice(4), TWO, None) == [(0, 1, 2, 3)] * 2


def test_numbers_take_the_hottest_of_each_layer(tmp_path: Path) -> None:
    counts = saved(tmp_path / "seen.json", record_of((1, 9, 0, 5), (7, 7, 0, 8)).to_json())
    assert near_ids(read_choice(2, counts), TWO, None) == [(1, 3), (0, 3)]


def test_auto_takes_as_many_of_every_layer_as_fit_together() -> None:
    layers = [candidate(0), candidate(1, OTHER, 50)]
    assert near_ids(read_choice("auto"), layers, 449) == [(0, 1), (0, 1)]
    assert near_ids(read_choice("auto"), layers, 450) == [(0, 1, 2)] * 2
    assert near_ids(read_choice("auto"), layers, 10**9) == [(0, 1, 2, 3)] * 2
    assert near_ids(read_choice("auto"), layers, -5) == [(), ()]
    with pytest.raises(InputError, match=r"layers\.0.*free memory is not known"):
        near_ids(read_choice("auto"), layers, None)


def test_a_record_takes_the_hottest_that_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "seen.json", record_of((1, 9, 0, 5), (7, 7, 0, 8)).to_json())
    assert near_ids(read_choice(path), TWO, 200) == [(1,), (3,)]


def test_a_record_of_another_dtype_or_of_tensor_parallel_ranks_counts_too() -> None:
    choice = Choice(experts=1, record=record_of((1, 9, 0, 5), (7, 7, 0, 8), layer=replace(LAYER, dtype="fp32")))
    assert near_ids(choice, TWO, None) == [(1,), (3,)]
    half = replace(LAYER, intermediate=48)
    ranks = record_of((1, 9, 0, 5), (7, 7, 0, 8), (1, 9, 20, 5), (7, 7, 0, 8), layer=half, world_size=2)
    assert near_ids(Choice(experts=1, record=ranks), TWO, None) == [(2,), (3,)]


def test_ids_by_layer_are_taken_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "ids.json", {"3": [2, 0], "1": []})
    assert near_ids(read_choice(str(path)), TWO, None) == [(), (0, 2)]
    assert near_ids(read_choice({1: [3], 3: (1, 2)}), TWO, None) == [(3,), (1, 2)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "expected ids by layer"),
        ("{}", "expected ids by layer"),
        ("7", "expected ids by layer"),
        ({"layer": [1]}, "'layer' is neither"),
        ({"1": 3}, "'1' is neither"),
        ({"1": [0.5]}, "layer 1 has 0.5, expected ids"),
        ({"1": [True]}, "layer 1 has True, expected ids"),
        ({"1": ["a"]}, "layer 1 has 'a', expected ids"),
        ('{"1": [0], "1": [1]}', "layer 1 is there twice"),
        ({"format": "tilecast-record", "version": 9}, "version 9"),
        ({"1": [0]}, "lacks layer 3 of the model"),
        ({"1": [0], "3": [0], "4": [0]}, "has layer 4 and the model has no experts there, expected 1, 3"),
        ({"1": [0, 0], "3": []}, "layers.1.mlp.experts: near expert 0 is given twice"),
        ({"1": [4], "3": []}, "near expert is 4, expected an integer from 0 to 3"),
        ({"1": [-1], "3": []}, "near expert is -1"),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(tmp_path: Path, content: object, words: str) -> None:
    path = saved(tmp_path / "ids.json", content)
    with pytest.raises(InputError) as caught:
        near_ids(read_choice(path), TWO, None)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (record_of((1, 2, 3, 4)), "counts 1 layer of E4 H64 I96 top2 bf16, the model has 2"),
        (record_of((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "counts 3 layers"),
        (record_of((1, 2), (3, 4), layer=replace(LAYER, experts=2, global_experts=4)), "it has: E2/4"),
        (record_of((1, 2, 3), (1, 2, 3), layer=replace(LAYER, experts=3)), "has no counts of E4"),
        (ServingRecord(layers=()), "it has: none"),
        (record_of((1, 2, 3, 4), (1, 2, 3, 4), layer=replace(LAYER, intermediate=48)), "has no counts of E4 H64 I96"),
        (
            record_of(*[(1, 2, 3, 4)] * 4, layer=replace(LAYER, intermediate=64), world_size=2),
            "has no counts of E4 H64 I96",
        ),
        (
            record_of(*[(1, 2, 3, 4)] * 4, layer=replace(LAYER, intermediate=48, activation="gelu"), world_size=2),
            "has no counts of E4 H64 I96",
        ),
    ],
)
def test_records_of_other_models_are_told_in_one_line(record: ServingRecord, words: str) -> None:
    with pytest.raises(InputError) as caught:
        near_ids(Choice(experts=1, record=record, source="seen.json"), TWO, None)
    assert words in str(caught.value) and "seen.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "counts", "kind", "words"),
    [
        ("-1", None, UsageError, "gpu_experts is -1, expected 0 or above"),
        ("99999999999", None, UsageError, "gpu_experts is 99999999999"),
        ("most", None, UsageError, "'most', expected a number of experts, auto, or a file"),
        ("2", "absent.json", InputError, "absent.json cannot be read"),
        ({1: [0]}, "absent.json", UsageError, "nothing to choose by counts"),
    ],
)
def test_what_cannot_be_read_is_told(asked: object, counts: str | None, kind: type[TilecastError], words: str) -> None:
    with pytest.raises(kind, match=words):
        read_choice(asked, counts)  # type: ignore[arg-type]


def test_more_experts_than_a_layer_has_are_told_with_its_name() -> None:
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts: number of near experts is 5"):
        near_ids(read_choice(5), TWO, None)


def test_numbers_are_known_without_the_model() -> None:
    layers = [(LAYER, 2)]
    assert near_numbers(read_choice(3), layers) == (3,)
    assert near_numbers(read_choice({0: [1], 1: [0, 3]}), layers) == (1, 2)
    for asked, words in (
        (read_choice(5), "gpu_experts is 5, but a layer has 4 experts"),
        (read_choice({0: [1]}), "ids for 1 layer, the model has 2"),
        (read_choice({0: [1], 1: [4]}), "layer 1: near expert is 4"),
        (read_choice({0: [1], 1: [1, 1]}), "layer 1: near expert 1 is given twice"),
    ):
        with pytest.raises(InputError, match=words):
            near_numbers(asked, layers)
    with pytest.raises(UsageError, match="give a number"):
        near_numbers(read_choice("auto"), layers)


def test_shares_are_layers_with_part_of_the_experts() -> None:
    whole, near, far = shares_of(LAYER, 1)
    assert whole == LAYER and near is not None and far is not None
    assert (near.experts, near.global_experts, far.experts, far.global_experts) == (1, 4, 3, 4)
    assert shares_of(LAYER, 0)[1:] == (None, LAYER) and shares_of(LAYER, 4)[1:] == (LAYER, None)
    with pytest.raises(InputError, match="5 cannot be near"):
        shares_of(LAYER, 5)


@pytest.mark.parametrize("plain", [False, True])
def test_a_histogram_knows_the_shares(plain: bool) -> None:
    counts = [1, 90, 0, 9]
    whole = plain_histogram(counts) if plain else histogram_of(record_of(tuple(counts)))
    shares = shares_of(LAYER, 1)
    assert shares.near is not None and shares.far is not None
    found = profile_of_shares(whole, [shares])
    assert found.name == whole.name
    near, far = found.probabilities(shares.near), found.probabilities(shares.far)
    assert near.tolist() == pytest.approx([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert far.tolist() == pytest.approx([0.01, 0.0, 0.09, 0.9])
    make_plan([shares.near, shares.far], [1], cpu_environment(), routing=found)


def test_two_equal_shares_are_one_layer_with_the_mean_of_both() -> None:
    shares = shares_of(LAYER, 2)
    assert shares.near == shares.far and shares.near is not None
    found = profile_of_shares(plain_histogram([1, 90, 0, 9]), [shares]).probabilities(shares.near)
    assert found.tolist() == pytest.approx([(0.9 + 0.01) / 2, 0.09 / 2, 0.25, 0.25])


def test_other_profiles_stay_as_they_are() -> None:
    profile = parse_profile("zipf:1.2")
    assert profile_of_shares(profile, [shares_of(LAYER, 2)]) == profile
