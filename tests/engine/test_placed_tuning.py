"""Layers on two devices that are tuned when a model is loaded: both shares, and the line on sending weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tables import LAYER, decided
from tests.engine.test_devices import registry
from tests.engine.test_group import Ranks
from tests.fake_gpus import H200, Gpus, fresh
from tilecast.autotune.gate import Verdict
from tilecast.autotune.routing_profiles import RoutingProfile
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cache_store.memory import MemoryStore
from tilecast.engine import runtime, tuning
from tilecast.engine.agreement import startup
from tilecast.engine.group import Group
from tilecast.engine.placed_choice import Shares, shares_of
from tilecast.engine.streaming import BreakEven, break_even_line, may_stream, stream_from
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment, cuda_environment
from tilecast.evidence import TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig
from tilecast.settings import Settings, TuneSettings

__all__ = ["fresh"]

HERE = cpu_environment()
SHARES = shares_of(LAYER, 1)
ONE, THREE = SHARES.near, SHARES.far


class Constant:
    """A measurer of no device: every config is right, and takes as long as its GEMM has experts."""

    def __init__(self) -> None:
        self.prepared: list[ExpertLayer] = []

    def prepare(self, gemm: ExpertGemm) -> None:
        self.prepared.append(gemm.layer)

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> Verdict:
        return Verdict(error_ratio=1.0)

    def sample(self, gemm: ExpertGemm, tokens: int, config: TileConfig, *, round: int, count: int) -> tuple[float, ...]:
        return (float(gemm.layer.experts),) * count

    def release(self, gemm: ExpertGemm) -> None:
        pass


@pytest.fixture
def gpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch, H200)


def kernels() -> Registry:
    return registry()


def start(folder: Path, placed: list[Shares] | None, measurer: Constant, **options: Any) -> Runtime:
    settings = Settings(cache_dir=folder / "cache", policy="fastest", **options)
    return startup(
        [], settings, group=Group.alone(), registry=kernels(), store=MemoryStore(), measurer=measurer, budget_s=4,
        placed=placed,
    )  # fmt: skip


def tuned(table: TuningTable) -> set[tuple[str, ExpertLayer, int]]:
    kinds = {environment.digest: environment.device_kind for environment in table.environments}
    return {(kinds[d.environment], d.layer, d.bucket.tokens) for d in table.decisions}


def test_both_shares_are_tuned_each_for_where_it_may_run(gpu: Gpus, tmp_path: Path) -> None:
    assert ONE is not None and THREE is not None
    path = tmp_path / "both.db"
    asked = TuneSettings(tokens=(1, 4))
    found = start(tmp_path, [SHARES], Constant(), tune=asked, export_to=str(path))
    assert found.environment == cuda_environment()
    wanted = {
        (kind, layer, count) for kind, layer in (("cuda", ONE), ("cuda", THREE), ("cpu", THREE)) for count in (1, 4)
    }
    assert tuned(found.table) == tuned(import_table(path)) == wanted
    far = runtime.current("cpu")
    assert far.environment == HERE and far.lookup(THREE, 3).hit and found.lookup(ONE, 3).hit
    # The second start finds all of it.
    again = Constant()
    start(tmp_path, [SHARES], again, tune=asked, import_from=str(path))
    assert again.prepared == []


def test_what_a_table_for_cpus_lacks_is_tuned_for_the_gpu_all_the_same(gpu: Gpus, tmp_path: Path) -> None:
    assert THREE is not None
    path = tmp_path / "far.db"
    export_table(decided(THREE, tokens=(4,), policy="fastest"), path)
    found = start(tmp_path, [SHARES], Constant(), tune=TuneSettings(tokens=(4,)), import_from=str(path))
    assert found.environment.device_kind == "cuda"
    assert tuned(found.table) == {("cuda", ONE, 4), ("cuda", THREE, 4), ("cpu", THREE, 4)}


def test_on_the_cpu_both_shares_are_one_plan(tmp_path: Path) -> None:
    whole = replace(LAYER, intermediate=64)
    settings = Settings(cache_dir=tmp_path / "cache", policy="fastest", tune=TuneSettings(tokens=(2,)))
    found = startup(
        [whole], settings, group=Group.alone(), registry=kernels(), environment=HERE, store=MemoryStore(),
        measurer=Constant(), budget_s=4, placed=[SHARES, shares_of(LAYER, 4)],
    )  # fmt: skip
    assert tuned(found.table) == {("cpu", layer, 2) for layer in (whole, ONE, THREE, LAYER)}


def test_shares_are_tuned_with_their_own_counts(gpu: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ONE is not None and THREE is not None
    counts = tmp_path / "counts.json"
    counts.write_text('{"counts": [1, 90, 0, 9]}')
    seen: list[RoutingProfile] = []
    before = tuning.tune_missing

    def watched(*given: Any, **options: Any) -> TuningTable:
        seen.append(options["profile"])
        return before(*given, **options)

    monkeypatch.setattr(tuning, "tune_missing", watched)
    found = start(tmp_path, [SHARES], Constant(), tune=TuneSettings(tokens=(4,)), routing=str(counts))
    assert {d.routing for d in found.table.decisions} == {found.routing} and found.routing.startswith("histogram:")
    assert len(seen) == 2
    for profile in seen:
        assert profile.probabilities(ONE).tolist() == pytest.approx([0.9, *[0.1 / 3] * 3])
        assert profile.probabilities(THREE).tolist() == pytest.approx([0.01, 0, 0.09, 0.9])


def test_ranks_tune_the_shares_of_all_of_them(gpu: Gpus, tmp_path: Path) -> None:
    uneven = (SHARES, shares_of(LAYER, 3))
    settings = Settings(cache_dir=tmp_path / "cache", policy="fastest", tune=TuneSettings(tokens=(4,)))

    def begin(group: Group) -> tuple[str, set[tuple[str, ExpertLayer, int]]]:
        found = startup(
            [], settings, group=group, registry=kernels(), store=MemoryStore(), measurer=Constant(), budget_s=4,
            placed=[uneven[group.rank]],
        )  # fmt: skip
        return found.table.digest, tuned(found.table)

    first, second = Ranks(2).run(begin)
    assert first == second and isinstance(first, tuple)
    layers = [layer for shares in uneven for layer in shares[1:] if layer is not None]
    far = [shares.far for shares in uneven]
    assert first[1] == {("cuda", layer, 4) for layer in layers} | {("cpu", layer, 4) for layer in far}


# Sending weights ------------------------------------------------------------------------------------------------


def timed(table: TuningTable, us: float) -> TuningTable:
    return TuningTable(
        table.environments,
        tuple(
            replace(d, **{name: replace(getattr(d, name), p50_us=us, default_us=us) for name in ("up", "down")})
            for d in table.decisions
        ),
    )


def test_under_reproducible_nothing_is_sent_between_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ONE is not None and THREE is not None
    device = torch.device("cpu")
    monkeypatch.setattr("tilecast.engine.streaming.copy_rate", lambda near: 1e12)
    table = timed(decided(ONE, LAYER, tokens=(1, 16)), 1.0).merged(timed(decided(THREE, tokens=(1, 16)), 1e6))
    near = runtime.use_table(table)
    far = near.with_environment(HERE)
    assert may_stream(near, far, SHARES) and stream_from(near, far, SHARES, device) == 1
    assert not may_stream(near, far, shares_of(LAYER, 4)), "there is nothing to send"
    monkeypatch.setattr("tilecast.engine.streaming.classes_of", lambda where, layer: (str(where is far), ""))
    assert not may_stream(near, far, SHARES) and stream_from(near, far, SHARES, device) is None
    assert may_stream(near.with_policy("fastest"), far.with_policy("fastest"), SHARES)


def test_a_load_says_when_sending_weights_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_models import save_tiny
    from tilecast.engine.load import load_model
    from tilecast.engine.placed_model import placed_modules

    folder = save_tiny("mixtral", tmp_path / "model")
    whole = ExpertLayer(hidden=64, intermediate=48, experts=8, top_k=2, dtype="fp32")
    shares = shares_of(whole, 3)
    assert shares.near is not None and shares.far is not None
    table = timed(decided(shares.near, whole, tokens=(1, 64)), 1.0).merged(
        timed(decided(shares.far, tokens=(1, 64)), 1e6)
    )
    path = tmp_path / "table.db"
    export_table(table, path)
    monkeypatch.setattr("tilecast.engine.streaming.copy_rate", lambda near: 5e10)

    def lines() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "tilecast"):
            loaded = load_model(folder, dtype="float32", device="cpu", gpu_experts=3, table=str(path))
        froms.append([state.stream_from for state in placed_modules(loaded.model)])
        return [record.getMessage() for record in caplog.records if "sending" in record.getMessage()]

    froms: list[list[int | None]] = []
    sent = BreakEven(tokens=1, bytes=5 * 3 * 64 * 48 * 4, bytes_per_second=5e10)
    assert lines() == [break_even_line(shares, sent)]
    monkeypatch.setattr("tilecast.engine.streaming.classes_of", lambda where, layer: (str(layer.experts), ""))
    assert lines() == [
        f"{break_even_line(shares, sent)}; they stay far, as under reproducible bits must not depend on the number of "
        "tokens"
    ]
    assert froms == [[1, 1], [None, None]]
