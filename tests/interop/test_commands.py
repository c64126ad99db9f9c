from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Command, table_of
from tests.interop import engines
from tests.interop.engines import H200, choice, grouped, vllm_runs
from tests.interop.test_rows import NAME, ROW, peer
from tilecast.cache_store.bundle import export_table
from tilecast.settings import Settings


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.db"
    gpu = engines.table_of({8: (choice(grouped()),) * 2, 64: (choice(grouped(swap=1, block_m=8)),) * 2})
    export_table(gpu.merged(table_of()), path)
    return path


def test_export_writes_files_and_lists_what_it_left_out(cli: Command, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    done = cli("cache", "export", tuned, out, "--format", "vllm", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert [file["path"] for file in document["files"]] == [NAME]
    reasons = [left["reason"] for left in document["left_out"]]
    assert any("swapped operands" in reason for reason in reasons)
    assert any("was tuned on a CPU" in reason for reason in reasons)
    assert vllm_runs(out, H200.device, 8, 3584, 5)["num_warps"] == 4
    shown = cli("cache", "export", tuned, out, "--format", "vllm").out
    assert shown.count("left out: ") == len(reasons)
    assert f"VLLM_TUNED_CONFIG_FOLDER={out}" in shown.replace("\n", "")
    done = cli("cache", "export", tuned, out, "--format", "sglang")
    assert done.code == 0
    assert (out / "configs" / "triton_3_5_1" / "E=8,N=3584,device_name=NVIDIA_H200_NVL_down.json").exists()
    assert cli("cache", "lint", out / "configs").code == 0


def test_export_of_nothing_usable_fails(cli: Command, table: Path, tmp_path: Path) -> None:
    done = cli("cache", "export", table, tmp_path / "out", "--format", "vllm")
    done.failed(4, "nothing that vLLM could use", "was tuned on a CPU")
    assert not (tmp_path / "out").exists()
    cli("cache", "export", table, tmp_path / "out", "--format", "turbomind").failed(2, "expected one of")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.db"
    export_table(table_of(), path)
    return path


def test_import_keeps_hints_and_names_the_refused(cli: Command, tmp_path: Path) -> None:
    peer(tmp_path / "in", NAME, {"1": ROW})
    bad = peer(tmp_path / "in", NAME.replace("E=8", "E=4"), {"1": {}})
    kept = Settings.from_environment().cache_dir / "peers" / "vllm" / NAME
    done = cli("cache", "import", "--format", "vllm", tmp_path / "in" / NAME, "--json")
    assert done.code == 0
    assert json.loads(done.out) == {
        "command": "cache import",
        "format": "vllm",
        "folder": str(kept.parents[1]),
        "files": 1,
        "rows": 1,
        "for_this_device": 0,
        "refused": [],
    }
    assert json.loads(kept.read_text()) == {"1": ROW}
    done = cli("cache", "import", "--format", "vllm", tmp_path / "in")
    assert done.code == 3
    assert [line for line in done.err.splitlines() if line] == [
        f"warning: refused: {bad}: the row of 1 lacks BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_SIZE_M"
    ]
    cli("cache", "import", "--format", "vllm", bad).failed(3, "the row of 1 lacks")
    cli("cache", "import", "--format", "vllm", bad, "--store", "x.db").failed(2, "--store")
    cli("cache", "import", bad, bad).failed(2, "2 files are given")


def test_lint_exits_with_1_when_something_is_found(cli: Command, tmp_path: Path) -> None:
    peer(tmp_path, NAME, {"1": ROW})
    done = cli("cache", "lint", tmp_path)
    assert (done.code, done.out) == (0, "1 file, 1 row: nothing wrong\n")
    peer(tmp_path, NAME.replace("H200", "H200_NVL"), {"1": {**ROW, "num_warps": 3}})
    done = cli("cache", "lint", tmp_path, "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert {name: count for name, count in document["counts"].items() if count} == {"unreachable": 1, "impossible": 1}
    cli("cache", "lint", tmp_path / "absent").failed(3, "is no folder")
    cli("cache", "lint", tmp_path, "--format", "x").failed(2, "expected one of")


def test_times_of_the_store_choose_the_shared_config(cli: Command, tmp_path: Path) -> None:
    up, down, shared = grouped(block_n=32), grouped(block_n=64), grouped(block_n=256)
    table = engines.table_of({8: (choice(up), choice(down))}, environment=replace(H200))
    times = [engines.timed(g, c, us, 8) for g in ("up", "down") for c, us in ((shared, 11.0), (up, 30.0))]
    export_table(table, tmp_path / "tuned.db", times)
    assert cli("cache", "export", tmp_path / "tuned.db", tmp_path / "out", "--format", "vllm").code == 0
    assert vllm_runs(tmp_path / "out", H200.device, 8, 3584, 8)["BLOCK_SIZE_N"] == 256


@pytest.mark.parametrize("option", [("--policy", "ours"), ("--relax", "torch"), ("--store", "store.db")])
def test_what_is_about_decisions_is_refused_for_hints(cli: Command, tmp_path: Path, option: tuple[str, str]) -> None:
    file = tmp_path / "E=8,N=64,device_name=NVIDIA_H200.json"
    file.write_text("{}")
    cli("cache", "import", file, "--format", "vllm", *option).failed(2, option[0])
