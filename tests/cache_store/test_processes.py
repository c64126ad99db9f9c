"""Many processes on one store, and processes killed at any instant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = ("write", "export", "merge", "migrate")


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(operation: str, folder: Path, kills: int, seed: int) -> None:
    folder.mkdir()
    steps = int(run("-m", "tests.cache_store.killing", operation, folder, kills, seed).split()[0])
    # Otherwise nothing but beginnings were cut off.
    assert steps > 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_random_instants(tmp_path: Path, operation: str) -> None:
    kill(operation, tmp_path / "work", 12, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_fifty_random_instants(tmp_path: Path, operation: str) -> None:
    kill(operation, tmp_path / "work", 50, seed=2)


def together(*options: object) -> None:
    result = json.loads(run("benchmarks/store_writes.py", *options))
    assert result["cold_starts"]["failures"] == []
    assert result["writes"]["failures"] == []
    assert (result["writes"]["lost"], result["writes"]["doubled"]) == (0, 0)


def test_sixteen_processes_start_cold_and_write_at_once() -> None:
    together("--starts", 3, "--each", 100, "--batch", 10)


@pytest.mark.long
def test_sixteen_processes_start_cold_fifty_times_and_write_a_lot() -> None:
    together("--starts", 50, "--each", 10_000)
