"""Imported configs of other engines beside ours, as `tune` and `cache explain` print them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import SPEC, Command
from tests.interop.engines import H200, LAYER, choice, grouped, table_of
from tilecast.cache_store.bundle import export_table
from tilecast.cache_store.interop.peers import PeerFolder
from tilecast.cache_store.interop.rows import read_peer
from tilecast.cli._peers import peer_lines, peer_table, peer_times, peers_json
from tilecast.evidence import Measurement
from tilecast.problem import TileConfig

ROW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
NAME = "E=8,N=3584,device_name=NVIDIA_H200.json"
DEFAULT, CHOSEN, LARGE = grouped(num_stages=2), grouped(num_stages=4), grouped(block_m=128)
TABLE = table_of({8: (choice(CHOSEN, 10, DEFAULT, 15), choice(LARGE, 20, DEFAULT, 25))})


def measured(gemm: str, config: TileConfig, us: float, run: int = 0) -> Measurement:
    chosen = LAYER.up if gemm == "up" else LAYER.down
    return Measurement(
        environment=H200.digest, gemm=chosen, tokens=8, config=config, samples_us=(us, us, us), run=run
    )  # fmt: skip


MEASUREMENTS = [
    measured("up", DEFAULT, 15), measured("up", CHOSEN, 10), measured("up", grouped(), 12.5),
    measured("up", grouped(), 40, run=1),
    measured("down", DEFAULT, 25), measured("down", LARGE, 20),
]  # fmt: skip


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    source = tmp_path / NAME
    source.write_text(json.dumps({"1": ROW, "64": {**ROW, "BLOCK_SIZE_N": 256}}))
    PeerFolder(tmp_path / "peers").keep(read_peer(source, "vllm"))
    return tmp_path / "peers"


def test_a_config_that_raced_stands_beside_the_default_and_the_chosen_one(peers: Path) -> None:
    times = peer_times(TABLE, MEASUREMENTS, peers)
    # The time of the run that decided, not of a later one; what did not race has none.
    assert [(t.baseline.gemm, t.us) for t in times] == [("up", pytest.approx(12.5)), ("down", None)]
    (shown,) = peer_table(times)
    row = [next(iter(column.cells)) for column in shown.columns]
    assert row[1:6] == ["up", "vLLM", "12.5", "15.0", "10.0"] and row[6].startswith("1.25")
    (up,), (down,) = (peer_lines(times, name) for name in ("up", "down"))
    assert f"vLLM's for 1 token in {NAME} 12.5 µs (1.250× the chosen)" in up and "did not race" in down
    assert [(p["us"], p["default_us"], p["tuned_us"]) for p in peers_json(times)] == [  # type: ignore[call-overload, index]
        (pytest.approx(12.5), 15, 10),
        (None, 25, 20),
    ]


def test_without_imported_files_nothing_is_said(tmp_path: Path) -> None:
    assert peer_times(TABLE, MEASUREMENTS, tmp_path) == [] and peer_table([]) == []


def test_explain_shows_what_an_engine_would_run(
    cli: Command, peers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(tmp_path))
    table = tmp_path / "table.db"
    export_table(TABLE, table, MEASUREMENTS)
    done = cli("cache", "explain", table, "1", "8")
    assert done.code == 0, done.err
    assert "12.5 µs (1.250× the chosen)" in done.out and "did not race" in done.out
    found = json.loads(cli("cache", "explain", table, "1", "8", "--json").out)["peers"]
    assert [(p["engine"], p["gemm"], p["row_tokens"]) for p in found] == [("vllm", "up", 1), ("vllm", "down", 1)]


def test_a_damaged_imported_file_is_a_warning_once_everything_is_measured(
    cli: Command, peers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILECAST_CACHE_DIR", str(tmp_path))
    (peers / "vllm" / NAME).write_text("{}[")
    table = tmp_path / "table.db"
    export_table(TABLE, table, MEASUREMENTS)
    done = cli("cache", "explain", table, "1", "8")
    assert done.code == 0 and NAME in done.err


def test_tune_says_nothing_of_engines_where_nothing_was_imported(cli: Command) -> None:
    done = cli("tune", SPEC, "--tokens", "2", "--budget", "0.3s", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["peers"] == []
