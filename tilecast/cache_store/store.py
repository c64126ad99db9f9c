"""The `Store` contract on SQL: a SQLite file by default, a PostgreSQL server by URL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import BindParameter, Connection, Delete, Table, bindparam, delete, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from tilecast.cache_store import models
from tilecast.cache_store.decision_rows import decision_configs, decision_row, settled
from tilecast.cache_store.files import SQLITE_MAGIC, reason, regular_size, sqlite_path
from tilecast.cache_store.keyed import Keyed, keyed_row
from tilecast.cache_store.measurement_rows import MEASUREMENT_KINDS, measurement_row, storable
from tilecast.cache_store.memory import MemoryStore
from tilecast.cache_store.queries import read_environments, read_measurements, read_table
from tilecast.cache_store.schema import prepare
from tilecast.cache_store.session import Database, open_server, open_sqlite
from tilecast.environment import Environment
from tilecast.errors import CacheError, InputError
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertGemm
from tilecast.store import Store

T = TypeVar("T")
IN_MEMORY = frozenset({":memory:", "sqlite://", "sqlite:///:memory:"})


def open_store(where: str | Path | None, *, create: bool = True, read_only: bool = False) -> Store:
    """Open the store at a path or SQLAlchemy URL; None and `:memory:` give a new one in memory.

    With `create` a missing file and its folder are made. An older schema is upgraded, except with `read_only`.
    Raises CacheError, and SchemaError for a schema that this Tilecast cannot read.
    """
    if where is None or str(where) in IN_MEMORY:
        return MemoryStore()
    path = sqlite_path(where)
    if path is None:
        database = open_server(make_url(str(where)))
    else:
        path = _checked_path(path, create=create and not read_only)
        database = open_sqlite(path, read_only=read_only)
    try:
        prepare(database, path=path, read_only=read_only)
    except BaseException:
        database.close()
        raise
    return SqlStore(database, read_only=read_only)


def _checked_path(path: Path, *, create: bool) -> Path:
    path = Path(os.path.realpath(path))
    size = regular_size(path)
    if size is None:
        if not create:
            raise CacheError(f"{path}: there is no store; make one with `tilecast tune`, or check the path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{path}: its folder cannot be made ({reason(error)}); choose another path") from error
    elif size and not Path(f"{path}-journal").exists() and not _is_sqlite(path):
        raise CacheError(f"{path}: is not a SQLite file; choose another path for the store")
    return path


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error


class SqlStore:
    """A `tilecast.store.Store` in a database; made by `open_store`.

    Durable against the end of the process at any instant; against power loss, SQLite may lose the last
    transactions but stays whole.
    """

    def __init__(self, database: Database, *, read_only: bool = False) -> None:
        """Take over a database whose schema is at the newest revision."""
        self._database = database
        self._read_only = read_only
        # Digests of rows that are there, unless another process cleaned up since; then the foreign keys say so.
        self._present: dict[str, set[str]] = {"environment": set(), "layer": set(), "config": set()}
        insert = self._insert(models.measurement).on_conflict_do_nothing(index_elements=["key"])
        self._insert_measurement = database.prepared(insert, tuple(MEASUREMENT_KINDS))

    @property
    def name(self) -> str:
        """Where the store is, for messages; without passwords."""
        return self._database.name

    def add_environment(self, environment: Environment) -> str:
        """Keep an environment (once) and return its digest. Raises CacheError."""
        self._check_writable()
        with self._database.writing() as connection:
            self._keep(connection, models.environment, [environment])
        return environment.digest

    def environments(self) -> list[Environment]:
        """Return all environments, ordered by digest. Raises CacheError."""
        with self._database.reading() as connection:
            return read_environments(connection)

    def add_measurements(self, measurements: list[Measurement]) -> int:
        """Keep measurements, in one transaction, and return how many were new. Raises CacheError."""
        self._check_writable()
        kept = [storable(measurement) for measurement in measurements]
        # The driver's own executemany, which counts the rows: several times as fast as RETURNING. Its rows are made
        # before the lock is taken, for which others wait.
        statement, driver_row = self._insert_measurement
        rows = [driver_row(measurement_row(m)) for m in kept]

        def add(connection: Connection) -> tuple[int, set[str], set[str]]:
            self._check_environments(connection, {m.environment for m in kept})
            layers = self._keep(connection, models.layer, [m.gemm.layer for m in kept])
            configs = self._keep(connection, models.config, [m.config for m in kept])
            counted = connection.execution_options(preserve_rowcount=True)
            return counted.exec_driver_sql(statement, rows).rowcount if rows else 0, layers, configs

        new, layers, configs = self._written(add)
        self._present["layer"] |= layers
        self._present["config"] |= configs
        return new

    def measurements(
        self,
        *,
        environment: str | None = None,
        gemm: ExpertGemm | None = None,
        tokens: int | None = None,
        routing: str | None = None,
        run: int | None = None,
    ) -> list[Measurement]:
        """Return the measurements that match all given filters, in the order they were added. Raises CacheError."""
        with self._database.reading() as connection, named(self.name):
            return read_measurements(
                connection, environment=environment, gemm=gemm, tokens=tokens, routing=routing, run=run
            )

    def put_decisions(self, decisions: list[Decision]) -> None:
        """Keep decisions, in one transaction, displacing what they overlap. Raises CacheError."""
        self._check_writable()
        kept = settled(decisions)
        if not kept:
            return
        table = models.decision
        insert = self._insert(table)
        changed = {c.name: insert.excluded[c.name] for c in table.columns if not c.primary_key}
        upsert = insert.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=changed)
        rows = [decision_row(d) for d in kept]

        def put(connection: Connection) -> None:
            self._check_environments(connection, {d.environment for d in kept})
            self._keep(connection, models.layer, [d.layer for d in kept])
            self._keep(connection, models.config, [c for d in kept for c in decision_configs(d)])
            connection.execute(_displaced(), [{f"new_{name}": row[name] for name in _SERIES} for row in rows])
            connection.execute(upsert, rows)

        self._written(put)

    def table(self, *, environment: str | None = None, policy: str | None = None) -> TuningTable:
        """Return the decisions that match all given filters, with their environments. Raises CacheError."""
        with self._database.reading() as connection, named(self.name):
            return read_table(connection, environment=environment, policy=policy)

    def snapshot(self, *, measurements: bool) -> tuple[TuningTable, list[Measurement]]:
        """Return all decisions, and all measurements if asked for, of one instant. Raises CacheError."""
        with self._database.reading() as connection, named(self.name):
            return read_table(connection), read_measurements(connection) if measurements else []

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give what queries are asked of, all of one instant. Raises CacheError."""
        with self._database.reading() as connection:
            yield connection

    def close(self) -> None:
        """Close all connections; using the store afterwards raises CacheError."""
        self._database.close()

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def _written(self, work: Callable[[Connection], T]) -> T:
        """Do `work` in one transaction; once more where another process deleted rows that were remembered here."""
        try:
            with self._database.writing() as connection:
                return work(connection)
        except CacheError as error:
            if not isinstance(error.__cause__, IntegrityError) or not any(self._present.values()):
                raise
        for known in self._present.values():
            known.clear()
        with self._database.writing() as connection:
            return work(connection)

    def _check_writable(self) -> None:
        if self._read_only:
            raise CacheError(f"{self.name}: was opened read-only; open it for writing to change it")

    def _check_environments(self, connection: Connection, digests: set[str]) -> None:
        table, present = models.environment, self._present["environment"]
        for digest in sorted(digests - present):
            if connection.execute(select(table.c.digest).where(table.c.digest == digest)).first() is None:
                raise CacheError(f"{self.name}: has no environment {digest[:12]}; add the environment first")
            present.add(digest)

    def _keep(self, connection: Connection, table: Table, entries: Sequence[Keyed]) -> set[str]:
        """Insert entries that may not be there yet and return their digests, to be remembered once committed."""
        new = {entry.digest: entry for entry in entries if entry.digest not in self._present[table.name]}
        if new:
            insert = self._insert(table).on_conflict_do_nothing(index_elements=["digest"])
            connection.execute(insert, [keyed_row(new[key]) for key in sorted(new)])
        return set(new)

    def _insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an INSERT that knows ON CONFLICT, which SQLite and PostgreSQL spell alike."""
        return postgresql.insert(table) if self._database.dialect == "postgresql" else sqlite.insert(table)


_SERIES = ("environment", "layer", "policy", "routing", "tokens", "above")


def _displaced() -> Delete:
    """Return the DELETE of what a decision displaces; the same rule as `decision_rows.displaces`."""
    columns = models.decision.c
    new: dict[str, BindParameter[Any]] = {name: bindparam(f"new_{name}") for name in _SERIES}
    return delete(models.decision).where(
        *(columns[name] == new[name] for name in _SERIES[:4]),
        columns.tokens != new["tokens"],
        columns.tokens > new["above"],
        columns.above < new["tokens"],
    )


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Let what the base types refuse surface as a CacheError that names the store."""
    try:
        yield
    except InputError as error:
        raise CacheError(f"{name}: {error}; the store is damaged, restore a copy") from error
