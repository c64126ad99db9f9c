"""Between measurements and flat rows: the strict, only place where either becomes the other.

A row is a mapping from column name to plain value. Rows that come from a file are checked field by field; what
does not fit raises InputError (or CacheError) that names the entry. Most rows take a short way, since stores hold
millions; whatever is not seen to pass there takes the long way, which knows the exact bounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tilecast.cache_store.keyed import DECODER, Column, Lookup, all_of, check_names, has_utf8, name_fits, parsed_json
from tilecast.canonical import fields_of
from tilecast.errors import CacheError
from tilecast.measurement import STATUSES, Measurement, key_behind_config, key_of, keys_of, many_of
from tilecast.problem import ExpertGemm, ExpertLayer, GemmName, TileConfig

Row = Mapping[str, Any]

DETAIL_LIMIT = 4096
"""Characters of a measurement's `detail` that are kept; a compiler's output can be megabytes."""
LARGEST_SAMPLE = 1e300
"""Microseconds; JSON's integers have no end, and beyond this they have no float."""

_none = type(None)
MEASUREMENT_KINDS: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "environment": str,
    "layer": str,
    "gemm": str,
    "tokens": int,
    "config": str,
    "routing": str,
    "rank": int,
    "world_size": int,
    "run": int,
    "round": int,
    "status": str,
    "samples_us": str,
    "numerics": str,
    "error_ratio": (float, int, _none),
    "detail": str,
    "measured_at": (float, int),
}
"""Columns of a measurement's row."""


def storable(measurement: Measurement) -> Measurement:
    """Return the measurement as every store keeps it; raises CacheError for what no store can hold.

    `detail` loses what has no UTF-8 form, NUL characters, and everything past DETAIL_LIMIT.
    """
    check_names(routing=measurement.routing, numerics=measurement.numerics)
    if not math.isfinite(measurement.measured_at):
        raise CacheError(f"measurement's time is {measurement.measured_at!r}, expected finite seconds")
    if not measurement.detail:
        return measurement
    detail = measurement.detail.encode("utf-8", "replace").decode("utf-8").replace("\0", "�")
    if len(detail) > DETAIL_LIMIT:
        detail = detail[: DETAIL_LIMIT - 1] + "…"
    return measurement if detail == measurement.detail else replace(measurement, detail=detail)


def measurement_row(measurement: Measurement) -> dict[str, Any]:
    """Return the row of a storable measurement, its columns in the order of MEASUREMENT_KINDS."""
    error_ratio = measurement.error_ratio
    return {
        "key": measurement.key,
        "environment": measurement.environment,
        "layer": measurement.gemm.layer.digest,
        "gemm": measurement.gemm.name,
        "tokens": measurement.tokens,
        "config": measurement.config.digest,
        "routing": measurement.routing,
        "rank": measurement.rank,
        "world_size": measurement.world_size,
        "run": measurement.run,
        "round": measurement.round,
        "status": measurement.status,
        # Canonical JSON: they are finite floats, which the measurement itself sees to.
        "samples_us": f"[{','.join(map(repr, measurement.samples_us))}]",
        "numerics": measurement.numerics,
        # As SQL gives them back, so that a row's digest is the same before and after.
        "error_ratio": None if error_ratio is None else float(error_ratio),
        "detail": measurement.detail,
        "measured_at": float(measurement.measured_at),
    }


def measurements_from_rows(
    rows: Sequence[Sequence[Any]], layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]
) -> list[Measurement]:
    """Build measurements from their rows as `measurement_from_row` does, by whole columns, which is faster.

    All take the long way where one is not seen to pass.
    """
    columns = tuple(zip(*rows, strict=True))
    times = _plain_columns(*columns) if columns else None
    if times is None:
        return [measurement_from_row(row, layers, configs) for row in rows]
    (key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round_, status, _,
     numerics, error_ratio, detail, measured_at) = columns  # fmt: skip
    gemms = {pair: _gemm(layers[pair[0]], pair[1]) for pair in set(zip(layer, gemm, strict=True))}
    made, configured = map(gemms.__getitem__, zip(layer, gemm, strict=True)), map(configs.__getitem__, config)
    fields = zip(
        key, environment, made, tokens, configured, status, times, routing, numerics, error_ratio, rank, world_size,
        run, round_, detail, measured_at, strict=True,
    )  # fmt: skip
    return many_of(
        Measurement,
        [
            {"key": a, "environment": b, "gemm": c, "tokens": d, "config": e, "status": f, "samples_us": g,
             "routing": h, "numerics": i, "error_ratio": j, "rank": k, "world_size": m, "run": n, "round": o,
             "detail": p, "measured_at": q}
            for a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q in fields
        ],
    )  # fmt: skip


def measurement_from_row(
    values: Sequence[Any], layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]
) -> Measurement:
    """Build a measurement from its row's values, in MEASUREMENT_KINDS' order, and check its key. Raises InputError."""
    samples_us = plain_samples(values)
    if samples_us is None:
        return _measurement_checked(dict(zip(MEASUREMENT_KINDS, values, strict=True)), layers, configs)
    (key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round_, status, _,
     numerics, error_ratio, detail, measured_at) = values  # fmt: skip
    return Measurement.of_checked(
        key=key, environment=environment, gemm=_gemm(layers[layer], gemm), tokens=tokens, config=configs[config],
        status=status, samples_us=samples_us, routing=routing, numerics=numerics, error_ratio=error_ratio, rank=rank,
        world_size=world_size, run=run, round=round_, detail=detail, measured_at=measured_at,
    )  # fmt: skip


def _plain_columns(
    key: Column, environment: Column, layer: Column, gemm: Column, tokens: Column, config: Column, routing: Column,
    rank: Column, world_size: Column, run: Column, round_: Column, status: Column, samples: Column, numerics: Column,
    error_ratio: Column, detail: Column, measured_at: Column,
) -> list[tuple[float, ...]] | None:  # fmt: skip
    """Return what `plain_samples` returns of each row; None where one is not seen to pass."""
    texts = (environment, layer, gemm, config, routing, status, samples, numerics, detail)
    numbers = (tokens, rank, world_size, run, round_)
    # Types first: 1.0 and True are equal to 1, and a race is looked up once.
    if not (all_of(str, *texts) and all_of(int, *numbers) and all_of(float, measured_at)):
        return None
    races = list(zip(environment, layer, gemm, tokens, routing, rank, world_size, run, round_, status, strict=True))
    behind = {race: _race(*race) for race in set(races)}
    known = [text for text in map(behind.__getitem__, races) if text is not None]
    ratios = set(error_ratio) - {None}
    plain = (
        len(known) == len(races)
        and math.isfinite(sum(measured_at))
        and all(map(_is_name, set(numerics)))
        and all(map(_is_detail, set(detail)))
        and all(type(ratio) is float and 0 <= ratio < math.inf for ratio in ratios)
        and list(key) == keys_of(config, known)
    )
    return _times_of(samples, status) if plain else None


def _times_of(samples: Sequence[str], status: Sequence[str]) -> list[tuple[float, ...]] | None:
    """Return the samples of all rows, parsed at once; None where one is not seen to pass."""
    count, text = len(samples), "\n".join(samples)
    # That each text is one list of its own: brackets and line ends are between the texts and nowhere else.
    apart = text.count("\n") == text.count("]\n[") == count - 1 and text.count("[") == text.count("]") == count
    if not (apart and text.startswith("[") and text.endswith("]")):
        return None
    try:
        values = DECODER.decode(f"[{text}]".replace("\n", ","))
    except ValueError:
        return None
    every = list(itertools.chain.from_iterable(values))
    if every and not (set(map(type, every)) == _FLOATS and min(every) > 0 and max(every) <= LARGEST_SAMPLE):
        return None
    if not all(values) and any(not own and of == "ok" for own, of in zip(values, status, strict=True)):
        return None
    return list(map(tuple, values))


def plain_samples(values: Sequence[Any]) -> tuple[float, ...] | None:
    """Return the samples of a measurement's row that surely passes, its key included; most do.

    None is for whatever is not seen to pass here: the long way knows the exact bounds, and says what is wrong.
    """
    (key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round_, status, samples,
     numerics, error_ratio, detail, measured_at) = values  # fmt: skip
    if not (type(config) is type(detail) is type(samples) is str and _is_name(numerics)):
        return None
    behind = _race(environment, layer, gemm, tokens, routing, rank, world_size, run, round_, status)
    if behind is None:
        return None
    if type(measured_at) is not float or not math.isfinite(measured_at):
        return None
    if not _is_detail(detail):
        return None
    if error_ratio is not None and not (type(error_ratio) is float and 0 <= error_ratio < math.inf):
        return None
    if key != key_of(config, behind):
        return None
    return _plain_times(samples, needed=status == "ok")


_GEMMS = ("up", "down")
_LARGEST = 1 << 24
"""Token counts, ranks and numbers of runs and rounds from here on take the long way."""


# Typed, since 1.0 and True are equal to 1.
@lru_cache(maxsize=4096, typed=True)
def _race(
    environment: object, layer: object, gemm: object, tokens: object, routing: object, rank: object,
    world_size: object, run: object, round_: object, status: object,
) -> str | None:  # fmt: skip
    """Return what is the same in the keys of a round's rows, made once for them; None where it is not seen to pass."""
    if not (type(environment) is str and type(layer) is str and type(routing) is str and _is_name(routing)):
        return None
    if not (isinstance(gemm, str) and gemm in _GEMMS and status in STATUSES):
        return None
    if not (type(tokens) is int and type(rank) is int and type(world_size) is int):
        return None
    if not (type(run) is int and type(round_) is int):
        return None
    if not (0 < tokens < _LARGEST and 0 <= rank < world_size < _LARGEST and 0 <= run < _LARGEST > round_ >= 0):
        return None
    return key_behind_config(
        environment=environment, layer=layer, gemm=gemm, tokens=tokens, routing=routing, rank=rank, run=run,
        round=round_,
    )  # fmt: skip


def _plain_times(text: str, *, needed: bool) -> tuple[float, ...] | None:
    try:
        values, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if type(values) is not list or end != len(text):
        return None
    if not values:
        return None if needed else ()
    if set(map(type, values)) != _FLOATS or not (min(values) > 0 and max(values) <= LARGEST_SAMPLE):
        return None
    return tuple(values)


_FLOATS = {float}


@lru_cache(maxsize=4096)
def _is_name(name: object) -> bool:
    return type(name) is str and name_fits(name)


def _is_detail(detail: str) -> bool:
    return not detail or (len(detail) < DETAIL_LIMIT and "\0" not in detail and has_utf8(detail))


def _measurement_checked(row: Row, layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]) -> Measurement:
    parsed: Any = dict(fields_of(row, MEASUREMENT_KINDS, "measurement"))
    key = parsed.pop("key")
    samples = parsed_json(parsed.pop("samples_us"))
    if not isinstance(samples, list):
        raise CacheError(f"measurement {key[:12]!r}: samples_us is not a list of numbers")
    gemm = _gemm(layers[parsed.pop("layer")], parsed.pop("gemm"))
    config = configs[parsed.pop("config")]
    measurement = Measurement(gemm=gemm, config=config, samples_us=tuple(map(_time, samples)), **parsed)
    if storable(measurement) != measurement or measurement.key != key:
        raise CacheError(f"measurement {key[:12]!r}: its fields have key {measurement.key[:12]}")
    return measurement


def _gemm(layer: ExpertLayer, name: GemmName) -> ExpertGemm:
    return ExpertGemm(layer=layer, name=name)


def _time(sample: object) -> float:
    if isinstance(sample, bool) or not isinstance(sample, int | float) or abs(sample) > LARGEST_SAMPLE:
        raise CacheError(f"sample is {sample!r:.60}, expected a number of microseconds")
    return sample
