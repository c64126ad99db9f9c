"""Measurements by the million: read, checked and written one after the other, so that memory stays small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table, func, select

from tilecast.cache_store import models
from tilecast.cache_store.keyed import Keyed, keyed_row
from tilecast.cache_store.measurement_rows import (
    MEASUREMENT_KINDS,
    measurement_from_row,
    measurement_row,
    plain_samples,
)
from tilecast.cache_store.plain import plain_rows
from tilecast.cache_store.queries import (
    Seal,
    configs_in,
    environments_in,
    layers_in,
    measurements_digest,
    plain_line,
    sealed_line,
)
from tilecast.environment import Environment
from tilecast.evidence import Decision
from tilecast.problem import ExpertLayer, TileConfig

BATCH = 2000
"""Rows that are held in memory at a time."""
COLUMNS = tuple(MEASUREMENT_KINDS)

Values = tuple[Any, ...]
"""One measurement's columns, in the order of `COLUMNS`."""
Place = tuple[str, str, str, int]
"""Environment, layer, routing and tokens: what a decision's measurements have in common with it."""


def place_of(decision: Decision) -> Place:
    """Return where a decision's measurements are."""
    return decision.environment, decision.layer.digest, decision.routing, decision.bucket.tokens


def latest_times(connection: Connection) -> dict[Place, float]:
    """Return when each place of a trusted store was last measured, in seconds since 1970."""
    table = models.measurement
    columns = (table.c.environment, table.c.layer, table.c.routing, table.c.tokens)
    query = select(*columns, func.max(table.c.measured_at)).group_by(*columns)
    return {(row[0], row[1], row[2], row[3]): row[4] for row in connection.execute(query)}


class MeasurementStream:
    """The measurements of one database, every one checked as `measurement_rows.measurement_from_row` checks it.

    `ages` grows as they are read: the time of the latest one, in seconds since 1970, by place. So do `layers`,
    `configs` and `environments`, what they refer to, and `measured`, the digests of environments and of configs
    measured there. Once all are read, `seal` has gone over every row of the database as it is stored.
    """

    def __init__(self, connection: Connection, *, environments: Set[str] | None = None) -> None:
        """Read from `connection`, in whose transaction everything is seen at one instant.

        With `environments`, only the measurements made in those.
        """
        self._connection = connection
        self._only = environments
        self._of_environments = environments_in(connection)
        self._of_layers = layers_in(connection)
        self._of_configs = configs_in(connection)
        self.environments: dict[str, Environment] = {}
        self.layers: dict[str, ExpertLayer] = {}
        self.configs: dict[str, TileConfig] = {}
        self.measured: set[tuple[str, str]] = set()
        self.ages: dict[Place, float] = {}
        self.count = 0
        self.seal = Seal()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the measurements in the order they were added. Raises InputError for one that does not fit."""
        rows = plain_rows(self._connection, f"SELECT {', '.join(COLUMNS)} FROM measurement ORDER BY id")
        while part := list(islice(rows, BATCH)):
            found = Batch()
            lines = []
            for values in part:
                kept, line = self._checked(values)
                lines.append(line)
                if kept is not None:
                    found.rows.append(kept)
                    found.lines.append(line if kept is values else sealed_line(kept))
            self.seal.add(lines)
            self.count += len(found.rows)
            yield found

    def _checked(self, values: Values) -> tuple[Values | None, str]:
        """Return a row as it is to be kept, None if it is not, and its line of the seal."""
        _, environment, layer, _, tokens, config, routing = values[:7]
        wanted = self._only is None or environment in self._only
        known = environment in self.environments and layer in self.layers and config in self.configs
        if not (wanted and known and plain_samples(values) is not None):
            line = sealed_line(values)
            if not wanted:
                return None, line
            values = self._the_long_way(values)
        else:
            line = plain_line(values)
        self.measured.add((environment, config))
        measured_at, place = values[16], (environment, layer, routing, tokens)
        if measured_at > self.ages.get(place, -math.inf):
            self.ages[place] = measured_at
        return values, line

    def _the_long_way(self, values: Values) -> Values:
        measurement = measurement_from_row(values, self._of_layers, self._of_configs)
        self.environments[measurement.environment] = self._of_environments[measurement.environment]
        self.layers[measurement.gemm.layer.digest] = measurement.gemm.layer
        self.configs[measurement.config.digest] = measurement.config
        return tuple(measurement_row(measurement).values())


@dataclass
class Batch:
    """Some measurements to keep, and the line that each adds to a seal."""

    rows: list[Values] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class MeasurementSink:
    """Writes measurements of several streams into one database; of equal keys the first stays."""

    def __init__(self, connection: Connection) -> None:
        """Write through `connection`, to a SQLite file whose tables are there and which nobody else uses."""
        raw = connection.connection.driver_connection
        assert raw is not None, "SQLite's driver has connections of its own"
        self._connection = connection
        self._raw = raw
        self._seal: Seal | None = Seal()
        self.count = 0
        names = ", ".join(COLUMNS)
        marks = ", ".join("?" for _ in COLUMNS)
        self._insert = f"INSERT INTO measurement ({names}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"

    def add(self, batches: Iterable[Batch]) -> int:
        """Write rows and return how many were new."""
        first = before = self._raw.total_changes
        for batch in batches:
            self._raw.executemany(self._insert, batch.rows)
            after = self._raw.total_changes
            if self._seal is not None and after - before == len(batch.rows):
                self._seal.add(batch.lines)
            else:
                # Some were there already. Which ones the database knows: it is asked at the end.
                self._seal = None
            before = after
        self.count += before - first
        return int(before - first)

    def digest(self) -> str:
        """Return `measurements_digest` of what was written, which is not read once more where that can be spared."""
        return measurements_digest(self._connection) if self._seal is None else self._seal.digest()


def insert_keyed(connection: Connection, table: Table, entries: Iterable[Keyed]) -> None:
    """Insert environments, layers or configs, each digest once, in order of digest."""
    found = {entry.digest: entry for entry in entries}
    rows = [keyed_row(found[digest]) for digest in sorted(found)]
    for start in range(0, len(rows), BATCH):
        connection.execute(table.insert(), rows[start : start + BATCH])
