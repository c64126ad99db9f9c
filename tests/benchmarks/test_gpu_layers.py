"""The GPU suite's races of layers: contestants that fail, every form of layer, and figures that follow from times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.clock import CpuClock, clock_for
from benchmarks.gpu.device import Limits
from benchmarks.gpu.layers import DEFAULT, Contestant, LayerBench, derive
from benchmarks.gpu.peers import Call, FixedOperands, TorchGroupedMm, Transformers
from tests.benchmarks.test_gpu_suite import SMALL, setup_for
from tilecast.engine.peers import LayerWeights
from tilecast.problem import ExpertLayer


class Odd:
    """A peer that fails in its own way."""

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        return "not on Sundays" if self.name == "absent" else None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        if self.name == "unprepared":
            raise ValueError("cannot hold this")
        return lambda fixed: lambda: self._run(fixed)

    def _run(self, fixed: FixedOperands) -> torch.Tensor:
        if self.name == "raises":
            raise RuntimeError("boom\nand more")
        return torch.zeros_like(fixed.hidden)


def test_a_peer_that_fails_is_recorded_and_the_others_race(tmp_path: Path) -> None:
    peers = [Odd(name) for name in ("raises", "unprepared", "zeros", "absent")]
    bench = LayerBench(setup_for(tmp_path), SMALL, clock_for("cpu", tiny=True), None, peers)
    found = {c["name"]: c for c in bench.point(5)["contestants"]}
    assert (found["raises"]["status"], found["raises"]["detail"]) == ("runtime_error", "RuntimeError: boom")
    assert "cannot hold this" in found["unprepared"]["detail"]
    assert found["zeros"]["status"] == "wrong_result" and "times that of torch" in found["zeros"]["detail"]
    assert (found["absent"]["status"], found["absent"]["detail"]) == ("unavailable", "not on Sundays")
    assert all(not found[peer.name]["samples_us"] for peer in peers)
    assert len(found[DEFAULT]["samples_us"]) == 3


@pytest.mark.parametrize(
    "layer",
    [
        ExpertLayer(hidden=32, intermediate=48, experts=3, top_k=2, global_experts=8),
        ExpertLayer(hidden=32, intermediate=48, experts=4, top_k=2, activation="swiglu_oai", bias=True),
    ],
    ids=["one rank's experts", "gpt-oss"],
)
def test_peers_are_right_on_every_form_of_layer(tmp_path: Path, layer: ExpertLayer) -> None:
    peers = [TorchGroupedMm(), Transformers("grouped_mm"), Transformers("batched_mm")]
    bench = LayerBench(setup_for(tmp_path, rounds=1), layer, clock_for("cpu", tiny=True), None, peers)
    for contestant in bench.point(9)["contestants"]:
        assert contestant["status"] == "ok", contestant
        assert contestant["samples_us"]


def test_a_failure_on_a_broken_device_is_not_the_contestants() -> None:
    class Broken(CpuClock):
        def healthy(self) -> bool:
            return False

    def fails() -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        Contestant(name="x").guarded(fails, Broken(1 << 10))


def test_figures_follow_from_the_times() -> None:
    point = {
        "flops": 2e9,
        "bytes": 1e6,
        "weight_bytes": 5e5,
        "contestants": [
            {"name": DEFAULT, "p50_us": 10.0},
            {"name": "a", "p50_us": 15.0},
            {"name": "b", "p50_us": None},
        ],
    }
    found = derive(point, Limits(read_gb_s=1000.0, dense_tflop_s=400.0))
    assert (found["bound"], found["limit_us"], found["best_peer"]) == ("compute", 5.0, "a")
    assert found["contestants"][DEFAULT] == {
        "tflop_s": 200.0,
        "weights_gb_s": 50.0,
        "roofline_share": 0.5,
        "best_peer_over_this": 1.5,
    }
    assert derive(point, None)["contestants"][DEFAULT]["roofline_share"] is None
