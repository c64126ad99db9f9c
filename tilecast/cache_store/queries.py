"""Reading tables and measurements out of a connection, for the live store and for files from outside alike."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any

from tilecast.cache_store.decision_rows import DECISION_KINDS, DecisionColumns, decisions_from_rows
from tilecast.cache_store.keyed import Lookup
from tilecast.cache_store.measurement_rows import MEASUREMENT_KINDS, measurements_from_rows
from tilecast.cache_store.plain import Connection, PlainRow, plain_rows
from tilecast.canonical import canonical_json, digest_of_text, quoted
from tilecast.environment import Environment
from tilecast.errors import CacheError
from tilecast.evidence import Measurement, TuningTable
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

ROWS_AT_ONCE = 10_000
"""Rows held at once where a whole table is gone through."""
NAMED_AT_ONCE = 500
"""Values in one query; SQLite before 3.32 takes 999."""

Filters = Mapping[str, str | int | None]
"""What columns must be equal to; None asks for nothing."""


def read_environments(connection: Connection) -> list[Environment]:
    """Return all environments, ordered by digest. Raises CacheError."""
    return environments_in(connection).all()


def read_table(
    connection: Connection,
    *,
    environment: str | None = None,
    layer: str | None = None,
    policy: str | None = None,
    sealed: bool = False,
) -> TuningTable:
    """Return matching decisions and their environments as a table. Raises InputError.

    With `sealed`, as exported files are, all environments; and the table's digest is made on the way, which is faster.
    """
    where, values = _conditions({"environment": environment, "layer": layer, "policy": policy}, indexed=False)
    rows = list(plain_rows(connection, f"SELECT {', '.join(DECISION_KINDS)} FROM decision{where}", values))
    # A layer has few decisions: what they refer to is asked for by name, of the many that there may be.
    named = layer is not None
    layers = layers_in(connection, {row[_LAYER] for row in rows} if named else None)
    configs = configs_in(connection, {row[place] for row in rows for place in _CONFIGS} if named else None)
    with keeping_all():
        columns = DecisionColumns.of(rows)
        found = decisions_from_rows(rows, layers, configs) if columns is None else columns.decisions(layers, configs)
        places = environments_in(connection)
        kept = places.all() if sealed else [places[key] for key in {d.environment for d in found}]
        table = TuningTable(tuple(kept), tuple(found))
        if sealed and columns is not None:
            # Their texts are canonical, or they would not have been parsed; where the table itself would keep it.
            vars(table)["digest"] = _digest_of(columns, layers, configs, table.environments)
        return table


_LAYER = list(DECISION_KINDS).index("layer")
_CONFIGS = [place for place, name in enumerate(DECISION_KINDS) if name.endswith(("_config", "_default", "_runner_up"))]


def read_layer_digests(connection: Connection) -> list[str]:
    """Return the digests of the layers that there are decisions of, in a table's order. Raises CacheError."""
    # `above` is in no index: all of a file's decisions are what its table says, whatever a damaged index does.
    rows = plain_rows(connection, "SELECT environment, layer, above FROM decision")
    pairs = {(environment, layer) for environment, layer, _ in rows}
    if not all(type(value) is str for pair in pairs for value in pair):
        raise CacheError("decision: environment or layer is not text")
    return list(dict.fromkeys(layer for _, layer in sorted(pairs)))


def read_digest(connection: Connection, *, sealed: bool = False) -> str:
    """Return the digest of the table that `read_table` would return, if what it refers to is what it seems.

    Hardly anything is parsed or made, which takes a third of the time. Raises InputError.
    """
    rows = list(plain_rows(connection, f"SELECT {', '.join(DECISION_KINDS)} FROM decision"))
    columns = DecisionColumns.of(rows)
    if columns is None:
        return read_table(connection, sealed=sealed).digest
    places = environments_in(connection)
    kept = places.all() if sealed else [places[key] for key in sorted({row[0] for row in rows})]
    return _digest_of(columns, layers_in(connection), configs_in(connection), kept)


def _digest_of(
    columns: DecisionColumns, layers: Lookup[ExpertLayer], configs: Lookup[TileConfig], kept: Iterable[Environment]
) -> str:
    return digest_of_text(columns.table_text(layers, configs, [place.canonical for place in kept]))


def read_measurements(
    connection: Connection,
    *,
    environment: str | None = None,
    gemm: ExpertGemm | None = None,
    tokens: int | None = None,
    routing: str | None = None,
    run: int | None = None,
    known: Lookup[TileConfig] | None = None,
) -> list[Measurement]:
    """Return matching measurements in the order they were added. Raises InputError.

    Configs that are `known` from earlier calls on this connection are not parsed again, and new ones are added.
    """
    filters: dict[str, str | int | None] = {"environment": environment, "tokens": tokens, "routing": routing}
    if gemm is not None:
        filters |= {"layer": gemm.layer.digest, "gemm": gemm.name}
    where, values = _conditions({**filters, "run": run})
    columns = ", ".join(MEASUREMENT_KINDS)
    rows = plain_rows(connection, f"SELECT {columns} FROM measurement{where} ORDER BY id", values)
    layers = layers_in(connection)
    configs = no_configs() if known is None else known
    found: list[Measurement] = []
    with keeping_all():
        while part := list(islice(rows, ROWS_AT_ONCE)):
            configs.learn(configs_in(connection, configs.unknown(row[_CONFIG] for row in part)))
            found += measurements_from_rows(part, layers, configs)
    return found


_CONFIG = list(MEASUREMENT_KINDS).index("config")


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
    """Let Python not look for garbage among thousands of objects that all stay: a fifth of the time to read a table."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def measurements_digest(connection: Connection) -> str:
    """Return the SHA-256 over all measurements as stored: each row's canonical JSON list and a newline, ordered by id.

    Nothing is parsed, so that it takes seconds for a million. Values must be of their columns' types.
    """
    rows = plain_rows(connection, f"SELECT {', '.join(MEASUREMENT_KINDS)} FROM measurement ORDER BY id")
    total = Seal()
    while part := list(islice(rows, ROWS_AT_ONCE)):
        total.add([sealed_line(row) for row in part])
    return total.digest()


class Seal:
    """What `measurements_digest` returns, made while the rows pass by."""

    def __init__(self) -> None:
        """Begin with no row."""
        self._total = hashlib.sha256()

    def add(self, lines: Sequence[str]) -> None:
        """Go on with some rows' lines."""
        self._total.update("".join(lines).encode("ascii"))

    def digest(self) -> str:
        """Return the SHA-256 so far."""
        return self._total.hexdigest()


def sealed_line(values: Sequence[Any]) -> str:
    """Return what a row adds to the seal. Raises CacheError for a value that JSON has no form for."""
    try:
        return f"{canonical_json(list(values))}\n"
    except (TypeError, ValueError) as error:
        raise CacheError(f"measurement {str(values[0])[:12]!r}: {error}") from error


def plain_line(values: Sequence[Any]) -> str:
    """Return `sealed_line` of a row that `plain_samples` passes, in half the time."""
    (key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round_, status, samples,
     numerics, error_ratio, detail, measured_at) = values  # fmt: skip
    return (
        f'["{key}",{quoted(environment)},{quoted(layer)},"{gemm}",{tokens},{quoted(config)},{quoted(routing)},{rank},'
        f'{world_size},{run},{round_},"{status}",{quoted(samples)},{quoted(numerics)},'
        f"{'null' if error_ratio is None else repr(error_ratio)},{quoted(detail)},{measured_at!r}]\n"
    )


def environments_in(connection: Connection) -> Lookup[Environment]:
    """Return the environments by digest."""
    return Lookup("environment", Environment.from_json, _keyed_rows(connection, "environment"))


def layers_in(connection: Connection, named: Set[object] | None = None) -> Lookup[ExpertLayer]:
    """Return the layers by digest; those that are `named`, if any are."""
    return Lookup("layer", ExpertLayer.from_json, _keyed_rows(connection, "layer", named))


def configs_in(connection: Connection, named: Set[object] | None = None) -> Lookup[TileConfig]:
    """Return the configs by digest; those that are `named`, if any are."""
    return Lookup("config", TileConfig.from_json, _keyed_rows(connection, "config", named))


def no_configs() -> Lookup[TileConfig]:
    """Return what `read_measurements` keeps the configs in that it came to know."""
    return Lookup("config", TileConfig.from_json, ())


def _keyed_rows(connection: Connection, table: str, named: Set[object] | None = None) -> Iterator[PlainRow]:
    if named is None:
        yield from plain_rows(connection, f"SELECT digest, fields FROM {table}")
        return
    digests = iter([digest for digest in named if isinstance(digest, str)])
    while some := list(islice(digests, NAMED_AT_ONCE)):
        marks = ", ".join(f":d{place}" for place in range(len(some)))
        values = {f"d{place}": digest for place, digest in enumerate(some)}
        yield from plain_rows(connection, f"SELECT digest, fields FROM {table} WHERE digest IN ({marks})", values)


def _conditions(filters: Filters, *, indexed: bool = True) -> tuple[str, dict[str, str | int]]:
    """Return the SQL and the values; not `indexed`, which is for texts, no index is used, since it may be damaged."""
    values = {name: value for name, value in filters.items() if value is not None}
    end = "" if indexed else " || ''"
    return (" WHERE " if values else "") + " AND ".join(f"{name}{end} = :{name}" for name in values), values
