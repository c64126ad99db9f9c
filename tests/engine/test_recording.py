from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.tables import LAYER, decided, inputs, weights
from tilecast.autotune.record import Calls, Load, read_record
from tilecast.autotune.routing_profiles import load_profile, parse_profile
from tilecast.engine import recording
from tilecast.engine.agreement import startup
from tilecast.engine.experts import prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.group import Group
from tilecast.engine.recording import Recorder
from tilecast.engine.runtime import current, use_table
from tilecast.engine.table_runtime import Runtime, missing_buckets
from tilecast.engine.tuning import tune_missing
from tilecast.environment import cpu_environment
from tilecast.errors import CoverageError, InputError
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.settings import Settings, child_environment


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    yield
    recording.stop()


def routed(table: TuningTable, routing: str) -> TuningTable:
    return TuningTable(table.environments, tuple(replace(d, routing=routing) for d in table.decisions))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_serving_writes_calls_misses_and_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "seen.json"
    monkeypatch.setenv("TM_GEMM_RECORD", str(path))
    use_table(decided(LAYER, tokens=(1, 4)))
    w13, w2, *_ = weights(LAYER)
    experts = prepare_experts(w13, w2, top_k=2)
    slots = [0, 0, 0, 0]
    for tokens in (4, 4, 9):
        hidden, ids, scales = inputs(LAYER, tokens)
        with torch.inference_mode(tokens == 4):
            experts(hidden, ids, scales)
        for expert in ids.flatten().tolist():
            slots[expert] += 1
    experts(torch.zeros(3, 64), torch.tensor([[0, -1], [3, 7], [1, 0]]), torch.ones(3, 2))
    recording.stop()
    seen = read_record(path).of(LAYER)
    assert seen is not None
    assert seen.tokens == {3: Calls(1, 0), 4: Calls(2, 0), 9: Calls(1, 1)}
    assert seen.missed == {9: 1} and seen.shares == {3: 0.25, 4: 0.5, 9: 0.25}
    assert seen.loads == (Load((slots[0] + 2, slots[1] + 1, slots[2], slots[3] + 1), absent=2),)
    assert load_profile(str(path)).probabilities(LAYER)[0] == pytest.approx(seen.loads[0].slots[0] / (sum(slots) + 4))


def test_equal_layers_of_a_model_are_counted_apart_and_compiled_ones_too(tmp_path: Path) -> None:
    recording.start(str(tmp_path / "seen.json"))
    use_table(None, settings=Settings(cache_dir=tmp_path, record_to=str(tmp_path / "seen.json")))
    first, second = weights(LAYER, 0), weights(LAYER, 1)
    hidden, scales = torch.zeros(2, 64), torch.ones(2, 2)
    fused_experts(hidden, first.w13, first.w2, torch.tensor([[0, 1], [0, 1]]), scales)
    prepared = prepare_experts(second.w13, second.w2, top_k=2)
    compiled = torch.compile(prepared, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(hidden, torch.tensor([[2, 3], [2, 3]]), scales)
    recording.stop()
    seen = read_record(tmp_path / "seen.json").of(LAYER)
    assert seen is not None and seen.tokens == {2: Calls(3, 3)}
    assert seen.loads == (Load((2, 2, 0, 0)), Load((0, 0, 4, 4)))


def test_it_is_written_once_per_interval_and_at_the_end(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "seen.json"
    recorder = Recorder(path, interval_s=60, clock=clock)
    ids = torch.zeros(1, 2, dtype=torch.int32)
    recorder.count(LAYER, ids, hit=True, place=0)
    clock.now = 59
    recorder.count(LAYER, ids, hit=True, place=0)
    assert not path.exists()
    clock.now = 60
    recorder.count(LAYER, ids, hit=True, place=0)
    assert read_record(path).layers[0].calls == 3
    clock.now = 100
    recorder.count(LAYER, ids, hit=True, place=0)
    assert read_record(path).layers[0].calls == 3
    recorder.flush()
    assert read_record(path).layers[0].calls == 4 and read_record(path).seconds == 100
    path.unlink()
    recorder.flush()
    assert not path.exists(), "nothing new was counted"
    assert list(tmp_path.iterdir()) == []


def test_counts_stay_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recording, "MAX_COUNTS", 3)
    monkeypatch.setattr(recording, "MAX_PLACES", 2)
    recorder = Recorder(tmp_path / "seen.json")
    for tokens in (3, 5, 7, 9, 10, 16, 33, 3):
        recorder.count(LAYER, torch.zeros(tokens, 2, dtype=torch.int32), hit=True, place=tokens)
    seen = recorder.record().layers[0]
    assert {count: calls.calls for count, calls in seen.tokens.items()} == {3: 2, 5: 1, 7: 1, 16: 3, 64: 1}
    assert seen.loads == (Load((12, 0, 0, 0)), Load((10, 0, 0, 0)))


def test_nothing_touches_a_stream_that_is_being_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    recorder = Recorder(tmp_path / "seen.json", interval_s=0)
    ids = torch.zeros(1, 2, dtype=torch.int32).as_subclass(OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    recorder.count(LAYER, ids, hit=True, place=0)
    assert recorder.record().layers == () and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    recorder.count(LAYER, ids, hit=True, place=0)
    assert recorder.record().layers[0].calls == 1


def test_a_disk_that_fails_ends_recording_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    recorder = Recorder(tmp_path / "file" / "seen.json", interval_s=1, clock=clock)
    with caplog.at_level(logging.WARNING):
        for second in range(2, 9, 2):
            clock.now = second
            recorder.count(LAYER, torch.zeros(1, 2, dtype=torch.int32), hit=True, place=0)
        recorder.flush()
    assert len(caplog.records) == 1 and "serving goes on" in caplog.text


def test_ranks_write_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    recording.start(str(tmp_path / "seen.json"))
    recorder = recording.active()
    assert recorder is not None
    recorder.count(LAYER, torch.zeros(1, 2, dtype=torch.int32), hit=True, place=0)
    recording.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json.rank1"]
    written = json.loads((tmp_path / "seen.json.rank1").read_text())
    assert (written["rank"], written["world_size"]) == (1, 2)


def test_a_process_that_ends_writes_what_it_counted(tmp_path: Path) -> None:
    code = (
        "import torch, tilecast\n"
        "tilecast.startup(())\n"
        "w13, w2 = torch.randn(4, 192, 64), torch.randn(4, 64, 96)\n"
        "tilecast.fused_experts(torch.randn(2, 64), w13, w2, torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2))\n"
    )
    environ = child_environment({"TM_GEMM_RECORD": "seen.json", "TILECAST_CACHE_DIR": str(tmp_path / "cache")})
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environ, timeout=100)
    seen = read_record(tmp_path / "seen.json").layers[0]
    assert seen.tokens == {2: Calls(1, 1)} and seen.loads == (Load((1, 1, 1, 1)),)


# The table's routing profile ----------------------------------------------------------------------------------


def test_a_table_is_used_for_the_routing_that_it_was_tuned_for() -> None:
    here = use_table(routed(decided(LAYER), "zipf:1.2"))
    assert here.routing == "zipf:1.2" and here.lookup(LAYER, 4).hit
    asked = use_table(routed(decided(LAYER), "zipf:1.2"), routing="uniform")
    assert "decided for reproducible/zipf:1.2 only" in asked.lookup(LAYER, 4).reason


def test_routing_follows_the_policy_that_is_asked_for() -> None:
    uniform, skewed = decided(LAYER), routed(decided(LAYER, policy="fastest"), "zipf:2")
    table = TuningTable(uniform.environments, (*uniform.decisions, *skewed.decisions))
    here = use_table(table, policy="reproducible")
    assert here.routing == "uniform" and here.with_policy("fastest").routing == "zipf:2"
    assert here.with_policy("fastest").lookup(LAYER, 4).hit


def test_several_routings_in_a_table_need_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = routed(decided(LAYER), "zipf:1"), routed(decided(LAYER), "zipf:2")
    table = TuningTable(one.environments, (*one.decisions, *two.decisions))
    with pytest.raises(CoverageError, match="zipf:1, zipf:2; set TM_GEMM_ROUTING"):
        use_table(table)
    monkeypatch.setenv("TM_GEMM_ROUTING", "zipf:2.0")
    assert use_table(table).routing == "zipf:2"
    assert startup((), group=Group.alone()).routing == "zipf:2", "the start-up follows the variable, too"
    monkeypatch.setenv("TM_GEMM_ROUTING", "zipf:x")
    with pytest.raises(InputError, match="zipf:x"):
        use_table(table)
    assert current().routing == "zipf:2"


def test_what_a_histograms_table_lacks_is_tuned_with_its_counts_only(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text('{"counts": [9, 1, 1, 1]}')
    profile = load_profile(str(path))
    here = Runtime(routed(decided(LAYER, tokens=(1,)), profile.name), environment=cpu_environment(), registry=registry)
    missing = {LAYER: missing_buckets(here, LAYER, [1])}
    assert tune_missing(here, missing, None, Group.alone(), profile=profile) == here.table
    with pytest.raises(InputError, match="by name only"):
        tune_missing(here, {LAYER: missing_buckets(here, LAYER, [4])}, None, Group.alone())
    with pytest.raises(InputError, match="its profile is zipf:1"):
        tune_missing(
            here, {LAYER: missing_buckets(here, LAYER, [4])}, None, Group.alone(), profile=parse_profile("zipf:1")
        )
