from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store_contract import CONFIG, HERE, LAYER, OTHER, THERE, decision, measurement
from tilecast.autotune.explain import deciding_run
from tilecast.cache_store import gc
from tilecast.cache_store.gc import Collected, Unwanted, collect
from tilecast.cache_store.store import open_store
from tilecast.environment import Environment
from tilecast.errors import CacheError, InputError, UsageError
from tilecast.evidence import Choice, Decision, Measurement

UPGRADED = replace(HERE, torch="2.14.0")


def made(path: Path, decisions: list[Decision], measurements: list[Measurement]) -> Path:
    with open_store(path) as store:
        for environment in (HERE, THERE, UPGRADED):
            store.add_environment(environment)
        store.add_measurements(measurements)
        store.put_decisions(decisions)
    return path


def left(path: Path) -> tuple[list[Decision], list[Measurement]]:
    with open_store(path, create=False, read_only=True) as store:
        return list(store.table().decisions), store.measurements()


def at(environment: Environment, time: float, **changes: object) -> Measurement:
    return measurement(environment=environment.digest, measured_at=time, **changes)


def test_what_is_old_goes_and_what_is_not_stays(tmp_path: Path) -> None:
    old, new = at(HERE, 10.0), at(HERE, 30.0, tokens=16)
    again = at(HERE, 30.0, round=1)
    path = made(tmp_path / "store.db", [decision(), decision(4, 16), decision(16, 32)], [old, new])
    found = collect(path, Unwanted(older_than=20.0), dry_run=True)
    assert (found.decisions, found.measurements, found.undated) == ((decision(),), 1, 1)
    assert left(path) == ([decision(), decision(4, 16), decision(16, 32)], [old, new])
    assert collect(path, Unwanted(older_than=20.0)).measurements == 1
    # What no measurement dates stays.
    assert left(path) == ([decision(4, 16), decision(16, 32)], [new])
    made(path, [decision()], [old, again])
    collect(path, Unwanted(older_than=20.0))
    # A decision is as old as its latest measurement.
    assert left(path) == ([decision(), decision(4, 16), decision(16, 32)], [new, again])


def test_an_environment_goes_wholly(tmp_path: Path) -> None:
    there = decision(environment=THERE.digest)
    path = made(tmp_path / "store.db", [decision(), there], [measurement(), at(THERE, 1.0)])
    found = collect(path, Unwanted(environment=THERE.digest[:8]))
    assert (found.decisions, found.measurements, found.environments) == ((there,), 1, (THERE,))
    assert left(path) == ([decision()], [measurement()])
    # A writer that has seen the environment goes on.
    with open_store(path) as store:
        assert store.add_measurements([at(THERE, 2.0)]) == 1


def test_conditions_are_met_together(tmp_path: Path) -> None:
    path = made(tmp_path / "store.db", [], [at(HERE, 1.0), at(THERE, 1.0), at(THERE, 9.0, round=1)])
    collect(path, Unwanted(environment=THERE.digest[:8], older_than=5.0))
    assert left(path)[1] == [at(HERE, 1.0), at(THERE, 9.0, round=1)]


def test_the_superseded_goes(tmp_path: Path) -> None:
    new = [decision(0, 2, environment=UPGRADED.digest), decision(2, 4, environment=UPGRADED.digest)]
    kept = [decision(4, 16), decision(environment=THERE.digest), decision(policy="fastest"), *new]
    evidence = [at(HERE, 1.0), at(HERE, 1.0, tokens=16), at(THERE, 1.0), at(UPGRADED, 2.0)]
    path = made(tmp_path / "store.db", [decision(), *kept], evidence)
    found = collect(path, Unwanted(superseded=True))
    # Of the old toolchain (0, 4] is decided anew, (4, 16] is not; another machine supersedes nothing.
    assert found.decisions == (decision(),)
    assert sorted(left(path)[0], key=lambda d: d.sort_key) == sorted(kept, key=lambda d: d.sort_key)
    # The measurements at 4 tokens are also what the fastest decision rests on.
    assert left(path)[1] == evidence


def test_runs_before_the_deciding_one_go(tmp_path: Path) -> None:
    def run(number: int, us: float, **changes: object) -> list[Measurement]:
        at_tokens = {"environment": HERE.digest, "run": number, **changes}
        return [
            measurement(gemm=gemm, config=config, samples_us=(us,), **at_tokens)
            for gemm in LAYER.gemms
            for config in (CONFIG, OTHER)
        ]

    first, second, third = run(0, 3.0), run(1, 2.5), run(2, 9.0)
    broken = measurement(round=7, status="unstable", samples_us=())
    elsewhere = [*run(0, 3.0, tokens=8), *run(1, 2.5, tokens=8), *run(0, 3.0, routing="zipf:1.2")]
    whole = [*first, broken, *second, *third, *elsewhere]
    path = made(tmp_path / "store.db", [decision(), decision(policy="fastest")], whole)
    asked = []

    def deciding(held: Sequence[Measurement], choice: Choice) -> int | None:
        asked.append((sorted({m.run for m in held}), choice))
        return 1 if len(asked) % 2 else 2

    # Earlier than what any policy's decision rests on; where nothing is decided, or in one run only, all stays.
    wanted = Unwanted(superseded=True)
    assert collect(path, wanted).measurements == 0
    assert collect(path, wanted, deciding=deciding, dry_run=True).measurements == len(first)
    assert [runs for runs, _ in asked] == [[0, 1, 2]] * 4
    assert collect(path, wanted, deciding=lambda held, choice: None).measurements == 0
    assert collect(path, wanted, deciding=deciding).measurements == len(first)
    kept = left(path)[1]
    assert {m.key for m in kept} == {m.key for m in [broken, *second, *third, *elsewhere]}
    # The real rule: the latest run that gives the stored times, or the latest at all.
    assert collect(path, wanted, deciding=deciding_run).measurements == 0
    assert left(path)[1] == kept


def test_measurements_of_the_superseded_go_with_it(tmp_path: Path) -> None:
    evidence = [at(HERE, 1.0), at(HERE, 1.0, tokens=16), at(UPGRADED, 2.0)]
    path = made(tmp_path / "store.db", [decision(), decision(environment=UPGRADED.digest)], evidence)
    assert collect(path, Unwanted(superseded=True)).measurements == 1
    assert left(path)[1] == evidence[1:]


def test_the_older_environment_supersedes_nothing(tmp_path: Path) -> None:
    both = [decision(), decision(environment=UPGRADED.digest)]
    path = made(tmp_path / "store.db", both, [at(HERE, 2.0), at(UPGRADED, 1.0)])
    assert collect(path, Unwanted(superseded=True)).decisions == (both[1],)
    path = made(tmp_path / "undated.db", both, [])
    assert collect(path, Unwanted(superseded=True)).decisions == ()


def test_a_decision_made_anew_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "store.db", [decision()], [at(HERE, 1.0)])
    anew = replace(decision(), up=replace(decision().up, config=CONFIG.with_params(mr=4)))
    delete = gc.delete_decisions

    def race(database: object, decisions: object) -> None:
        made(path, [anew], [])
        delete(database, decisions)  # type: ignore[arg-type]

    monkeypatch.setattr(gc, "delete_decisions", race)
    collect(path, Unwanted(older_than=5.0))
    assert left(path)[0] == [anew]


def test_transactions_are_short_and_the_file_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "ROWS_AT_ONCE", 100)
    path = made(tmp_path / "store.db", [], [at(HERE, float(n), round=n) for n in range(1000)])
    found = collect(path, Unwanted(older_than=990.0))
    assert found.measurements == 990
    assert [m.round for m in left(path)[1]] == list(range(990, 1000))
    assert found.bytes_before is not None
    assert found.bytes_after is not None
    assert found.bytes_after < found.bytes_before / 2
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_reader_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "BUSY_TIMEOUT_S", 0.1)
    path = made(tmp_path / "store.db", [decision()], [at(HERE, 1.0)])
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM measurement").fetchone()
        found: Collected = collect(path, Unwanted(older_than=5.0))
    assert found.measurements == 1
    assert left(path) == ([], [])


def test_what_does_not_say_what_to_take_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "store.db", [], [])
    with pytest.raises(UsageError, match="nothing says"):
        Unwanted()
    with pytest.raises(UsageError, match="at least 6 digits"):
        Unwanted(environment="3f")
    with pytest.raises(InputError, match=r"is no environment of .*Some CPU"):
        collect(path, Unwanted(environment="x" * 8))
    with pytest.raises(CacheError, match="there is no store"):
        collect(tmp_path / "none.db", Unwanted(older_than=1.0))


def test_layers_do_not_supersede_each_other(tmp_path: Path) -> None:
    wider = replace(LAYER, hidden=128)
    both = [decision(layer=wider), decision(environment=UPGRADED.digest)]
    path = made(tmp_path / "store.db", both, [at(HERE, 1.0), at(UPGRADED, 2.0)])
    assert collect(path, Unwanted(superseded=True)).decisions == ()
