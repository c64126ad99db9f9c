"""A tuner killed at any instant loses at most the measurement in flight, and the next one goes on."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.programs import start
from tilecast.cache_store.store import open_store
from tilecast.settings import child_environment

TUNE = ["tune", "E=4,H=256,I=192,k=2", "--tokens", "1,4,16"]
KILLS = 3
PATIENCE_S = 90


@dataclass(frozen=True)
class Killed:
    """What one killed run says it made and kept, and by how many measurements the store grew."""

    made: int
    kept: int
    grown: int


def tune_and_kill(store: Path, journal: Path, instants: random.Random, *, at_work: bool) -> Killed:
    """Start a tuning and kill it: within seconds of its start, or within a second of its first measurement."""
    before = stored(store)
    journal.write_bytes(b"")
    environment = child_environment({"OMP_NUM_THREADS": "1"})
    running = start("tests.cli.witness", journal, *TUNE, "--store", store, environment=environment)
    deadline = time.monotonic() + PATIENCE_S
    while at_work and not journal.stat().st_size and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    time.sleep(instants.uniform(0, 1) if at_work else instants.uniform(0, 3))
    running.send_signal(signal.SIGKILL)
    done = running.ended(PATIENCE_S)
    assert done.returncode == -signal.SIGKILL, done.stderr
    noted = journal.read_bytes()
    return Killed(made=noted.count(b"m"), kept=noted.count(b"k"), grown=stored(store) - before)


def stored(store: Path) -> int:
    """Return how many measurements a store holds; each must be whole, and the file sound."""
    if not store.exists():
        return 0
    with sqlite3.connect(store) as connection:
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
    connection.close()
    with open_store(store) as opened:
        found = opened.measurements()  # reading one checks it
    assert all(m.samples_us for m in found if m.status == "ok")
    assert len({m.key for m in found}) == len(found)
    return len(found)


def kill_often(folder: Path, kills: int, seed: int = 0) -> list[Killed]:
    """Kill one tuning `kills` times at random instants and check after each what is left."""
    store, journal, instants = folder / "store.db", folder / "journal", random.Random(seed)
    runs = []
    for number in range(kills):
        run = tune_and_kill(store, journal, instants, at_work=number % 2 == 0)
        assert run.kept <= run.grown <= run.made <= run.kept + 1, run
        runs.append(run)
    return runs


@pytest.mark.slow
def test_kills_at_random_instants_lose_at_most_the_measurement_in_flight(tmp_path: Path, process: Command) -> None:
    runs = kill_often(tmp_path, KILLS)
    kept = sum(run.kept for run in runs)
    assert kept > 0, runs
    done = process(*TUNE, "--store", tmp_path / "store.db", "--budget", "10s", "--export", tmp_path / "table.db")
    assert done.code == 0, done.err
    assert "table.db: 3 decisions" in done.out
    assert stored(tmp_path / "store.db") >= kept
