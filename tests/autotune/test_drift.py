from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.autotune.shared import HERE
from tilecast.autotune.drift import drift_from_file, drifts
from tilecast.autotune.record import Calls, LayerRecord, Load, ServingRecord
from tilecast.autotune.routing_profiles import histogram_of, parse_profile
from tilecast.engine import runtime
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.problem import Bucket, ExpertLayer
from tilecast.settings import Settings

LAYER = ExpertLayer(hidden=64, intermediate=96, experts=8, top_k=2)
HALF = replace(LAYER, experts=4, global_experts=8)


def decided(layer: ExpertLayer, *routings: str) -> list[Decision]:
    choices = []
    for gemm in layer.gemms:
        config = registry.default_kernel(gemm, HERE).default(gemm, 4, HERE)
        choices.append(Choice(config=config, p50_us=1.0, default=config, default_us=1.0))
    return [
        Decision(
            environment=HERE.digest, layer=layer, bucket=Bucket(above=0, tokens=4), policy="reproducible",
            up=choices[0], down=choices[1], routing=routing,
        )
        for routing in routings
    ]  # fmt: skip


def recorded(layer: ExpertLayer, *loads: Load) -> ServingRecord:
    return ServingRecord(layers=(LayerRecord(layer=layer, tokens={4: Calls(1, 0)}, loads=loads),))


def drawn(layer: ExpertLayer, routing: str, tokens: int) -> Load:
    """Return the loads of tokens that choose as the tuner draws them."""
    weights = parse_profile(routing).log_weights(layer)
    gumbel = -torch.empty(tokens, len(weights), dtype=torch.float64).exponential_().log()
    counts = torch.bincount((weights + gumbel).topk(layer.top_k).indices.flatten(), minlength=len(weights))
    return Load(tuple(counts[: layer.experts].tolist()), int(counts[layer.experts :].sum()))


HOT = Load((900, 20, 20, 20, 10, 10, 10, 10))


@pytest.mark.parametrize("layer", [LAYER, HALF], ids=["all experts", "half of them"])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2"])
@pytest.mark.parametrize("tokens", [20, 20_000])
def test_what_goes_as_expected_is_not_spoken_of(layer: ExpertLayer, routing: str, tokens: int) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        record = recorded(layer, drawn(layer, routing, tokens), drawn(layer, routing, tokens))
        assert drifts(decided(layer, routing), record) == []


def test_a_hot_expert_is_no_uniform_load(tmp_path: Path) -> None:
    (drift,) = drifts(decided(LAYER, "uniform"), recorded(LAYER, HOT))
    assert (drift.layer, drift.routing) == (LAYER, "uniform")
    assert (drift.busiest, drift.expected, drift.moved) == pytest.approx((0.9, 0.125, 0.775))
    torch.manual_seed(2)
    (skewed,) = drifts(decided(LAYER, "uniform"), recorded(LAYER, drawn(LAYER, "zipf:1.2", 5000)))
    assert skewed.moved > 0.2
    assert drifts(decided(LAYER, "uniform"), recorded(LAYER, Load((3, 0, 0, 0, 0, 0, 0, 1)))) == [], "too few to tell"


def test_the_nearest_of_several_profiles_counts_and_what_is_not_known_does_not() -> None:
    torch.manual_seed(3)
    record = recorded(LAYER, drawn(LAYER, "zipf:1.2", 5000))
    assert drifts(decided(LAYER, "uniform", "zipf:1.2"), record) == []
    assert drifts(decided(LAYER, histogram_of(record).name), record) == []
    assert drifts(decided(LAYER, "histogram:0123456789abcdef"), record) == []
    assert drifts(decided(replace(LAYER, hidden=32), "uniform"), record) == []
    assert drifts(decided(LAYER, "uniform"), ServingRecord(layers=())) == []


def test_the_line_is_logged_when_a_table_is_put_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "seen.json"
    table = TuningTable((HERE,), tuple(decided(LAYER, "uniform")))
    assert drift_from_file(table.decisions, None) is None and drift_from_file(table.decisions, str(path)) is None
    path.write_text("no record")
    assert drift_from_file(table.decisions, str(path)) is None
    path.write_text(json.dumps(recorded(LAYER, HOT).to_json()))
    settings = replace(Settings.from_environment({}), record_to=str(path))
    try:
        with caplog.at_level(logging.WARNING):
            runtime.use_table(table, environment=HERE, settings=settings)
    finally:
        runtime.forget_table()
        runtime.recording.stop()
    (line,) = [message for message in caplog.messages if "recorded other loads" in message]
    assert "90.0%, expected 12.5%" in line and f"--routing {path}" in line
