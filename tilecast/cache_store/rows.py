"""Between the base types and flat rows: the strict, only place where either becomes the other.

A row is a mapping from column name to plain value. Rows that come from a file are checked field by field; what
does not fit raises InputError (or CacheError) that names the entry.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, cast

from tilecast.canonical import Json, canonical_json, fields_of
from tilecast.errors import CacheError, InputError
from tilecast.evidence import CERTIFICATES, POLICIES, STATUSES, Choice, Decision, Measurement, measurement_key
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, GemmName, TileConfig

Row = Mapping[str, Any]

DETAIL_LIMIT = 4096
"""Characters of a measurement's `detail` that are kept; a compiler's output can be megabytes."""
LARGEST_SAMPLE = 1e300
"""Microseconds; JSON's integers have no end, and beyond this they have no float."""
DIGEST_LENGTH = 64
"""Hexadecimal digits of a SHA-256."""
NAME_LIMIT = 256
"""Characters of a routing profile's or numerics class's name."""

_none = type(None)
_number = (float, int)
CHOICE_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": str,
    "p50_us": _number,
    "default": str,
    "default_us": _number,
    "runner_up": (str, _none),
    "runner_up_us": (float, int, _none),
    "noise": _number,
    "numerics": str,
}
DECISION_KINDS: dict[str, type | tuple[type, ...]] = {
    "environment": str,
    "layer": str,
    "policy": str,
    "routing": str,
    "tokens": int,
    "above": int,
    "certificate": str,
    **{f"{gemm}_{name}": kind for gemm in ("up", "down") for name, kind in CHOICE_KINDS.items()},
}
"""Columns of a decision's row. `layer` and the configs are digests of entries kept beside."""
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
    "measured_at": _number,
}
"""Columns of a measurement's row."""


class Keyed(Protocol):
    """What is kept as its canonical JSON under its digest: environments, layers and configs."""

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        ...

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        ...


T = TypeVar("T", bound=Keyed)


class Lookup(dict[str, T], Generic[T]):
    """Entries by digest, parsed and checked when first asked for, so that equal digests share one object."""

    def __init__(self, what: str, parse: Callable[[object], T], rows: Iterable[tuple[object, object]]) -> None:
        """Keep rows of `digest` and `fields`; `what` names the entries in messages."""
        super().__init__()
        self._what = what
        self._parse = parse
        self._texts: dict[object, object] = dict(rows)

    def __missing__(self, digest: str) -> T:
        """Parse an entry; raises CacheError when it is absent, not canonical or not what its digest says."""
        if digest not in self._texts:
            raise CacheError(f"{self._what} {digest[:12]!r} is referred to but absent")
        found = self[digest] = self._checked(digest, self._texts[digest])
        return found

    def all(self) -> list[T]:
        """Return every entry, ordered by digest; raises CacheError."""
        if not all(isinstance(digest, str) for digest in self._texts):
            raise CacheError(f"{self._what}: a digest is not text")
        return [self[digest] for digest in sorted(cast(Iterable[str], self._texts))]

    def _checked(self, digest: str, text: object) -> T:
        name = f"{self._what} {digest[:12]!r}"
        try:
            entry = self._parse(_parsed_json(text))
        except InputError as error:
            raise CacheError(f"{name}: {error}") from error
        canonical = canonical_json(entry.to_json())
        if canonical != text:
            raise CacheError(f"{name}: its fields are not canonical JSON")
        # The same as entry.digest, without making the JSON once more: tables have thousands of entries.
        actual = hashlib.sha256(canonical.encode("ascii")).hexdigest()
        if actual != digest:
            raise CacheError(f"{name}: its fields have digest {actual[:12]}")
        # The property's own cache, so that it is not computed once more.
        entry.__dict__["digest"] = digest
        return entry


def keyed_row(entry: Keyed) -> dict[str, Any]:
    """Return the row of an environment, layer or config."""
    return {"digest": entry.digest, "fields": canonical_json(entry.to_json())}


def storable(measurement: Measurement) -> Measurement:
    """Return the measurement as every store keeps it; raises CacheError for what no store can hold.

    `detail` loses what has no UTF-8 form, NUL characters, and everything past DETAIL_LIMIT.
    """
    _check_names(routing=measurement.routing, numerics=measurement.numerics)
    if not math.isfinite(measurement.measured_at):
        raise CacheError(f"measurement's time is {measurement.measured_at!r}, expected finite seconds")
    if not measurement.detail:
        return measurement
    detail = measurement.detail.encode("utf-8", "replace").decode("utf-8").replace("\0", "�")
    if len(detail) > DETAIL_LIMIT:
        detail = detail[: DETAIL_LIMIT - 1] + "…"
    return measurement if detail == measurement.detail else replace(measurement, detail=detail)


def settled(decisions: Iterable[Decision]) -> list[Decision]:
    """Return decisions to put at once: the last of equal keys, in table order.

    Raises CacheError for overlapping buckets and for names that no store can hold.
    """
    found = sorted({d.sort_key: d for d in decisions}.values(), key=lambda d: d.sort_key)
    for decision in found:
        _check_names(routing=decision.routing, up=decision.up.numerics, down=decision.down.numerics)
    for low, high in itertools.pairwise(found):
        if displaces(high, low):
            raise CacheError(f"{low.bucket} and {high.bucket} of {high.layer.label} overlap; put one or the other")
    return found


def displaces(new: Decision, old: Decision) -> bool:
    """Whether putting `new` removes `old`: same series, other bucket, some token count in both."""
    return new.bucket.tokens != old.bucket.tokens and new.overlaps(old)


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
    if not (type(environment) is type(layer) is type(config) is type(detail) is type(samples) is str):
        return None
    if not (_is_name(routing) and _is_name(numerics) and gemm in _GEMMS and status in STATUSES):
        return None
    if not (type(tokens) is type(rank) is type(world_size) is type(run) is type(round_) is int):
        return None
    if not (0 < tokens < _LARGEST and 0 <= rank < world_size < _LARGEST and 0 <= run < _LARGEST > round_ >= 0):
        return None
    if type(measured_at) is not float or not math.isfinite(measured_at):
        return None
    if detail and (len(detail) >= DETAIL_LIMIT or "\0" in detail or not _has_utf8(detail)):
        return None
    if error_ratio is not None and not (type(error_ratio) is float and 0 <= error_ratio < math.inf):
        return None
    if key != measurement_key(
        environment=environment, layer=layer, gemm=gemm, tokens=tokens, routing=routing, config=config, rank=rank,
        run=run, round=round_,
    ):  # fmt: skip
        return None
    return _plain_times(samples, needed=status == "ok")


_GEMMS = ("up", "down")
_LARGEST = 1 << 24
"""Token counts, ranks and numbers of runs and rounds from here on take the long way."""


def _plain_times(text: str, *, needed: bool) -> tuple[float, ...] | None:
    try:
        values, end = _DECODER.raw_decode(text)
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
    return type(name) is str and _name_fits(name)


def _measurement_checked(row: Row, layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]) -> Measurement:
    parsed: Any = dict(fields_of(row, MEASUREMENT_KINDS, "measurement"))
    key = parsed.pop("key")
    samples = _parsed_json(parsed.pop("samples_us"))
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


def decision_row(decision: Decision) -> dict[str, Any]:
    """Return the row of a decision."""
    row: dict[str, Any] = {
        "environment": decision.environment,
        "layer": decision.layer.digest,
        "policy": decision.policy,
        "routing": decision.routing,
        "tokens": decision.bucket.tokens,
        "above": decision.bucket.above,
        "certificate": decision.certificate,
    }
    for gemm, choice in (("up", decision.up), ("down", decision.down)):
        for name in CHOICE_KINDS:
            value = getattr(choice, name)
            row[f"{gemm}_{name}"] = value.digest if isinstance(value, TileConfig) else value
    return row


def decision_configs(decision: Decision) -> list[TileConfig]:
    """Return every config that a decision refers to, with repetitions."""
    choices = (decision.up, decision.down)
    return [c for choice in choices for c in (choice.config, choice.default, choice.runner_up) if c is not None]


def decision_from_row(values: Sequence[Any], layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]) -> Decision:
    """Build a decision from its row's values, in the order of DECISION_KINDS. Raises InputError."""
    types = tuple(map(type, values))
    if types not in _SOUND_TYPES:
        fields_of(dict(zip(DECISION_KINDS, values, strict=True)), DECISION_KINDS, "decision")
        _SOUND_TYPES.add(types)
    environment, layer, policy, routing, tokens, above, certificate = values[:_CHOICES_START]
    plain = policy in POLICIES and certificate in CERTIFICATES and len(environment) == DIGEST_LENGTH
    make = Decision.of_checked if plain else Decision
    return make(
        environment=environment,
        layer=layers[layer],
        bucket=_bucket(above, tokens),
        policy=policy,
        routing=routing,
        certificate=certificate,
        up=_choice(values[_CHOICES_START:_DOWN_START], configs),
        down=_choice(values[_DOWN_START:], configs),
    )


_CHOICES_START = len(DECISION_KINDS) - 2 * len(CHOICE_KINDS)
_DOWN_START = _CHOICES_START + len(CHOICE_KINDS)
_SOUND_TYPES: set[tuple[type, ...]] = set()
"""Types of rows that passed `fields_of`, which decides by nothing else. At most a few hundred combinations pass."""


@lru_cache(maxsize=1024)
def _bucket(above: int, tokens: int) -> Bucket:
    return Bucket(above=above, tokens=tokens)


def _choice(values: Sequence[Any], configs: Lookup[TileConfig]) -> Choice:
    config, p50_us, default, default_us, runner_up, runner_up_us, noise, numerics = values
    # What is not seen to pass here is left to the checks of `Choice`, which say why.
    plain = 0 < p50_us < math.inf and 0 < default_us < math.inf and 0 <= noise < math.inf
    if runner_up is None or runner_up_us is None:
        plain = plain and runner_up is runner_up_us
    else:
        plain = plain and 0 < runner_up_us < math.inf
    make = Choice.of_checked if plain else Choice
    return make(
        config=configs[config],
        p50_us=p50_us,
        default=configs[default],
        default_us=default_us,
        runner_up=None if runner_up is None else configs[runner_up],
        runner_up_us=runner_up_us,
        noise=noise,
        numerics=numerics,
    )


def _time(sample: object) -> float:
    if isinstance(sample, bool) or not isinstance(sample, int | float) or abs(sample) > LARGEST_SAMPLE:
        raise CacheError(f"sample is {sample!r:.60}, expected a number of microseconds")
    return sample


def _check_names(**names: str) -> None:
    for what, name in names.items():
        if not _name_fits(name):
            raise CacheError(f"{what} is {name[:40]!r}, expected at most {NAME_LIMIT} characters of plain text")


@lru_cache(maxsize=4096)
def _name_fits(name: str) -> bool:
    return "\0" not in name and len(name) <= NAME_LIMIT and _has_utf8(name)


def _has_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parsed_json(text: object) -> object:
    if not isinstance(text, str):
        raise CacheError(f"expected JSON text, got {type(text).__name__}")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"not JSON: {error}") from error


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not a number here")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Made once: `json.loads` makes one a call, which takes longer than parsing a config."""
