"""Kill -9 at random instants: `python -m tests.cache_store.killing OPERATION FOLDER KILLS SEED`.

A child does one operation over and over and is killed; what it left is looked at; the next child goes on from there.
Prints how many kills came while the operation was under way. Run in a process of its own, since it forks.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.store_contract import HERE, decision, measurement
from tilecast.cache_store.bundle import export_table, read_bundle
from tilecast.cache_store.layout import HEAD, STORE_ID
from tilecast.cache_store.merge import merge_files
from tilecast.cache_store.store import open_store
from tilecast.evidence import TuningTable

SIZES = (40, 80)


def tables() -> list[TuningTable]:
    return [TuningTable((HERE,), tuple(decision(n, n + 1) for n in range(size))) for size in SIZES]


def quick_check(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("PRAGMA quick_check").fetchone()[0])


class Write:
    """Each measurement that was acknowledged is there, and at most one more."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store.db"
        self.known = 0

    def repeat(self) -> Iterator[None]:
        with open_store(self.path) as store:
            store.add_environment(HERE)
            for number in range(self.known, 1 << 30):
                store.add_measurements([measurement(round=number)])
                yield

    def check(self, acknowledged: int) -> None:
        if not self.path.exists():
            assert acknowledged == 0
            return
        with open_store(self.path) as store:
            rounds = [m.round for m in store.measurements()]
        assert quick_check(self.path) == "ok"
        assert rounds == list(range(len(rounds)))
        assert self.known + acknowledged <= len(rounds) <= self.known + acknowledged + 1
        self.known = len(rounds)


class Export:
    """The file is absent, or wholly one of the tables."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "table.db"
        self.tables = tables()

    def repeat(self) -> Iterator[None]:
        for number in range(1 << 30):
            export_table(self.tables[number % 2], self.path, [measurement(round=n) for n in range(SIZES[number % 2])])
            yield

    def check(self, acknowledged: int) -> None:
        assert self.path.exists() or acknowledged == 0
        if self.path.exists():
            assert quick_check(self.path) == "ok"
            bundle = read_bundle(self.path, measurements=True)
            assert bundle.table in self.tables
            assert len(bundle.measurements) == len(bundle.table)


class Merge:
    """The output is absent, or wholly the merger of its inputs; the inputs are as they were."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "merged.db"
        self.inputs = [folder / "a.db", folder / "b.db"]
        for number, (path, table) in enumerate(zip(self.inputs, tables(), strict=True)):
            export_table(table, path, [measurement(run=number, round=n) for n in range(50)])
        self.before = [path.read_bytes() for path in self.inputs]

    def repeat(self) -> Iterator[None]:
        while True:
            merge_files(self.inputs, self.path, policy="ours")
            yield

    def check(self, acknowledged: int) -> None:
        assert [path.read_bytes() for path in self.inputs] == self.before
        assert self.path.exists() or acknowledged == 0
        if self.path.exists():
            assert quick_check(self.path) == "ok"
            bundle = read_bundle(self.path, measurements=True)
            assert (len(bundle.table), len(bundle.measurements)) == (SIZES[1], 100)


class Migrate:
    """A store that is being made or upgraded opens afterwards and is at the newest revision."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store.db"
        self.old = folder / "old"
        with contextlib.closing(sqlite3.connect(self.old)) as connection, connection:
            connection.execute(f"PRAGMA application_id={STORE_ID}")
            connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")

    def repeat(self) -> Iterator[None]:
        for number in range(1 << 30):
            for beside in self.path.parent.glob("store.db*"):
                beside.unlink()
            if number % 2:
                self.path.write_bytes(self.old.read_bytes())
            with open_store(self.path) as store:
                store.add_environment(HERE)
            yield

    def check(self, acknowledged: int) -> None:
        with open_store(self.path) as store:
            assert store.environments() in ([], [HERE])
            store.add_environment(HERE)
        assert quick_check(self.path) == "ok"
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (HEAD,)


OPERATIONS: dict[str, Callable[[Path], Write | Export | Merge | Migrate]] = {
    "write": Write,
    "export": Export,
    "merge": Merge,
    "migrate": Migrate,
}


def killed(operation: Write | Export | Merge | Migrate, after_s: float | None = None) -> int:
    """Let a child work for a while (None: two steps), kill it, and return how many steps it did."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, b".")  # Begun.
            for _ in operation.repeat():
                os.write(write, b".")
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)
    done = 0
    if after_s is None:
        while done < 2:
            done += len(os.read(read, 1))
    else:
        time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while seen := os.read(read, 1 << 16):
        done += len(seen)
    os.close(read)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return done


def main(name: str, folder: str, kills: str, seed: str) -> None:
    operation, chance = OPERATIONS[name](Path(folder)), random.Random(int(seed))
    with open_store(Path(folder) / "first.db"):
        pass  # What is imported only now is imported once, not by each child.
    started = time.monotonic()
    steps = killed(operation)
    step_s = (time.monotonic() - started) / 2
    operation.check(steps)
    for _ in range(int(kills)):
        done = killed(operation, chance.random() * min(max(3 * step_s, 0.02), 1.0))
        steps += done
        operation.check(done)
    print(f"{steps} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
