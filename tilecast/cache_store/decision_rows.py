"""Between decisions and flat rows: the strict, only place where either becomes the other.

A row is a mapping from column name to plain value. Rows that come from a file are checked field by field; what
does not fit raises InputError (or CacheError) that names the entry.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tilecast.cache_store.keyed import Column, Lookup, all_of, check_names
from tilecast.canonical import fields_of
from tilecast.errors import CacheError
from tilecast.evidence import CERTIFICATES, POLICIES, Choice, Decision, choice_texts, table_text
from tilecast.measurement import many_of
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

    Rows are checked by whole columns, which is faster; all take the long way where one is not seen to pass.
    """
    columns = DecisionColumns.of(rows)
    if columns is None:
        return [decision_from_row(row, layers, configs) for row in rows]
    return columns.decisions(layers, configs)


class DecisionColumns:
    """Decisions' rows in a table's order, by column: every value surely passes the checks of `Decision`."""

    def __init__(self, columns: Sequence[Column]) -> None:
        """Take columns in the order of DECISION_KINDS; use `of`."""
        self._own, choices = columns[:_CHOICES_START], columns[_CHOICES_START:]
        self._up, self._down = choices[: len(CHOICE_KINDS)], choices[len(CHOICE_KINDS) :]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> DecisionColumns | None:
        """Return rows by column; None where a row is not seen to pass: the long way says what is wrong, if anything."""
        if not rows or set(map(len, rows)) != {len(DECISION_KINDS)}:
            return None
        columns = tuple(zip(*rows, strict=True))
        environment, layer, policy, routing, tokens, above, certificate = columns[:_CHOICES_START]
        plain = (
            all_of(str, environment, layer, policy, routing, certificate)
            and all_of(int, tokens, above)
            and set(policy) <= set(POLICIES)
            and set(certificate) <= set(CERTIFICATES)
            and set(map(len, environment)) == {DIGEST_LENGTH}
            and _are_plain(*columns[_CHOICES_START:_DOWN_START])
            and _are_plain(*columns[_DOWN_START:])
        )
        if not plain:
            return None
        key = list(zip(environment, layer, policy, routing, tokens, strict=True))
        if any(map(operator.gt, key, key[1:])):
            order = sorted(range(len(key)), key=key.__getitem__)
            columns = tuple(zip(*[rows[place] for place in order], strict=True))
        return cls(columns)

    def decisions(self, layers: Lookup[ExpertLayer], configs: Lookup[TileConfig]) -> list[Decision]:
        """Build the decisions. Raises InputError for a layer, a config or a bucket that does not fit."""
        environment, layer, policy, routing, tokens, above, certificate = self._own
        ups, downs = _choices(configs, *self._up), _choices(configs, *self._down)
        buckets, found = map(_bucket, above, tokens), map(layers.__getitem__, layer)
        fields = zip(environment, found, buckets, policy, routing, certificate, ups, downs, strict=True)
        return many_of(
            Decision,
            [
                {"environment": a, "layer": b, "bucket": c, "policy": d, "routing": e, "certificate": f, "up": g,
                 "down": h}
                for a, b, c, d, e, f, g, h in fields
            ],
        )  # fmt: skip

    def table_text(self, layers: Lookup[ExpertLayer], configs: Lookup[TileConfig], environments: Sequence[str]) -> str:
        """Return the table's canonical JSON, if that is what the texts of layers and configs are: none is parsed.

        Raises CacheError for one that is absent.
        """
        environment, layer, policy, routing, tokens, above, certificate = self._own
        found = list(map(layers.texts_of(layer).__getitem__, layer))
        ups, downs = _texts(configs, *self._up), _texts(configs, *self._down)
        return table_text(environment, found, policy, routing, tokens, above, certificate, ups, downs, environments)


def _are_plain(
    config: Column, p50_us: Column, default: Column, default_us: Column, runner_up: Column, runner_up_us: Column,
    noise: Column, numerics: Column,
) -> bool:  # fmt: skip
    """Whether every choice of these columns surely passes the checks of `Choice`."""
    if None in runner_up or None in runner_up_us:
        pairs = [pair for pair in zip(runner_up, runner_up_us, strict=True) if pair != (None, None)]
        if any(None in pair for pair in pairs):
            return False
        runner_up, runner_up_us = zip(*pairs, strict=True) if pairs else ((), ())
    times = [column for column in (p50_us, default_us, runner_up_us) if column]
    return (
        all_of(str, config, default, numerics)
        and set(map(type, runner_up)) <= {str}
        and all_of(float, *times, noise)
        # A sum is finite only if all of it is.
        and all(math.isfinite(sum(column)) for column in (*times, noise))
        and min(map(min, times)) > 0
        and min(noise) >= 0
    )


def _choices(
    configs: Lookup[TileConfig], config: Column, p50_us: Column, default: Column, default_us: Column,
    runner_up: Column, runner_up_us: Column, noise: Column, numerics: Column,
) -> list[Choice]:  # fmt: skip
    chosen, defaults = (map(configs.__getitem__, column) for column in (config, default))
    seconds = [None if second is None else configs[second] for second in runner_up]
    fields = zip(chosen, p50_us, defaults, default_us, seconds, runner_up_us, noise, numerics, strict=True)
    return many_of(
        Choice,
        [
            {"config": a, "p50_us": b, "default": c, "default_us": d, "runner_up": e, "runner_up_us": f, "noise": g,
             "numerics": h}
            for a, b, c, d, e, f, g, h in fields
        ],
    )  # fmt: skip


def _texts(
    configs: Lookup[TileConfig], config: Column, p50_us: Column, default: Column, default_us: Column,
    runner_up: Column, runner_up_us: Column, noise: Column, numerics: Column,
) -> list[str]:  # fmt: skip
    known: dict[Any, str] = {None: "null", **configs.texts_of({*config, *default, *runner_up} - {None})}
    chosen, defaults, seconds = (list(map(known.__getitem__, column)) for column in (config, default, runner_up))
    return choice_texts(chosen, p50_us, defaults, default_us, seconds, runner_up_us, noise, numerics)


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
