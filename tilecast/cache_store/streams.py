"""Measurements by the million: read, checked and written one after the other, so that memory stays small."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Set
from typing import Any

from sqlalchemy import Connection, Table, func, select

from tilecast.cache_store import models
from tilecast.cache_store.rows import (
    DETAIL_LIMIT,
    MEASUREMENT_KINDS,
    Keyed,
    Lookup,
    Row,
    keyed_row,
    measurement_from_row,
    measurement_row,
)
from tilecast.canonical import canonical_json
from tilecast.environment import Environment
from tilecast.errors import CacheError
from tilecast.evidence import STATUSES, Decision
from tilecast.problem import ExpertLayer, TileConfig

BATCH = 2000
"""Rows that are held in memory at a time."""
COLUMNS = tuple(MEASUREMENT_KINDS)
LARGEST = 1 << 24
"""Token counts, ranks and numbers of runs and rounds above this take the long way, which knows the exact bounds."""

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
    """The measurements of one database, every one checked as `rows.measurement_from_row` checks it.

    `ages` grows as they are read: the time of the latest one, in seconds since 1970, by place. So do `layers`,
    `configs` and `environments`, what they refer to.
    """

    def __init__(self, connection: Connection, *, environments: Set[str] | None = None) -> None:
        """Read from `connection`, in whose transaction everything is seen at one instant.

        With `environments`, only the measurements made in those.
        """
        self._connection = connection
        self._only = environments
        self._of_environments = Lookup("environment", Environment.from_json, _keyed(connection, models.environment))
        self._of_layers = Lookup("layer", ExpertLayer.from_json, _keyed(connection, models.layer))
        self._of_configs = Lookup("config", TileConfig.from_json, _keyed(connection, models.config))
        self.environments: dict[str, Environment] = {}
        self.layers: dict[str, ExpertLayer] = {}
        self.configs: dict[str, TileConfig] = {}
        self.ages: dict[Place, float] = {}
        self.count = 0
        self._names: dict[str, str] = {}

    def __iter__(self) -> Iterator[Values]:
        """Yield the measurements in the order they were added. Raises InputError for one that does not fit."""
        table = models.measurement
        query = select(*(table.c[name] for name in COLUMNS)).order_by(table.c.id)
        result = self._connection.execution_options(yield_per=BATCH).execute(query)
        for found in result:
            values = tuple(found)
            if self._only is not None and values[1] not in self._only:
                continue
            if not self._is_plain(values):
                values = self._the_long_way(values)
            self.count += 1
            place = (values[1], values[2], values[6], values[4])
            if values[16] > self.ages.get(place, -math.inf):
                self.ages[place] = values[16]
            yield values

    def _is_plain(self, values: Values) -> bool:
        """Whether a row surely passes; most do. Whatever is not seen to pass here is looked at the long way."""
        (key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round_, status, samples,
         numerics, error_ratio, detail, measured_at) = values  # fmt: skip
        if environment not in self.environments or layer not in self.layers or config not in self.configs:
            return False
        if routing not in self._names or numerics not in self._names:
            return False
        if not (type(tokens) is type(rank) is type(world_size) is type(run) is type(round_) is int):
            return False
        if not (0 < tokens < LARGEST and 0 <= rank < world_size < LARGEST and 0 <= run < LARGEST > round_ >= 0):
            return False
        if gemm not in ("up", "down") or status not in STATUSES or type(measured_at) is not float:
            return False
        if not math.isfinite(measured_at) or not (type(detail) is str and len(detail) < DETAIL_LIMIT):
            return False
        if "\0" in detail or not (error_ratio is None or (type(error_ratio) is float and 0 <= error_ratio < math.inf)):
            return False
        text = (
            f'{{"config":"{config}","environment":"{environment}","gemm":"{gemm}","layer":"{layer}","rank":{rank},'
            f'"round":{round_},"routing":{self._names[routing]},"run":{run},"tokens":{tokens}}}'
        )
        if hashlib.sha256(text.encode("ascii")).hexdigest() != key:
            return False
        return _times(samples, needed=status == "ok")

    def _the_long_way(self, values: Values) -> Values:
        row = dict(zip(COLUMNS, values, strict=True))
        measurement = measurement_from_row(row, self._of_layers, self._of_configs)
        self.environments[measurement.environment] = self._of_environments[measurement.environment]
        self.layers[measurement.gemm.layer.digest] = measurement.gemm.layer
        self.configs[measurement.config.digest] = measurement.config
        for name in (measurement.routing, measurement.numerics):
            self._names[name] = canonical_json(name)
        checked = measurement_row(measurement)
        return tuple(checked[name] for name in COLUMNS)


def _times(samples: object, *, needed: bool) -> bool:
    if not isinstance(samples, str):
        return False
    try:
        values = json.loads(samples)
    except (ValueError, RecursionError):
        return False
    if not isinstance(values, list) or (needed and not values):
        return False
    return all(type(value) is float and 0 < value < math.inf for value in values)


class MeasurementSink:
    """Writes measurements of several streams into one database; of equal keys the first stays."""

    def __init__(self, connection: Connection) -> None:
        """Write through `connection`, to a SQLite file whose tables are there and which nobody else uses."""
        raw = connection.connection.driver_connection
        assert raw is not None, "SQLite's driver has connections of its own"
        self._raw = raw
        self.count = 0
        names = ", ".join(COLUMNS)
        marks = ", ".join("?" for _ in COLUMNS)
        self._insert = f"INSERT INTO measurement ({names}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"

    def add(self, rows: Iterable[Values]) -> int:
        """Write rows and return how many were new."""
        before = self._raw.total_changes
        self._raw.executemany(self._insert, rows)
        new = int(self._raw.total_changes - before)
        self.count += new
        return new


def insert_keyed(connection: Connection, table: Table, entries: Iterable[Keyed]) -> None:
    """Insert environments, layers or configs, each digest once, in order of digest."""
    found = {entry.digest: entry for entry in entries}
    rows = [keyed_row(found[digest]) for digest in sorted(found)]
    for start in range(0, len(rows), BATCH):
        connection.execute(table.insert(), rows[start : start + BATCH])


def _keyed(connection: Connection, table: Table) -> Iterable[Row]:
    for row in connection.execute(select(table.c.digest, table.c.fields)).mappings():
        if not isinstance(row["digest"], str):
            raise CacheError(f"{table.name}: a digest is not text")
        yield {"digest": row["digest"], "fields": row["fields"]}
