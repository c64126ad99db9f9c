from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune.draws import routed_ids, typical_counts, uniform_ids
from tilecast.autotune.gate import GATE_SEED, Gate
from tilecast.autotune.plan import Plan, make_plan
from tilecast.autotune.record import Calls, LayerRecord, Load, ServingRecord, edges_for, rank_path, read_record
from tilecast.autotune.routing_profiles import (
    UNIFORM,
    RoutingProfile,
    histogram_of,
    load_profile,
    parse_profile,
    plain_histogram,
)
from tilecast.autotune.workload import Workload
from tilecast.errors import InputError
from tilecast.problem import ExpertLayer

WIDE = ExpertLayer(hidden=32, intermediate=32, experts=64, top_k=8)
SHARE = ExpertLayer(hidden=32, intermediate=32, experts=4, top_k=2, global_experts=64)
HOT = plain_histogram([97, 1, 1, 1])


def record(*loads: Load, layer: ExpertLayer = LAYER, **fields: int) -> ServingRecord:
    seen = LayerRecord(layer=layer, tokens={4: Calls(3, 1), 64: Calls(1, 1)}, loads=loads)
    return ServingRecord(layers=(seen,), **fields)


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_one_exponent_has_one_name() -> None:
    assert parse_profile("zipf:1.20") == parse_profile("zipf:1.2") and parse_profile("zipf:1.20").name == "zipf:1.2"
    assert parse_profile("zipf:2.0").name == "zipf:2" and parse_profile("zipf:10").name == "zipf:10"
    assert parse_profile("uniform") is UNIFORM


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("skewed", "expected uniform, zipf:S"),
        ("zipf", "neither a known name nor a file|expected uniform"),
        ("zipf:", "a decimal above 0"),
        ("zipf:0", "a decimal above 0"),
        ("zipf:0.000", "a decimal above 0"),
        ("zipf:-1", "a decimal above 0"),
        ("zipf:inf", "a decimal above 0"),
        ("zipf:nan", "a decimal above 0"),
        ("zipf:1e3", "a decimal above 0"),
        ("histogram:0123456789abcdef", "by name only"),
    ],
)
def test_wrong_names_are_refused_in_one_line(text: str, words: str) -> None:
    for parse in (parse_profile, load_profile):
        with pytest.raises(InputError, match=words) as caught:
            parse(text)
        assert "\n" not in str(caught.value)


def test_zipf_falls_with_rank_and_the_popular_expert_is_this_ranks() -> None:
    profile = parse_profile("zipf:1.5")
    chances = profile.probabilities(WIDE)
    assert float(chances.sum()) == pytest.approx(1)
    ordered = chances.sort(descending=True).values
    assert float(ordered[0] / ordered[3]) == pytest.approx(4**1.5)
    assert chances.tolist() != ordered.tolist(), "which expert is popular is to be no matter of its number"
    shared = profile.probabilities(SHARE)
    assert int(shared.argmax()) < SHARE.experts
    # Dealt out in turn: of 64 experts this rank of 16 has popularity 1, 17, 33 and 49.
    mine = shared[:4].sort(descending=True).values
    assert [float(mine[0] / chance) for chance in mine] == pytest.approx([1, 17**1.5, 33**1.5, 49**1.5])


@pytest.mark.parametrize("layer", [LAYER, WIDE, SHARE])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_skewed_routing_has_distinct_experts_and_is_typical(layer: ExpertLayer, tokens: int) -> None:
    profile = parse_profile("zipf:1.2")
    draws = [routed_ids(layer, tokens, seed, profile) for seed in range(8)]
    for ids in draws:
        assert ids.dtype == torch.int32 and ids.shape == (tokens, layer.top_k)
        assert int(ids.min()) >= 0 and int(ids.max()) < layer.global_experts
        assert all(len(set(row)) == layer.top_k for row in ids.tolist())
        assert bool((ids < layer.experts).any())
    assert torch.equal(draws[0], routed_ids(layer, tokens, 0, profile))
    counts = [torch.bincount(ids.flatten(), minlength=layer.global_experts)[: layer.experts] for ids in draws]
    active = [int((count > 0).sum()) for count in counts]
    assert max(active) - min(active) <= 2
    busiest = [int(count.max()) for count in counts]
    assert max(busiest) - min(busiest) <= 2 + max(busiest) // 8


def test_skew_reaches_fewer_experts_than_uniform_routing() -> None:
    def active(profile: RoutingProfile) -> int:
        return sum(count > 0 for count in typical_counts(WIDE, 16, profile))

    assert active(parse_profile("zipf:2")) < active(parse_profile("zipf:1")) < active(UNIFORM)
    assert sum(typical_counts(WIDE, 16, parse_profile("zipf:1"))) == 16 * WIDE.top_k
    assert max(typical_counts(WIDE, 64, parse_profile("zipf:1.5"))) > 3 * max(typical_counts(WIDE, 64))


def test_uniform_draws_stay_what_measurements_were_made_with() -> None:
    assert torch.equal(routed_ids(WIDE, 16, 5), uniform_ids(WIDE, 16, 5))


@pytest.mark.parametrize("slots", [(900, 400, 400, 300), (980, 980, 20, 20), (500, 500, 500, 500)])
def test_a_histogram_is_drawn_with_the_loads_that_it_counts(slots: tuple[int, ...]) -> None:
    profile = histogram_of(record(Load(slots)))
    ids = routed_ids(LAYER, 4000, 1, profile)
    drawn = torch.bincount(ids.flatten(), minlength=4) / 4000
    wanted = torch.tensor(slots) / sum(slots) * LAYER.top_k
    torch.testing.assert_close(drawn.double(), wanted.double(), atol=0.04, rtol=0)


def test_one_expert_of_top_1_takes_all_that_the_histogram_says() -> None:
    assert typical_counts(replace(LAYER, top_k=1), 10, plain_histogram([1, 0, 0, 0])) == [10, 0, 0, 0]
    # A token needs k distinct experts even where fewer were ever chosen.
    counts = typical_counts(LAYER, 10, plain_histogram([1, 0, 0, 0]))
    assert counts[0] == 10 and sum(counts) == 20


def test_places_that_differ_in_who_is_popular_do_not_look_uniform() -> None:
    loads = [Load(tuple(70 if expert == place else 10 for expert in range(4))) for place in range(4)]
    chances = histogram_of(record(*loads)).probabilities(LAYER)
    assert chances.tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])


def test_a_histograms_name_follows_from_its_counts_alone() -> None:
    one = histogram_of(record(Load((1, 2, 3, 4)), Load((4, 4, 0, 0))))
    assert one == histogram_of(record(Load((4, 4, 0, 0)), Load((1, 2, 3, 4))))
    assert one != histogram_of(record(Load((1, 2, 3, 5)), Load((4, 4, 0, 0))))
    assert one.name.startswith("histogram:") and len(one.name) == len("histogram:") + 16
    again = RoutingProfile.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one and torch.equal(again.probabilities(LAYER), one.probabilities(LAYER))
    other = replace(LAYER, hidden=32, intermediate=32)
    assert torch.equal(again.probabilities(other), one.probabilities(other)), "routing does not depend on sizes"


def test_slots_of_other_ranks_are_spread_over_their_experts() -> None:
    chances = histogram_of(record(Load((8, 4, 4, 4), absent=60), layer=SHARE)).probabilities(SHARE)
    assert float(chances[0]) == pytest.approx(0.1) and float(chances[4]) == pytest.approx(0.75 / 60)
    assert float(chances.sum()) == pytest.approx(1)


def test_a_histogram_that_says_nothing_of_a_layer_is_refused_when_the_plan_is_made() -> None:
    with pytest.raises(InputError, match="no counts for E64"):
        make_plan([WIDE], [1], HERE, routing=histogram_of(record(Load((1, 2, 3, 4)))))
    with pytest.raises(InputError, match="counts of 4 experts, but E64"):
        make_plan([WIDE], [1], HERE, routing=HOT)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"counts": [1, -1]}, "slots of an expert is -1"),
        ({"counts": [0, 0]}, "no slots of any expert"),
        ({"counts": []}, "0 experts"),
        ({"counts": [1.5]}, "is 1.5"),
        ({"loads": [1]}, "expected a file that TM_GEMM_RECORD wrote"),
        ([1], "expected a file that TM_GEMM_RECORD wrote"),
        (record(Load((0, 0, 0, 0))).to_json(), "no slots of any expert"),
        ({**record().to_json(), "version": 2}, "expected a file that TM_GEMM_RECORD wrote|version 2"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path: Path, value: object, words: str) -> None:
    path = written(tmp_path / "counts.json", value)
    with pytest.raises(InputError, match=words) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_histogram_with_the_wrong_number_of_experts_is_refused(tmp_path: Path) -> None:
    value = json.loads(json.dumps(record(Load((1, 2, 3, 4))).to_json()))
    value["layers"][0]["experts"][0]["slots"].append(7)
    with pytest.raises(InputError, match="5 counts, expected 4"):
        load_profile(str(written(tmp_path / "counts.json", value)))


def test_files_that_are_no_json_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_profile(str(tmp_path / "broken"))
    with pytest.raises(InputError, match="neither a known name nor a file"):
        load_profile(str(tmp_path / "missing"))


def test_a_record_survives_its_file_and_ranks_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    first, second = record(Load((1, 2, 3, 4)), world_size=2), record(Load((4, 3, 2, 1)), rank=1, world_size=2)
    written(path, first.to_json())
    assert read_record(path) == first
    written(rank_path(path, 1), second.to_json())
    both = read_record(path).of(LAYER)
    assert both is not None and both.missed == {4: 2, 64: 2} and both.shares == {4: 0.75, 64: 0.25}
    assert both.loads == (Load((1, 2, 3, 4)), Load((4, 3, 2, 1)))
    written(rank_path(path, 1), replace(second, world_size=4).to_json())
    with pytest.raises(InputError, match="is of rank 1 of 4, expected rank 1 of 2"):
        read_record(path)


def test_few_missed_counts_are_tuned_themselves_and_many_by_the_edges_that_cover_them() -> None:
    assert edges_for({5: 1, 3: 9}, (1, 4, 8)) == (3, 5)
    assert edges_for(dict.fromkeys(range(1, 10), 1), (1, 4, 8), most=4) == (1, 4, 8, 16)


def test_a_plan_holds_the_profile_by_name() -> None:
    plan = make_plan([LAYER], [1], HERE, routing=HOT)
    assert plan.routing == HOT.name and plan.routing_profile is HOT
    assert replace(plan, layers=()).routing == HOT.name
    assert Plan(environment=HERE, layers=(), buckets=(), routing="zipf:1.50").routing == "zipf:1.5"
    with pytest.raises(InputError, match="its profile is"):
        replace(plan, routing="zipf:2")


def test_launches_and_the_gate_are_routed_by_the_profile() -> None:
    layer = replace(LAYER, top_k=1)
    work = Workload(HERE, routing=plain_histogram([0, 0, 1, 0]))
    assert set(work.inputs(layer.up, 6, 0).route.ids.flatten().tolist()) == {2}
    kernel = TorchKernel()
    config = kernel.default(layer.up, 6, HERE)
    assert Gate(work).check(layer.up, 6, config, kernel).status == "ok"
    assert set(work.inputs(layer.up, 6, GATE_SEED).route.ids.flatten().tolist()) == {2}
