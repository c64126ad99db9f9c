"""Export and import: one table in one self-contained SQLite file (docs/cache-format.md).

An imported file is data from outside: its size, header, schema and every value are checked before anything is
used, SQLite itself is told to distrust it, and nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from tilecast.cache_store.decision_rows import decision_configs, settled
from tilecast.cache_store.files import Header, check_writable, read_header, regular_size, sqlite_path, write_atomically
from tilecast.cache_store.layout import COLUMNS, EXPORT_FORMAT, EXPORT_FORMATS, export_columns
from tilecast.cache_store.measurement_rows import storable
from tilecast.cache_store.plain import Connection, plain_rows, reading_untrusted, single_row
from tilecast.cache_store.queries import (
    keeping_all,
    layers_in,
    no_configs,
    read_digest,
    read_layer_digests,
    read_measurements,
    read_table,
)
from tilecast.cache_store.revision import check_store_revision
from tilecast.cache_store.seal import check_measurements, check_table
from tilecast.errors import CacheError, InputError, SchemaError
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertLayer
from tilecast.store import Store

MAX_FILE_BYTES = 1 << 30
MAX_ROWS = {
    "environment": 10_000,
    "layer": 100_000,
    "config": 1_000_000,
    "decision": 1_000_000,
    "measurement": 5_000_000,
}
"""More than any fleet's table; less than what would fill a machine's memory."""

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_NAME = 10_000
"""Characters of a name; the longest are configs written out."""
MAX_MESSAGE = 1000
"""Characters of an error message about a file."""

SCHEMA_WORDS = frozenset(
    {"CREATE", "TABLE", "UNIQUE", "INDEX", "ON", "NOT", "NULL", "CONSTRAINT", "PRIMARY", "FOREIGN", "KEY", "REFERENCES"}
    | {"VARCHAR", "TEXT", "INTEGER", "BIGINT", "DOUBLE"}
)
"""All that Tilecast's schemas say besides names. What checks, computes or defaults is code, which SQLite would run."""
SCHEMA_NAME = re.compile(r"(pk|uq|fk|ix)_\w+|alembic_version_pkc")
STATISTICS = re.compile(r"CREATE TABLE sqlite_stat\d\([a-z, ]+\)", re.ASCII)
"""SQLite's own statistics, which a live store may have; nothing in them is read here."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one exported file or store holds. `producer` is empty for a store, which has no one producer."""

    table: TuningTable
    measurements: tuple[Measurement, ...] = ()
    producer: str = ""


def export_table(table: TuningTable, path: str | Path, measurements: Sequence[Measurement] = ()) -> None:
    """Write a table, and measurements made in its environments, to one file, whole or not at all.

    The same table gives the same bytes. A file that is there is replaced if it is an export, too. Raises
    CacheError for a path that cannot be written or that holds something else.
    """
    path = Path(path).expanduser()
    _check_replaceable(path)
    known = {environment.digest for environment in table.environments}
    kept = [storable(measurement) for measurement in {m.key: m for m in reversed(measurements)}.values()][::-1]
    for measurement in kept:
        if measurement.environment not in known:
            raise CacheError(
                f"{path}: not written: a measurement was made in environment {measurement.environment[:12]}, "
                f"which the table lacks; export it with its environment's table"
            )
    settled(table.decisions)
    # Writing is what needs SQLAlchemy; a process that serves only reads.
    from tilecast.cache_store.writing import database_bytes

    write_atomically(path, database_bytes(table, kept))


def check_exportable(path: str | Path) -> None:
    """Raise the CacheError that exporting to `path` would raise by now; leaves everything as it was."""
    path = Path(path).expanduser()
    _check_replaceable(path)
    check_writable(path)


def export_store(store: Store, path: str | Path, *, measurements: bool = True) -> TuningTable:
    """Export all decisions of a store, with its measurements unless told otherwise; return the table written.

    The table has every environment of the store that a decision or an exported measurement refers to.
    """
    table = store.table()
    kept = store.measurements() if measurements else []
    used = {m.environment for m in kept} | {e.digest for e in table.environments}
    table = TuningTable(tuple(e for e in store.environments() if e.digest in used), table.decisions)
    export_table(table, path, kept)
    return table


def import_table(where: str | Path) -> TuningTable:
    """Read a table out of an exported file, a live store or a SQLAlchemy URL. Raises CacheError, SchemaError."""
    return read_bundle(where).table


def read_bundle(where: str | Path, *, measurements: bool = False) -> Bundle:
    """Read an exported file, a live store or a SQLAlchemy URL, checking everything. Raises CacheError, SchemaError.

    Measurements are left out unless asked for.
    """
    path = sqlite_path(where)
    if path is None:
        from tilecast.cache_store.store import SqlStore, open_store

        with open_store(where, create=False, read_only=True) as store:
            assert isinstance(store, SqlStore)  # Those in memory have no server's URL.
            table, kept = store.snapshot(measurements=measurements)
            return Bundle(table=table, measurements=tuple(kept))
    with keeping_all(), _naming(path), _untrusted(path) as (connection, header):
        _check_schema(connection, header, str(path))
        _check_undamaged(connection, str(path))
        return _read(connection, header, str(path), measurements=measurements)


@contextlib.contextmanager
def open_evidence(where: str | Path) -> Iterator[Evidence]:
    """Open an exported file, a live store or a URL for some layers' decisions and the measurements behind them.

    What is read is checked as `read_bundle` does, and of an exported file that its decisions are those it was sealed
    with. The other decisions' configs, and a million measurements, that nobody asks for cost nothing. Raises
    CacheError, SchemaError.
    """
    path = sqlite_path(where)
    if path is None:
        from tilecast.cache_store.store import SqlStore, named, open_store

        with open_store(where, create=False, read_only=True) as store:
            assert isinstance(store, SqlStore)  # Those in memory have no server's URL.
            with store.reading() as connection:
                yield Evidence(connection, partial(named, store.name))
        return
    with _untrusted(path) as (connection, header):
        with _naming(path):
            _check_schema(connection, header, str(path))
            _check_counts(connection, str(path), besides="measurement")
            sealed = None
            if header.is_export:
                sealed = read_digest(connection, sealed=True)
                check_table(connection, sealed, str(path))
        yield Evidence(connection, partial(_naming, path), sealed)


class Evidence:
    """The decisions of each layer of a table, and the measurements behind them; made by `open_evidence`."""

    def __init__(
        self, connection: Connection, naming: Callable[[], AbstractContextManager[None]], digest: str | None = None
    ) -> None:
        """Read through `connection`; `naming` puts its name before errors, `digest` is the table's, where known."""
        self._connection = connection
        self._naming = naming
        self._digest = digest
        self._known = no_configs()

    def layer_digests(self) -> list[str]:
        """Return the digests of the layers that are decided, in the table's order. Raises CacheError."""
        with self._naming():
            return read_layer_digests(self._connection)

    def layers(self, digests: Sequence[str]) -> list[ExpertLayer]:
        """Return layers by their digests. Raises CacheError."""
        with self._naming():
            found = layers_in(self._connection, set(digests))
            return [found[digest] for digest in digests]

    def table(self, layer: ExpertLayer) -> TuningTable:
        """Return one layer's part of the table, with the environments of its decisions. Raises CacheError."""
        with self._naming():
            found = read_table(self._connection, layer=layer.digest)
            _check_printable(self._connection, found)
            return found

    def digest(self) -> str:
        """Return the whole table's digest; that of a live store is of what it holds now. Raises CacheError."""
        if self._digest is None:
            with self._naming():
                self._digest = read_digest(self._connection)
        return self._digest

    def of(self, decision: Decision) -> tuple[Measurement, ...]:
        """Return the measurements of a decision's layer, environment and routing profile. Raises CacheError."""
        found: list[Measurement] = []
        with self._naming():
            for gemm in decision.layer.gemms:
                found += read_measurements(
                    self._connection, environment=decision.environment, gemm=gemm, routing=decision.routing,
                    known=self._known,
                )  # fmt: skip
        return tuple(found)


@contextlib.contextmanager
def _untrusted(path: Path) -> Iterator[tuple[sqlite3.Connection, Header]]:
    header = read_header(path)
    _check_header(path, header)
    with reading_untrusted(path) as connection:
        yield connection, header


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let what a file holds, and the base types refuse, surface as a CacheError of one line that names the file."""
    try:
        yield
    except InputError as error:
        text = str(error)
        if text.startswith(f"{path}: ") and len(text) <= MAX_MESSAGE:
            raise
        # What a file holds may be in the message, and be of any length.
        short = _one_line(text.removeprefix(f"{path}: "))[:MAX_MESSAGE]
        raise CacheError(f"{path}: {short}; do not use this file, export it again") from error


def adopt(bundle: Bundle, store: Store) -> int:
    """Put everything that a bundle holds into a store and return how many measurements were new.

    Decisions of the bundle replace those of the store with the same key. Raises CacheError.
    """
    for environment in bundle.table.environments:
        store.add_environment(environment)
    new = store.add_measurements(list(bundle.measurements))
    store.put_decisions(list(bundle.table.decisions))
    return new


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _check_replaceable(path: Path) -> None:
    size = regular_size(path)
    if not size:
        return
    try:
        header = read_header(path)
    except CacheError:
        header = None
    if header is None or not header.is_export:
        kind = "a live store" if header is not None and header.is_store else "some other file"
        raise CacheError(f"{path}: holds {kind}, not an exported table, and is left alone; choose another path")


def _check_header(path: Path, header: Header) -> None:
    # Other systems' files (TurboMind's dump) would be told apart here, before SQLite is asked.
    if not (header.is_export or header.is_store):
        raise CacheError(f"{path}: is a SQLite file of another program, not a Tilecast table; check the path")
    if header.file_bytes > MAX_FILE_BYTES:
        raise CacheError(f"{path}: has {header.file_bytes} bytes, more than the {MAX_FILE_BYTES} allowed; export less")
    if header.is_export and header.user_version not in EXPORT_FORMATS:
        raise SchemaError(
            f"{path}: has export format {header.user_version}, this Tilecast reads up to {EXPORT_FORMAT}; "
            f"upgrade Tilecast (`pip install --upgrade tilecast`) or export the table again with this one"
        )
    if header.is_export and header.file_bytes != header.expected_bytes:
        raise CacheError(
            f"{path}: has {header.file_bytes} bytes, its header says {header.expected_bytes}; copy or export it again"
        )


def _check_schema(connection: sqlite3.Connection, header: Header, name: str) -> None:
    """Refuse whatever Tilecast would not have written, before any of its rows is read."""
    wanted = dict(COLUMNS)
    objects = list(plain_rows(connection, "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"))
    present = {item for kind, item, _, _ in objects if kind == "table"}
    if header.is_export:
        wanted["export"] = export_columns(header.user_version)
    else:
        wanted["alembic_version"] = frozenset({"version_num"})
        check_store_revision(connection, name)
    names = {*wanted, *(column for columns in wanted.values() for column in columns)}
    for kind, item, table, sql in objects:
        known = table in wanted and (kind == "index" or (kind == "table" and item == table))
        if not known and (header.is_export or not STATISTICS.fullmatch(str(sql))):
            raise CacheError(f"{name}: holds the unknown {kind!s:.20} {item!r:.60}; export it again")
        strange = _strange_word(sql, names) if known else None
        if strange is not None:
            raise CacheError(f"{name}: {kind} {item!r:.60} is made with {strange!r:.20}, which no table of ours has")
    for table, columns in wanted.items():
        if table not in present:
            raise CacheError(f"{name}: lacks the table {table!r}; export it again")
        # Column 1 is the name; column 6 is not 0 for generated and hidden columns.
        found = list(plain_rows(connection, f"PRAGMA table_xinfo({table})"))
        if {row[1] for row in found} != columns or any(row[6] for row in found):
            raise CacheError(f"{name}: table {table!r} has other columns than expected; export it again")


def _check_undamaged(connection: sqlite3.Connection, name: str) -> None:
    (damage,) = next(plain_rows(connection, "PRAGMA quick_check(1)"))
    if damage != "ok":
        raise CacheError(f"{name}: is damaged ({_one_line(damage)}); copy or export it again")


def _strange_word(sql: object, names: Set[str]) -> str | None:
    """Return the first word of a schema's SQL that Tilecast does not write, None if there is none."""
    if sql is None:
        return None  # The index that SQLite itself makes for a key.
    for word in re.findall(r"\w+|[^\w\s]", str(sql)):
        known = word in '(),"' or word.isdecimal() or word.upper() in SCHEMA_WORDS or word in names
        if not known and not SCHEMA_NAME.fullmatch(word):
            return str(word)
    return None


def _check_counts(connection: Connection, name: str, *, besides: str | None = None) -> None:
    for table, most in MAX_ROWS.items():
        if table != besides:
            (rows,) = next(iter(plain_rows(connection, f"SELECT count(*) FROM {table}")))
            if rows > most:
                raise CacheError(f"{name}: has {rows} {table} rows, more than the {most} allowed")


def _read(connection: sqlite3.Connection, header: Header, name: str, *, measurements: bool) -> Bundle:
    _check_counts(connection, name)
    found = read_table(connection, sealed=header.is_export)
    _check_printable(connection, found)
    producer = check_table(connection, found.digest, name) if header.is_export else ""
    kept = read_measurements(connection) if measurements else []
    if measurements:
        check_measurements(connection, name)
    return Bundle(table=found, measurements=tuple(kept), producer=producer)


def _check_printable(connection: Connection, table: TuningTable) -> None:
    """Raise CacheError for names that would do more to a terminal than be printed, and for sizes below 0."""
    choices = [choice for decision in table.decisions for choice in (decision.up, decision.down)]
    texts = {d.routing for d in table.decisions} | {choice.numerics for choice in choices}
    # Canonical JSON writes what is not plain ASCII with a backslash, all but one character; hardly any config has one.
    odd = "SELECT 1 FROM config WHERE replace(replace(fields, '\\', ''), '\x7f', '') <> fields LIMIT 1"
    if single_row(connection, odd) is not None:
        texts |= {config.label for decision in table.decisions for config in decision_configs(decision)}
    for environment in table.environments:
        values = [getattr(environment, field.name) for field in fields(environment)]
        texts |= {value for value in values if isinstance(value, str)}
        if not all(0 <= value < 1 << 63 for value in values if isinstance(value, int)):
            raise CacheError(f"environment {environment.digest[:12]} has a size below 0 or beyond all bounds")
    for text in texts:
        if CONTROL_CHARACTER.search(text) or len(text) > MAX_NAME:
            raise CacheError(f"holds the name {text[:60]!r}, expected at most {MAX_NAME} printable characters")
