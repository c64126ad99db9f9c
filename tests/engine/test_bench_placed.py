"""A layer with its experts on two devices in the benchmark: what is timed, counted and shown. No times are judged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.engine.test_bench import LAYER, LAYERS, PEAKS
from tilecast.cli._bench_tables import show_placed
from tilecast.cli._output import Output
from tilecast.engine.bench import bench_layer, make_operands, make_weights
from tilecast.engine.bench_placed import FAR_SHARE, NEAR_SHARE, BenchedPlacement, crossing_bytes
from tilecast.engine.bench_result import DEFAULT, OURS, BenchResult
from tilecast.engine.placed_choice import shares_of
from tilecast.engine.runtime import default_registry
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer

CPU = torch.device("cpu")


def bench(layer: ExpertLayer, *numbers: int, tokens: tuple[int, ...] = (1, 7)) -> BenchResult:
    return bench_layer(
        layer, tokens, peers=[], rounds=2, budget_s=20, threads=1, peaks=PEAKS,
        placed=[shares_of(layer, number) for number in numbers],
    )  # fmt: skip


def placement(layer: ExpertLayer, number: int) -> BenchedPlacement:
    runtime = Runtime(TuningTable(), environment=cpu_environment(), registry=default_registry())
    with torch.no_grad():
        return BenchedPlacement(shares_of(layer, number), make_weights(layer), runtime, CPU)


@pytest.mark.parametrize("layer", [replace(LAYER, dtype="fp32"), LAYERS[2]], ids=lambda layer: layer.label)
def test_two_devices_are_timed_beside_one(layer: ExpertLayer) -> None:
    result = bench(layer, 1, 0, 4)
    expert = sum(gemm.weight_bytes(1) for gemm in layer.gemms)
    for point in result.points:
        assert [timing.name for timing in point.timings] == [OURS, DEFAULT], "placements are no peers"
        for placed, number in zip(point.placed, (1, 0, 4), strict=True):
            assert (placed.near_experts, placed.near, placed.far) == (number, "cpu", "cpu")
            # With the columns that the kernel pads every expert to.
            assert placed.near_bytes * (4 - number) == placed.far_bytes * number
            assert 4 * expert <= placed.near_bytes + placed.far_bytes < 5 * expert
            assert (placed.near_share is None, placed.far_share is None) == (number == 0, number == 4)
            assert all(timing.status == "ok" and len(timing.samples_us) == 2 for timing in placed.timings)
            # One class, one result: the gate sees the same error.
            assert placed.both.error_ratio == placed.alone.error_ratio == point.timings[0].error_ratio
            assert placed.ratio is not None and placed.ratio > 0 and placed.stream_from is None
    first = json.loads(json.dumps(result.to_json(), allow_nan=False))["points"][0]
    assert first["placed"][0]["both"]["p50_us"] > 0 and first["placed"][1]["near_share"] is None
    assert result.points[1].placed[0].crossing_bytes > result.points[0].placed[2].crossing_bytes == 0


def test_the_shares_are_parts_of_the_whole() -> None:
    layer = replace(LAYER, dtype="fp32", bias=True)
    given = make_operands(layer, 9, seed=1)
    found = {
        one.name: one.bind(given.hidden, given.ids, given.scale)()
        for one in placement(layer, 1).enter(lambda hidden, ids, scale: lambda: hidden)
        if one.bind is not None
    }
    assert all(bool(found[name].abs().amax() > 0) for name in (NEAR_SHARE, FAR_SHARE))
    torch.testing.assert_close(found[NEAR_SHARE] + found[FAR_SHARE], found["two devices"], rtol=1e-5, atol=1e-5)


def test_a_short_share_ends_no_other_contestants_race() -> None:
    from tilecast.engine.bench_contestant import Contestant, hopeless

    whole, slow = Contestant(name="whole", samples_us=[100.0] * 3), Contestant(name="slow", samples_us=[1001.0] * 3)
    share = Contestant(name="share", share=True, samples_us=[1.0] * 3)
    assert not hopeless(whole, [whole, slow, share]) and hopeless(slow, [whole, slow, share])
    assert not hopeless(share, [share])


def test_what_crosses_is_counted() -> None:
    ids = torch.tensor([[0, 3], [0, 1], [0, -1]], dtype=torch.int32)
    asked = ids.numel() * 8
    assert crossing_bytes(LAYER, ids, 4, streamed=False) == 0
    # Two rows of bf16 there; two results in float32 and their places back.
    assert crossing_bytes(LAYER, ids, 1, streamed=False) == asked + 2 * 64 * 2 + 2 * 64 * 4 + 2 * 8
    assert crossing_bytes(LAYER, ids, 2, streamed=False) == asked + 64 * 2 + 64 * 4 + 8
    assert crossing_bytes(LAYER, ids, 1, streamed=True) == asked + 2 * 3 * 64 * 96 * 2


def test_a_share_of_a_layer_is_not_placed() -> None:
    with pytest.raises(UsageError, match="only whole layers are placed"):
        placement(LAYERS[-1], 1)


def test_tables_show_both_devices(capsys: pytest.CaptureFixture[str]) -> None:
    show_placed(Output(), bench(replace(LAYER, dtype="fp32"), 1, 4, tokens=(3,)), ["one line"])
    out = capsys.readouterr().out
    assert "1 expert near (cpu, 0.1 MiB), the others far (cpu, 0.2 MiB): median µs" in out
    assert all(name in out for name in ("one device", "two devices", "near share", "far share", "KiB across"))
    assert out.count("—") == 1, "there is no far share where all experts are near"
    assert out.rstrip().endswith("one line")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_and_the_cpu_are_timed_beside_the_gpu() -> None:
    for point in bench(replace(LAYER, dtype="fp32"), 2).points:
        (placed,) = point.placed
        assert placed.near.startswith("cuda") and placed.far == "cpu"
        assert all(timing.status == "ok" for timing in placed.timings)
