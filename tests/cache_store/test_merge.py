from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store_contract import CONFIG, HERE, LAYER, OTHER, THERE, decision, measurement
from tilecast.cache_store.adopt import adopt_under
from tilecast.cache_store.bundle import Bundle, export_table, read_bundle
from tilecast.cache_store.merge import copy_file, merge_files
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError, UsageError
from tilecast.evidence import Choice, Decision, TuningTable

FAST = Choice(config=CONFIG, p50_us=1.0, default=OTHER, default_us=3.0, noise=0.01, numerics="a" * 64)
NEW = decision(up=replace(FAST, config=CONFIG.with_params(mr=4)), down=FAST)
ODD = [
    measurement(status="timeout", round=2, samples_us=(), detail="took longer than 2 s\nand more"),
    measurement(routing='a "quoted" näme', rank=1, world_size=2, run=3, round=4, error_ratio=1.25),
    measurement(environment=THERE.digest, gemm=LAYER.down, config=OTHER, numerics="c" * 64, measured_at=1.5e9),
]


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *decisions: Decision, measurements: object = ()) -> Path:
        path = tmp_path / name
        export_table(TuningTable((HERE, THERE), decisions), path, list(measurements))  # type: ignore[call-overload]
        return path

    return write


def test_measurements_are_united_by_their_natural_key(export: Callable[..., Path], tmp_path: Path) -> None:
    first = [measurement(), *ODD]
    a = export("a.db", decision(), measurements=first)
    b = export("b.db", measurements=[measurement(samples_us=(9.0,)), measurement(round=7)])
    before = a.read_bytes(), b.read_bytes()
    merged = merge_files([a, b], tmp_path / "out.db")
    assert [(p.measurements, p.new_measurements) for p in merged.parts] == [(4, 4), (2, 1)]
    found = read_bundle(tmp_path / "out.db", measurements=True)
    # Of one key the first stays.
    assert found.measurements == (*first, measurement(round=7))
    assert found.table == merged.table == TuningTable((HERE, THERE), (decision(),))
    assert merged.measurements == 5
    assert (a.read_bytes(), b.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.db", "b.db", "out.db"]


@pytest.mark.parametrize(
    ("policy", "kept"), [("best", NEW), ("ours", decision()), ("theirs", NEW), ("newest", decision())]
)
def test_policies_settle_conflicts(policy: str, kept: Decision, export: Callable[..., Path], tmp_path: Path) -> None:
    a = export("a.db", decision(), measurements=[measurement(measured_at=9.0)])
    b = export("b.db", NEW, decision(4, 8), measurements=[measurement(round=1, measured_at=5.0)])
    merged = merge_files([a, b], tmp_path / "out.db", policy=policy)
    assert read_bundle(tmp_path / "out.db").table.decisions == (kept, decision(4, 8))
    assert [source for source, _ in merged.conflicts] == [str(b)]


def test_newest_goes_by_the_input_that_a_decision_came_from(export: Callable[..., Path], tmp_path: Path) -> None:
    other = replace(NEW, up=replace(FAST, config=CONFIG.with_params(mr=2)))
    files = [
        export(f"{at}.db", d, measurements=[measurement(round=at, measured_at=float(at))])
        for at, d in ((2, decision()), (3, NEW), (1, other))
    ]
    assert merge_files(files, tmp_path / "out.db", policy="newest").table.decisions == (NEW,)


def test_error_leaves_what_was_there(export: Callable[..., Path], tmp_path: Path) -> None:
    a, b, out = export("a.db", decision()), export("b.db", NEW), export("out.db", decision(8, 16))
    before = out.read_bytes()
    with pytest.raises(CacheError, match="both tables decide"):
        merge_files([a, b], out, policy="error")
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.db", "b.db", "out.db"]


def test_an_input_is_never_the_output(export: Callable[..., Path], tmp_path: Path) -> None:
    a = export("a.db", decision())
    (tmp_path / "link.db").symlink_to(a)
    for out in (a, tmp_path / "link.db"):
        with pytest.raises(CacheError, match="one of the inputs"):
            merge_files([a], out)


def test_a_live_store_is_merged_and_left_as_it_is(export: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.add_measurements([measurement()])
        store.put_decisions([decision()])
        merged = merge_files([path, export("b.db", decision(4, 8))], tmp_path / "out.db")
        assert len(merged.table) == 2
        assert store.table() == TuningTable((HERE,), (decision(),))
    found = read_bundle(tmp_path / "out.db", measurements=True)
    assert found.measurements == (measurement(),)


def test_a_copy_is_the_same(export: Callable[..., Path], tmp_path: Path) -> None:
    a = export("a.db", decision(), decision(4, 8), measurements=[measurement(), *ODD])
    copy_file(a, tmp_path / "copy.db")
    found, copied = (read_bundle(path, measurements=True) for path in (a, tmp_path / "copy.db"))
    assert (found.table, found.measurements) == (copied.table, copied.measurements)


def test_without_measurements_none_are_written(export: Callable[..., Path], tmp_path: Path) -> None:
    a = export("a.db", decision(), measurements=[measurement()])
    merge_files([a], tmp_path / "out.db", measurements=False)
    assert read_bundle(tmp_path / "out.db", measurements=True).measurements == ()


@pytest.mark.parametrize(
    "change",
    [
        "samples_us = '[1.0,-2.0]'", "samples_us = '[NaN]'", "samples_us = '[]'", "samples_us = '[true]'",
        "samples_us = x'5b5d'", "samples_us = '[1e999]'", "tokens = 5", "tokens = -4", "tokens = 4.5",
        "status = 'fine'", "gemm = 'left'", "rank = 1", "world_size = 0", "run = 1099511627776", "round = -1",
        "error_ratio = -1.0", "error_ratio = 9e999", "measured_at = 9e999", "measured_at = 'now'",
        "routing = 'zipf'", "routing = x'00'", "numerics = replace(hex(zeroblob(300)), '00', 'n')",
        "detail = replace(hex(zeroblob(5000)), '00', 'd')", "detail = 'a' || char(0) || 'b'",
        "environment = replace(environment, substr(environment, 1, 1), 'x')", "layer = 'x'", "config = 'x'",
        "key = upper(key)",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: str, export: Callable[..., Path], tmp_path: Path) -> None:
    good, bad = export("good.db", decision()), export("bad.db", measurements=[measurement(), measurement(round=1)])
    with closing(sqlite3.connect(bad)) as connection, connection:
        connection.execute(f"UPDATE measurement SET {change} WHERE id = 2")
    with pytest.raises(CacheError, match=r"^.*bad\.db: ") as caught:
        merge_files([good, bad], tmp_path / "out.db")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.db").exists()


def test_nothing_to_merge_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_files([], tmp_path / "out.db")


def bundle(*decisions: Decision, measured_at: float = 0.0) -> Bundle:
    made = (measurement(round=int(measured_at), measured_at=measured_at),)
    return Bundle(table=TuningTable((HERE,), decisions), measurements=made)


@pytest.mark.parametrize(
    ("policy", "kept", "put"),
    [("best", NEW, 2), ("ours", decision(), 1), ("theirs", NEW, 2), ("newest", decision(), 1)],
)
def test_a_store_adopts_under_a_policy(policy: str, kept: Decision, put: int, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    adopt_under(bundle(decision(), measured_at=9.0), path)
    found = adopt_under(bundle(NEW, decision(4, 8), measured_at=5.0), path, policy)
    assert (found.put, found.measurements, len(found.conflicts)) == (put, 1, 1)
    with open_store(path) as store:
        assert store.table().decisions == (kept, decision(4, 8))
        assert len(store.measurements()) == 2


def test_a_conflict_under_error_imports_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    adopt_under(bundle(decision()), path)
    with pytest.raises(CacheError, match="both tables decide"):
        adopt_under(bundle(NEW, measured_at=5.0), path, "error")
    with open_store(path) as store:
        assert store.table().decisions == (decision(),)
        assert len(store.measurements()) == 1


def test_what_cannot_be_served_beside_the_imported_leaves_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    adopt_under(bundle(decision(), decision(4, 16)), path)
    other = replace(FAST, numerics="b" * 64)
    found = adopt_under(bundle(decision(4, 16, up=other, down=other)), path, "theirs")
    assert found.removed == 2
    with open_store(path) as store:
        assert [d.bucket.above for d in store.table().decisions] == [4]


def test_a_copy_of_a_part_has_only_its_measurements(export: Callable[..., Path], tmp_path: Path) -> None:
    there = decision(environment=THERE.digest)
    a = export("a.db", decision(), there, measurements=[measurement(), *ODD])
    copied = copy_file(a, tmp_path / "part.db", select=lambda table: table.for_environment(THERE.digest))
    found = read_bundle(tmp_path / "part.db", measurements=True)
    assert found.table == copied.table == TuningTable((THERE,), (there,))
    assert found.measurements == (ODD[-1],)
    with closing(sqlite3.connect(tmp_path / "part.db")) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_file_may_be_copied_over_itself(export: Callable[..., Path]) -> None:
    a = export("a.db", decision(), measurements=[measurement()])
    copy_file(a, a)
    assert read_bundle(a, measurements=True).measurements == (measurement(),)
