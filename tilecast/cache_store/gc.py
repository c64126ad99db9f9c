"""Taking out of a live store what is not wanted any more, in short transactions, so that nobody waits for it.

Environments, layers and configs stay: they are small, and writers rely on them once they have seen them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, delete, func, make_url, or_, select

from tilecast.cache_store import models
from tilecast.cache_store.decision_rows import decision_row
from tilecast.cache_store.files import sqlite_path
from tilecast.cache_store.plain import BUSY_TIMEOUT_S, translate
from tilecast.cache_store.queries import read_environments, read_measurements, read_table
from tilecast.cache_store.resolve import covers_bucket
from tilecast.cache_store.session import Database, open_server, open_sqlite
from tilecast.cache_store.store import open_store
from tilecast.cache_store.streams import Place, latest_times, place_of
from tilecast.environment import Environment
from tilecast.errors import CacheError, InputError, UsageError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.problem import ExpertGemm

ROWS_AT_ONCE = 5000
"""Measurements deleted in one transaction: some ten milliseconds."""
DECISIONS_AT_ONCE = 100
PLACES_AT_ONCE = 100
DIGEST_DIGITS = 6
"""Least digits of a digest that name an environment."""
SAME_MACHINE = ("device_kind", "device", "arch", "features", "units", "llc_bytes", "threads")
"""Fields that are alike in the environments of one machine before and after an upgrade."""


Deciding = Callable[[Sequence[Measurement], Choice], int | None]
"""Returns the run that a choice was made from, of its GEMM's measurements at its tokens; None if it is not there."""


@dataclass(frozen=True, kw_only=True)
class Unwanted:
    """What goes: everything that meets all of the conditions given. At least one must be.

    older_than: measured before this time, in seconds since 1970; a decision is as old as its latest measurement.
    environment: made there, by the start of its digest. superseded: another environment of the same machine,
    measured later, decides the same token counts; and what a decision's GEMM was measured at its tokens and routing
    in runs before the one that the decision rests on, except what was found unstable, which counts for good.
    """

    older_than: float | None = None
    environment: str | None = None
    superseded: bool = False

    def __post_init__(self) -> None:
        """Validate; raises UsageError."""
        if self.older_than is None and self.environment is None and not self.superseded:
            raise UsageError("nothing says what to take out; give --older-than, --environment or --superseded")
        if self.environment is not None and len(self.environment) < DIGEST_DIGITS:
            raise UsageError(
                f"--environment is {self.environment!r}, expected at least {DIGEST_DIGITS} digits of a digest"
            )


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What went, or would go: decisions, the number of measurements, and the file's size in bytes where there is one.

    `undated` decisions were left alone because no measurement says how old they are.
    """

    decisions: tuple[Decision, ...]
    measurements: int
    environments: tuple[Environment, ...] = ()
    undated: int = 0
    bytes_before: int | None = None
    bytes_after: int | None = None
    note: str = ""


@dataclass
class _Doomed:
    decisions: list[Decision]
    conditions: list[ColumnElement[bool]]
    """Measurements that meet any of these go."""
    environments: list[Environment] = field(default_factory=list)
    undated: int = 0


def collect(
    where: str | Path, unwanted: Unwanted, *, dry_run: bool = False, deciding: Deciding | None = None
) -> Collected:
    """Take what is unwanted out of the store at a path or URL, and give the space back to the file system.

    Stopped at any instant it has taken out a part, and goes on when called again; a decision that is put anew
    meanwhile stays. With `dry_run` nothing is changed. Without `deciding` earlier runs are left alone. Raises
    CacheError, and InputError for an unknown environment.
    """
    # Says what is wrong with the path, and upgrades an older schema.
    open_store(where, create=False, read_only=dry_run).close()
    path = sqlite_path(where)
    database = open_database(where, read_only=dry_run)
    with contextlib.closing(database):
        with database.reading() as connection:
            doomed = _doomed(connection, unwanted, database.name, deciding)
            count = sum(_count(connection, condition) for condition in doomed.conditions)
        before, note = _size(path), ""
        if not dry_run:
            count = sum(_delete_measurements(database, condition) for condition in doomed.conditions)
            delete_decisions(database, doomed.decisions)
    if not dry_run and path is not None:
        note = _vacuum(path)
    return Collected(
        decisions=tuple(doomed.decisions), measurements=count, environments=tuple(doomed.environments),
        undated=doomed.undated, bytes_before=before, bytes_after=None if dry_run else _size(path), note=note,
    )  # fmt: skip


def open_database(where: str | Path, *, read_only: bool = False) -> Database:
    """Return the database of a store that `open_store` has opened before. Raises CacheError."""
    path = sqlite_path(where)
    return open_server(make_url(str(where))) if path is None else open_sqlite(path, read_only=read_only)


def _doomed(connection: Connection, unwanted: Unwanted, name: str, deciding: Deciding | None) -> _Doomed:
    environments = read_environments(connection)
    chosen = None if unwanted.environment is None else _named(environments, unwanted.environment, name)
    table = read_table(connection, environment=None if chosen is None else chosen.digest)
    decisions, undated = list(table.decisions), 0
    ages = latest_times(connection) if unwanted.older_than is not None or unwanted.superseded else {}
    conditions = [models.measurement.c.id >= 0]
    if chosen is not None:
        conditions.append(models.measurement.c.environment == chosen.digest)
    if unwanted.older_than is not None:
        conditions.append(models.measurement.c.measured_at < unwanted.older_than)
        undated = sum(place_of(d) not in ages for d in decisions)
        decisions = [d for d in decisions if ages.get(place_of(d), unwanted.older_than) < unwanted.older_than]
    every = [and_(*conditions)]
    if unwanted.superseded:
        whole = table if chosen is None else read_table(connection)
        over = set(_superseded(whole, environments, ages))
        decisions = [d for d in decisions if d in over]
        places = sorted({place_of(d) for d in over} - {place_of(d) for d in whole.decisions if d not in over})
        every = [and_(*conditions, condition) for condition in _at_places(places)]
        if deciding is not None:
            kept = [d for d in table.decisions if d not in over]
            every += [and_(*conditions, condition) for condition in _earlier_runs(connection, kept, deciding)]
    return _Doomed(decisions, every, [] if chosen is None else [chosen], undated)


def _named(environments: Iterable[Environment], digits: str, name: str) -> Environment:
    known = list(environments)
    found = [e for e in known if e.digest.startswith(digits.lower())]
    if len(found) != 1:
        has = "; ".join(f"{e.digest[:12]} ({e.device})" for e in known) or "none"
        count = f"matches {len(found)} environments" if found else "is no environment"
        raise InputError(f"{digits!r:.70} {count} of {name}; it has: {has}")
    return found[0]


def _superseded(table: TuningTable, environments: list[Environment], ages: dict[Place, float]) -> Iterator[Decision]:
    """Yield the decisions whose token counts a later environment of the same machine decides, too."""
    latest: dict[str, float] = {}
    for (environment, *_), age in ages.items():
        latest[environment] = max(age, latest.get(environment, age))
    series: dict[tuple[str, ...], list[Decision]] = {}
    for decision in table.decisions:
        series.setdefault(decision.sort_key[:4], []).append(decision)
    later: dict[str, list[str]] = {
        old.digest: [
            new.digest for new in environments
            if latest.get(new.digest, 0.0) > latest[old.digest]
            and all(getattr(new, name) == getattr(old, name) for name in SAME_MACHINE)
        ]
        for old in environments if old.digest in latest
    }  # fmt: skip
    for decision in table.decisions:
        for environment in later.get(decision.environment, ()):
            newer = series.get((environment, *decision.sort_key[1:4]), ())
            if covers_bucket(decision.bucket, [d.bucket for d in newer]):
                yield decision
                break


def _at_places(places: list[Place]) -> Iterator[ColumnElement[bool]]:
    columns = models.measurement.c
    for start in range(0, len(places), PLACES_AT_ONCE):
        yield or_(
            *(
                and_(columns.environment == environment, columns.layer == layer, columns.routing == routing,
                     columns.tokens == tokens)
                for environment, layer, routing, tokens in places[start : start + PLACES_AT_ONCE]
            )
        )  # fmt: skip


def _earlier_runs(
    connection: Connection, decisions: Iterable[Decision], deciding: Deciding
) -> Iterator[ColumnElement[bool]]:
    """Yield what is measured of each decided GEMM in runs before those that its decisions, of all policies, rest on."""
    c = models.measurement.c
    columns = (c.environment, c.layer, c.gemm, c.tokens, c.routing)
    several = select(*columns).group_by(*columns).having(func.min(c.run) < func.max(c.run))
    found = {tuple(row) for row in connection.execute(several)}
    choices: dict[tuple[str, ExpertGemm, int, str], list[Choice]] = {}
    for d in decisions:
        for gemm in d.layer.gemms:
            if (d.environment, d.layer.digest, gemm.name, d.bucket.tokens, d.routing) in found:
                choices.setdefault((d.environment, gemm, d.bucket.tokens, d.routing), []).append(d.choice(gemm.name))
    for (environment, gemm, tokens, routing), chosen in choices.items():
        held = read_measurements(connection, environment=environment, gemm=gemm, tokens=tokens, routing=routing)
        runs = [run for run in (deciding(held, choice) for choice in chosen) if run is not None]
        if len(runs) == len(chosen):
            place = (environment, gemm.layer.digest, gemm.name, tokens, routing)
            alike = [column == value for column, value in zip(columns, place, strict=True)]
            yield and_(*alike, c.run < min(runs), c.status != "unstable")


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    return int(connection.execute(select(func.count()).select_from(models.measurement).where(condition)).scalar_one())


def _delete_measurements(database: Database, condition: ColumnElement[bool]) -> int:
    column = models.measurement.c.id
    gone = 0
    with database.reading() as connection:
        last = connection.execute(select(func.max(column))).scalar() or 0
    low = 0
    while low <= last:
        # Ranges of the primary key: each is found at once, however much was deleted before.
        with database.writing() as connection:
            inside = and_(column >= low, column < low + ROWS_AT_ONCE, condition)
            gone += connection.execute(delete(models.measurement).where(inside)).rowcount
        low += ROWS_AT_ONCE
    return gone


def delete_decisions(database: Database, decisions: Sequence[Decision]) -> None:
    """Take decisions out of a store, as long as they are what they were when they were read. Raises CacheError."""
    columns = models.decision.c
    for start in range(0, len(decisions), DECISIONS_AT_ONCE):
        with database.writing() as connection:
            for decision in decisions[start : start + DECISIONS_AT_ONCE]:
                # All columns, not the key alone: what was decided anew meanwhile is wanted.
                same = [columns[name].is_not_distinct_from(value) for name, value in decision_row(decision).items()]
                connection.execute(delete(models.decision).where(*same))


def _size(path: Path | None) -> int | None:
    if path is None:
        return None
    files = (path, Path(f"{path}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def _vacuum(path: Path) -> str:
    """Shrink the file; return why not, if others are at work on it."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        problem = translate(error, str(path))
        if "locked" in str(problem) or "full" in str(problem):
            return f"the file was not made smaller: {problem}"
        raise CacheError(str(problem)) from error
    return ""
