"""Programs that only register and load: what the environment variables then do, and what a user sees of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache_folders import cache_folder
from tests.engine.tables import decided
from tests.tiny_models import save_tiny
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.problem import ExpertLayer

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

LAYER = ExpertLayer(hidden=64, intermediate=48, experts=8, top_k=2, dtype="fp32")
PROGRAM = """
import sys, tilecast, torch, transformers
transformers.utils.logging.disable_progress_bar()
tilecast.register_transformers()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="tilecast")
with torch.no_grad():
    model(torch.arange(int(sys.argv[2]))[None])
print("ran")
"""


def start(folder: Path, tokens: int = 3, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program with these variables, on the thread count that this process's tables are for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TM_GEMM_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tokens)], env={**kept, **variables}, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("mixtral", tmp_path / "model")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.db"
    export_table(decided(LAYER), path)
    return path


def test_the_line_says_what_was_imported(model: Path, table: Path) -> None:
    found = start(model, TM_GEMM_IMPORT=str(table), TM_GEMM_MISS="error")
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("tilecast: ")]
    digest = import_table(table).digest[:12]
    assert f"experts of 2 of 2 layers run on Tilecast: table {digest}, 3 decisions" in line
    assert "1 of 1 distinct layers covered up to 16 tokens, policy reproducible, certificate" in line


def test_a_miss_is_refused_on_demand(model: Path, table: Path) -> None:
    found = start(model, tokens=20, TM_GEMM_IMPORT=str(table), TM_GEMM_MISS="error")
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1 and last.startswith("tilecast.errors.CoverageError: no decision for E8 H64 I48")
    assert "TM_GEMM_MISS=default" in last


@pytest.mark.parametrize("kind", ["garbage", pytest.param("missing", marks=pytest.mark.long)])
def test_a_wrong_table_is_one_clear_error(model: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.db"
    if kind == "garbage":
        path.write_text("not a table")
    found = start(model, TM_GEMM_IMPORT=str(path))
    lines = found.stderr.strip().splitlines()
    assert found.returncode == 1 and lines[-1].startswith("tilecast.errors.CacheError: ") and str(path) in lines[-1]
    assert len(lines) < 40 and found.stderr.count("Traceback") == 1


def test_a_wrong_variable_is_found_before_the_weights_are_read(model: Path) -> None:
    (model / "model.safetensors").unlink()
    found = start(model, TM_GEMM_MISS="sometimes")
    assert found.stderr.strip().splitlines()[-1].startswith("tilecast.errors.UsageError: TM_GEMM_MISS")


@pytest.mark.parametrize("variables", [{"TM_GEMM_TUNE": "seq=[1],max_iter=1,top_k=2"}], ids=["tune"])
def test_the_first_start_tunes_and_the_second_does_not(model: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    path = tmp_path / "tuned.db"
    quick = {"TM_GEMM_SANDBOX": "0", "TILECAST_CACHE_DIR": str(cache_folder(tmp_path / "cache")), **variables}
    first = start(model, TM_GEMM_EXPORT=str(path), **quick)
    assert first.returncode == 0, first.stderr
    digest = import_table(path).digest
    assert f"table {digest[:12]}" in first.stderr
    again = {"TM_GEMM_IMPORT": str(path), "TM_GEMM_EXPORT": str(tmp_path / "again.db")}
    second = start(model, **again, **{**quick, "TILECAST_CACHE_DIR": str(cache_folder(tmp_path / "empty"))})
    assert second.returncode == 0, second.stderr
    assert import_table(tmp_path / "again.db").digest == digest
    # Whatever measures keeps what it measured.
    assert not list((tmp_path / "empty").rglob("store.db"))
