"""Between decisions and flat rows: the strict, only place where either becomes the other.

A row is a mapping from column name to plain value. Rows that come from a file are checked field by field; what
does not fit raises InputError (or CacheError) that names the entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tilecast.cache_store.keyed import Lookup, check_names
from tilecast.canonical import fields_of
from tilecast.errors import CacheError
from tilecast.evidence import CERTIFICATES, POLICIES, Choice, Decision
from tilecast.measurement import made_of
from tilecast.problem import Bucket, ExpertLayer, TileConfig

DIGEST_LENGTH = 64
"""Hexadecimal digits of a SHA-256."""

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


def settled(decisions: Iterable[Decision]) -> list[Decision]:
    """Return decisions to put at once: the last of equal keys, in table order.

    Raises CacheError for overlapping buckets and for names that no store can hold.
    """
    found = sorted({d.sort_key: d for d in decisions}.values(), key=lambda d: d.sort_key)
    for decision in found:
        check_names(routing=decision.routing, up=decision.up.numerics, down=decision.down.numerics)
    for low, high in itertools.pairwise(found):
        if displaces(high, low):
            raise CacheError(f"{low.bucket} and {high.bucket} of {high.layer.label} overlap; put one or the other")
    return found


def displaces(new: Decision, old: Decision) -> bool:
    """Whether putting `new` removes `old`: same series, other bucket, some token count in both."""
    return new.bucket.tokens != old.bucket.tokens and new.overlaps(old)


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


def decisions_from_rows(
    rows: Sequence[Sequence[Any]], layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]
) -> list[Decision]:
    """Build decisions from their rows as `decision_from_row` does, in any order. Raises InputError.

    Rows with all values are checked by whole columns, which is faster; the others, and all where one is not seen to
    pass, take the long way.
    """
    whole = [row for row in rows if None not in row]
    if not whole:
        return [decision_from_row(row, layers, configs) for row in rows]
    environment, layer, policy, routing, tokens, above, certificate, *choices = zip(*whole, strict=True)
    half = len(CHOICE_KINDS)
    plain = (
        _all_of(str, environment, layer, policy, routing, certificate)
        and _all_of(int, tokens, above)
        and set(policy) <= set(POLICIES)
        and set(certificate) <= set(CERTIFICATES)
        and set(map(len, environment)) == {DIGEST_LENGTH}
        and _are_plain(*choices[:half])
        and _are_plain(*choices[half:])
    )
    if not plain:
        return [decision_from_row(row, layers, configs) for row in rows]
    rest = [decision_from_row(row, layers, configs) for row in rows if None in row] if len(whole) < len(rows) else []
    ups, downs = _choices(configs, *choices[:half]), _choices(configs, *choices[half:])
    buckets, found = map(_bucket, above, tokens), map(layers.__getitem__, layer)
    fields = zip(environment, found, buckets, policy, routing, certificate, ups, downs, strict=True)
    return rest + [
        made_of(
            Decision,
            {"environment": a, "layer": b, "bucket": c, "policy": d, "routing": e, "certificate": f, "up": g,
             "down": h},
        )
        for a, b, c, d, e, f, g, h in fields
    ]  # fmt: skip


Column = Sequence[Any]


def _all_of(kind: type, *columns: Column) -> bool:
    return all(set(map(type, column)) == {kind} for column in columns)


def _are_plain(
    config: Column, p50_us: Column, default: Column, default_us: Column, runner_up: Column, runner_up_us: Column,
    noise: Column, numerics: Column,
) -> bool:  # fmt: skip
    """Whether every choice of these columns surely passes the checks of `Choice`."""
    return (
        _all_of(str, config, default, runner_up, numerics)
        and _all_of(float, p50_us, default_us, runner_up_us, noise)
        and all(all(map(math.isfinite, column)) for column in (p50_us, default_us, runner_up_us, noise))
        and min(map(min, (p50_us, default_us, runner_up_us))) > 0
        and min(noise) >= 0
    )


def _choices(
    configs: Lookup[TileConfig], config: Column, p50_us: Column, default: Column, default_us: Column,
    runner_up: Column, runner_up_us: Column, noise: Column, numerics: Column,
) -> list[Choice]:  # fmt: skip
    chosen, defaults, seconds = (map(configs.__getitem__, column) for column in (config, default, runner_up))
    return [
        made_of(
            Choice,
            {"config": a, "p50_us": b, "default": c, "default_us": d, "runner_up": e, "runner_up_us": f, "noise": g,
             "numerics": h},
        )
        for a, b, c, d, e, f, g, h in zip(
            chosen, p50_us, defaults, default_us, seconds, runner_up_us, noise, numerics, strict=True
        )
    ]  # fmt: skip


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
