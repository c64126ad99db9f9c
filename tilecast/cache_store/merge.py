"""Several tables into one file: decisions by a policy, measurements united; inputs are only read.

Measurements are streamed, so that memory stays small whatever their number. `copy_file` is the same for one input:
an export of everything.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection, create_engine, insert, make_url
from sqlalchemy.exc import SQLAlchemyError

from tilecast._version import VERSION
from tilecast.cache_store import models
from tilecast.cache_store.bundle import check_exportable, read_bundle
from tilecast.cache_store.decision_rows import decision_configs, decision_row, settled
from tilecast.cache_store.files import replacing, sqlite_path
from tilecast.cache_store.layout import EXPORT_FORMAT, EXPORT_ID
from tilecast.cache_store.plain import translate
from tilecast.cache_store.resolve import Ages, Conflict, Resolution, check_merge_policy, resolve
from tilecast.cache_store.seal import check_measurements, seal_measurements
from tilecast.cache_store.session import Database, open_server, open_sqlite
from tilecast.cache_store.streams import MeasurementSink, MeasurementStream, Place, insert_keyed, place_of
from tilecast.environment import Environment
from tilecast.errors import CacheError, InputError, UsageError
from tilecast.evidence import TABLE_FORMAT, TuningTable
from tilecast.problem import ExpertLayer, TileConfig

CACHE_KIB = 128 << 10
"""SQLite's page cache while a file is built: the index of keys of a million measurements fits."""

Check = Callable[[str, TuningTable, Iterable[tuple[str, TileConfig]]], None]
"""Raises for an input of this name that has decisions, or measured configs by environment, that must not be used."""
Select = Callable[[TuningTable], TuningTable]
"""Returns the part of a table that is wanted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one input gave: decisions it holds, those that were new, those that were there alike, and measurements."""

    source: str
    decisions: int
    added: int
    equal: int
    measurements: int
    new_measurements: int


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge_files` made. Conflicts name ours and theirs as the inputs follow one another."""

    table: TuningTable
    measurements: int
    parts: tuple[Part, ...]
    conflicts: tuple[tuple[str, Conflict], ...]
    """Conflicts with the input that theirs are of."""


def merge_files(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    policy: str = "best",
    measurements: bool = True,
    check: Check | None = None,
) -> Merged:
    """Write the decisions and measurements of exported files, stores or URLs to one file, whole or not at all.

    The first input is `ours`, and what it gives with the second is ours to the third. Measurements with one natural
    key are kept once, the first of them. Raises CacheError for an input that cannot be trusted, for an output that
    is an input or something else than an export, and under `error` for a conflict; UsageError for an unknown policy;
    and what `check` raises, which is asked of every input.
    """
    check_merge_policy(policy)
    if not sources:
        raise UsageError("there is nothing to merge; name a table")
    out = Path(out).expanduser()
    _check_apart(sources, out)
    return _built(sources, out, policy, measurements=measurements, check=check)


def copy_file(source: str | Path, out: str | Path, *, select: Select | None = None) -> Merged:
    """Export what a file or store holds, its measurements included, whatever their number.

    `select` returns the part of the table to export; with it only measurements made in that part's environments go
    along. Raises what `select` raises, and as `merge_files` does.
    """
    return _built([source], Path(out).expanduser(), "ours", measurements=True, select=select)


def _built(
    sources: Sequence[str | Path],
    out: Path,
    policy: str,
    *,
    measurements: bool,
    select: Select | None = None,
    check: Check | None = None,
) -> Merged:
    check_exportable(out)
    with replacing(out) as path, _building(path, out) as connection:
        builder = _Builder(connection, measurements=measurements, select=select, check=check)
        for source in sources:
            builder.add(source, policy)
        return builder.finish()


class _Builder:
    def __init__(
        self, connection: Connection, *, measurements: bool, select: Select | None, check: Check | None
    ) -> None:
        self._connection = connection
        self._check = check
        self._select = select
        self._sink = MeasurementSink(connection)
        self._measurements = measurements
        self._table: TuningTable | None = None
        self._ages: Ages = {}
        self._environments: dict[str, Environment] = {}
        self._layers: dict[str, ExpertLayer] = {}
        self._configs: dict[str, TileConfig] = {}
        self._parts: list[Part] = []
        self._conflicts: list[tuple[str, Conflict]] = []

    def add(self, source: str | Path, policy: str) -> None:
        name = str(source)
        table = read_bundle(source).table
        if self._select is not None:
            table = self._select(table)
        if self._check is not None:
            self._check(name, table, ())
        places, seen, new = self._read(source, table) if self._measurements or policy == "newest" else ({}, 0, 0)
        ages = {d: places[place] for d in table.decisions if (place := place_of(d)) in places}
        if self._table is None:
            resolution = Resolution(table=table, added=len(table))
        else:
            resolution = resolve(self._table, table, policy, ages=(self._ages, ages))
        self._table = resolution.table
        self._ages = {**ages, **self._ages}
        self._conflicts += [(name, conflict) for conflict in resolution.conflicts]
        self._environments |= {e.digest: e for e in table.environments}
        self._parts.append(
            Part(source=name, decisions=len(table), added=resolution.added, equal=resolution.equal, measurements=seen,
                 new_measurements=new)
        )  # fmt: skip

    def finish(self) -> Merged:
        table = self._table
        assert table is not None, "there is at least one input"
        decisions = settled(table.decisions)
        kept = {d.environment for d in decisions}
        if self._measurements:
            kept = set(self._environments)
        table = replace(table, environments=tuple(self._environments[digest] for digest in sorted(kept)))
        layers = [*self._layers.values(), *(d.layer for d in decisions)]
        configs = [*self._configs.values(), *(c for d in decisions for c in decision_configs(d))]
        about = {"table_digest": table.digest, "table_format": TABLE_FORMAT, "producer": f"tilecast {VERSION}"}
        self._connection.execute(insert(models.export), [about])
        insert_keyed(self._connection, models.environment, table.environments)
        insert_keyed(self._connection, models.layer, layers)
        insert_keyed(self._connection, models.config, configs)
        if decisions:
            self._connection.execute(insert(models.decision), [decision_row(d) for d in decisions])
        seal_measurements(self._connection, self._sink.digest())
        return Merged(
            table=table, measurements=self._sink.count, parts=tuple(self._parts), conflicts=tuple(self._conflicts)
        )

    def _read(self, source: str | Path, table: TuningTable) -> tuple[dict[Place, float], int, int]:
        """Write the measurements of an input; return the latest time by place, how many it has and how many were new.

        It is opened once more here, and all rows are checked again: a store may have grown since its table was read.
        """
        database = _opened(source)
        only = None if self._select is None else {environment.digest for environment in table.environments}
        try:
            with database.reading() as connection:
                stream = MeasurementStream(connection, environments=only)
                new = self._sink.add(stream) if self._measurements else 0
                if not self._measurements:
                    collections.deque(stream, maxlen=0)  # for the times alone
                check_measurements(connection, database.name, stream.seal.digest())
        except InputError as error:
            named = str(error).startswith(f"{database.name}: ")
            raise error if named else CacheError(f"{database.name}: {error}; do not use it, export it again") from error
        finally:
            database.close()
        if self._check is not None and self._measurements:
            whole = TuningTable(tuple((stream.environments | {e.digest: e for e in table.environments}).values()))
            self._check(str(source), whole, ((place, stream.configs[config]) for place, config in stream.measured))
        if self._measurements:
            self._environments |= stream.environments
            self._layers |= stream.layers
            self._configs |= stream.configs
        return stream.ages, stream.count, new


def _opened(source: str | Path) -> Database:
    path = sqlite_path(source)
    return open_server(make_url(str(source))) if path is None else open_sqlite(path, untrusted=True)


def _check_apart(sources: Sequence[str | Path], out: Path) -> None:
    for source in sources:
        path = sqlite_path(source)
        if path is not None and out.exists() and path.exists() and path.samefile(out):
            raise CacheError(f"{out}: is one of the inputs, which are never changed; choose another --out")


@contextlib.contextmanager
def _building(path: Path, out: Path) -> Iterator[Connection]:
    """Give a connection to a new file with the tables of an export, and finish the file at the end."""
    engine = create_engine(f"sqlite+pysqlite:///{path}")
    try:
        with engine.connect() as connection:
            # The file is nothing before it is whole: it is synced once, when it is finished, and then renamed.
            for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
                connection.exec_driver_sql(f"PRAGMA {pragma}")
            connection.exec_driver_sql(f"PRAGMA application_id={EXPORT_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={EXPORT_FORMAT}")
            models.metadata.create_all(connection)
            models.export_metadata.create_all(connection)
            indexes = sorted(models.measurement.indexes, key=lambda index: str(index.name))
            for index in indexes:
                index.drop(connection)
            yield connection
            # Sorting a million rows once is faster than finding each its place.
            for index in indexes:
                index.create(connection)
            connection.commit()
    except SQLAlchemyError as error:
        raise translate(error, str(out)) from error
    finally:
        engine.dispose()
