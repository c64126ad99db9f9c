"""Between measurements and flat rows: the strict, only place where either becomes the other.

A row is a mapping from column name to plain value. Rows that come from a file are checked field by field; what
does not fit raises InputError (or CacheError) that names the entry. Most rows take a short way, since stores hold
millions; whatever is not seen to pass there takes the long way, which knows the exact bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tilecast.cache_store.keyed import DECODER, Lookup, check_names, has_utf8, name_fits, parsed_json
from tilecast.canonical import fields_of
from tilecast.errors import CacheError
from tilecast.measurement import STATUSES, Measurement, key_behind_config, key_of
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
    if detail and (len(detail) >= DETAIL_LIMIT or "\0" in detail or not has_utf8(detail)):
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
