"""What was decided, with the evidence: choices, decisions and the table of them; what was measured from `measurement`.

All types here are frozen, validated when they are built, and have one canonical JSON form and digest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from tilecast.canonical import Json, digest, fields_of, quoted
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.measurement import STATUSES, Measurement, check_time, made_of, measurement_key, percentile
from tilecast.problem import Bucket, ExpertLayer, GemmName, TileConfig, check_name

__all__ = [
    "CERTIFICATES", "POLICIES", "STATUSES", "TABLE_FORMAT", "Choice", "Decision", "Measurement", "TuningTable",
    "measurement_key", "percentile",
]  # fmt: skip

POLICIES = ("reproducible", "fastest")
CERTIFICATES = ("none", "static", "model", "hardware")
"""How surely a numerics class is known, weakest first (docs/numerics.md)."""

TABLE_FORMAT = 1
"""Version of a table's JSON form."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was decided for one GEMM, with the evidence. Times are medians in µs.

    `noise` is the relative spread that a win had to exceed; `numerics` the config's class key.
    A config equal to `default` means that the default was kept.
    """

    config: TileConfig
    p50_us: float
    default: TileConfig
    default_us: float
    runner_up: TileConfig | None = None
    runner_up_us: float | None = None
    noise: float = 0.0
    numerics: str = ""

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_time("chosen config's time", self.p50_us)
        check_time("default's time", self.default_us)
        if (self.runner_up is None) != (self.runner_up_us is None):
            raise InputError("a runner-up needs a time, and a time needs a runner-up")
        if self.runner_up_us is not None:
            check_time("runner-up's time", self.runner_up_us)
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"noise is {self.noise!r}, expected a finite number of at least 0")

    @classmethod
    def of_checked(cls, **fields: Any) -> Choice:
        """Return the choice of all its fields, of which the caller knows that they pass the checks above."""
        return made_of(cls, fields)

    @property
    def margin(self) -> float | None:
        """How much slower the runner-up is, as a fraction of the chosen config's time."""
        return None if self.runner_up_us is None else self.runner_up_us / self.p50_us - 1

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "config": self.config.to_json(),
            "p50_us": float(self.p50_us),
            "default": self.default.to_json(),
            "default_us": float(self.default_us),
            "runner_up": None if self.runner_up is None else self.runner_up.to_json(),
            "runner_up_us": None if self.runner_up_us is None else float(self.runner_up_us),
            "noise": float(self.noise),
            "numerics": self.numerics,
        }

    @classmethod
    def from_json(cls, value: object) -> Choice:
        """Build from parsed JSON. Raises InputError."""
        none = type(None)
        kinds: dict[str, type | tuple[type, ...]] = {
            "config": dict, "p50_us": (float, int), "default": dict, "default_us": (float, int),
            "runner_up": (dict, none), "runner_up_us": (float, int, none), "noise": (float, int), "numerics": str,
        }  # fmt: skip
        parsed: Any = dict(fields_of(value, kinds, "choice"))
        for name in ("config", "default", "runner_up"):
            parsed[name] = None if parsed[name] is None else TileConfig.from_json(parsed[name])
        return cls(**parsed)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """For one (environment, layer, bucket, policy, routing): the up and down configs, with the evidence."""

    environment: str
    layer: ExpertLayer
    bucket: Bucket
    policy: str
    up: Choice
    down: Choice
    routing: str = "uniform"
    certificate: str = "none"

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_name("policy", self.policy, POLICIES)
        check_name("certificate", self.certificate, CERTIFICATES)
        if len(self.environment) != 64:
            raise InputError(f"environment digest is {self.environment!r}, expected 64 hexadecimal digits")

    @property
    def tuned_us(self) -> float:
        """Sum of both chosen configs' medians in µs."""
        return self.up.p50_us + self.down.p50_us

    @property
    def default_us(self) -> float:
        """Sum of both default configs' medians in µs."""
        return self.up.default_us + self.down.default_us

    def overlaps(self, other: Decision) -> bool:
        """Whether both are of one series (environment, layer, policy, routing) and cover some token count alike."""
        return (
            self.sort_key[:4] == other.sort_key[:4]
            and self.bucket.above < other.bucket.tokens
            and other.bucket.above < self.bucket.tokens
        )

    @classmethod
    def of_checked(cls, **fields: Any) -> Decision:
        """Return the decision of all its fields, of which the caller knows that they pass the checks above."""
        return made_of(cls, fields)

    def choice(self, gemm: GemmName) -> Choice:
        """Return the choice for `up` or `down`."""
        return self.up if gemm == "up" else self.down

    @property
    def sort_key(self) -> tuple[str, str, str, str, int]:
        """The order of decisions within a table; also the natural key together with the bucket."""
        return self.environment, self.layer.digest, self.policy, self.routing, self.bucket.tokens

    @cached_property
    def key(self) -> str:
        """SHA-256 of the natural key."""
        return digest(list(self.sort_key))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "environment": self.environment,
            "layer": self.layer.to_json(),
            "above": self.bucket.above,
            "tokens": self.bucket.tokens,
            "policy": self.policy,
            "routing": self.routing,
            "certificate": self.certificate,
            "up": self.up.to_json(),
            "down": self.down.to_json(),
        }

    @classmethod
    def from_json(cls, value: object) -> Decision:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "environment": str, "layer": dict, "above": int, "tokens": int, "policy": str,
            "routing": str, "certificate": str, "up": dict, "down": dict,
        }  # fmt: skip
        parsed: Any = dict(fields_of(value, kinds, "decision"))
        bucket = Bucket(above=parsed.pop("above"), tokens=parsed.pop("tokens"))
        layer = ExpertLayer.from_json(parsed.pop("layer"))
        up, down = Choice.from_json(parsed.pop("up")), Choice.from_json(parsed.pop("down"))
        return cls(layer=layer, bucket=bucket, up=up, down=down, **parsed)


@dataclass(frozen=True)
class TuningTable:
    """An immutable set of decisions with one digest: what ranks agree on, what is exported, what serving reads."""

    environments: tuple[Environment, ...] = ()
    decisions: tuple[Decision, ...] = field(default=())

    def __post_init__(self) -> None:
        """Sort and validate; raises InputError on a duplicate, an overlap or a missing environment."""
        known = {environment.digest: environment for environment in self.environments}
        object.__setattr__(self, "environments", tuple(known[key] for key in sorted(known)))
        keyed = sorted(((d.sort_key, d) for d in self.decisions), key=lambda pair: pair[0])
        object.__setattr__(self, "decisions", tuple(decision for _, decision in keyed))
        previous, previous_key = None, None
        for key, decision in keyed:
            if decision.environment not in known:
                raise InputError(f"a decision refers to environment {decision.environment[:12]}, which the table lacks")
            same_series = previous_key is not None and previous_key[:4] == key[:4]
            if same_series and previous is not None and decision.bucket.above < previous.bucket.tokens:
                raise InputError(
                    f"buckets overlap: {previous.bucket} and {decision.bucket} of layer {decision.layer.label}"
                )
            previous, previous_key = decision, key

    def __len__(self) -> int:
        """Return the number of decisions."""
        return len(self.decisions)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the table's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def for_environment(self, environment: str) -> TuningTable:
        """Return the part of the table that holds for one environment digest."""
        return TuningTable(
            tuple(e for e in self.environments if e.digest == environment),
            tuple(d for d in self.decisions if d.environment == environment),
        )

    def merged(self, other: TuningTable) -> TuningTable:
        """Return both tables' decisions; where buckets of one series overlap, `other` displaces, as in a store."""
        series: dict[tuple[str, ...], list[Decision]] = {}
        for decision in other.decisions:
            series.setdefault(decision.sort_key[:4], []).append(decision)
        kept = [d for d in self.decisions if not any(new.overlaps(d) for new in series.get(d.sort_key[:4], ()))]
        return TuningTable(self.environments + other.environments, (*kept, *other.decisions))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "format": TABLE_FORMAT,
            "environments": [environment.to_json() for environment in self.environments],
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def to_bytes(self) -> bytes:
        """Return the canonical bytes, the ones that `digest` is of."""
        return _table_text(self).encode("ascii")

    @classmethod
    def from_json(cls, value: object) -> TuningTable:
        """Build from parsed JSON. Raises InputError."""
        parsed = fields_of(value, {"format": int, "environments": list, "decisions": list}, "table")
        if parsed["format"] != TABLE_FORMAT:
            raise InputError(f"table format is {parsed['format']}, this Tilecast reads {TABLE_FORMAT}")
        environments = cast(list[object], parsed["environments"])
        decisions = cast(list[object], parsed["decisions"])
        return cls(
            tuple(Environment.from_json(e) for e in environments),
            tuple(Decision.from_json(d) for d in decisions),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TuningTable:
        """Build from canonical bytes. Raises InputError."""
        try:
            value = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise InputError(f"table is not JSON: {error}") from error
        return cls.from_json(value)


def _table_text(table: TuningTable) -> str:
    """Return `canonical_json(table.to_json())`, writing each layer and config once: a table repeats them."""
    decisions = table.decisions
    return table_text(
        [d.environment for d in decisions],
        [d.layer.canonical for d in decisions],
        [d.policy for d in decisions],
        [d.routing for d in decisions],
        [d.bucket.tokens for d in decisions],
        [d.bucket.above for d in decisions],
        [d.certificate for d in decisions],
        _texts_of([d.up for d in decisions]),
        _texts_of([d.down for d in decisions]),
        [environment.canonical for environment in table.environments],
    )


def _texts_of(choices: Sequence[Choice]) -> list[str]:
    return choice_texts(
        [c.config.canonical for c in choices],
        [float(c.p50_us) for c in choices],
        [c.default.canonical for c in choices],
        [float(c.default_us) for c in choices],
        ["null" if c.runner_up is None else c.runner_up.canonical for c in choices],
        [None if c.runner_up_us is None else float(c.runner_up_us) for c in choices],
        [float(c.noise) for c in choices],
        [c.numerics for c in choices],
    )


def table_text(
    environment: Sequence[str], layer: Sequence[str], policy: Sequence[str], routing: Sequence[str],
    tokens: Sequence[int], above: Sequence[int], certificate: Sequence[str], up: Sequence[str], down: Sequence[str],
    environments: Sequence[str],
) -> str:  # fmt: skip
    """Return a table's canonical JSON, of its decisions by columns and its environments, both in their order.

    Layers, choices and environments are given by their canonical JSON. Object keys stand in the order of their code
    points, as canonical JSON has them; in all that is written here.
    """
    heads = [f',{{"above":{a},"certificate":{b},"down":' for a, b in zip(above, _quoted(certificate), strict=True)]
    named = zip(_quoted(environment), layer, _quoted(policy), _quoted(routing), tokens, strict=True)
    between = [
        f',"environment":{a},"layer":{b},"policy":{c},"routing":{d},"tokens":{e},"up":' for a, b, c, d, e in named
    ]
    heads[:1] = [head[1:] for head in heads[:1]]
    parts = zip(heads, down, between, up, itertools.repeat("}", len(heads)), strict=True)
    end = f'],"environments":[{",".join(environments)}],"format":{TABLE_FORMAT}}}'
    # One text of megabytes, made at once.
    return "".join(['{"decisions":[', *itertools.chain.from_iterable(parts), end])


def choice_texts(
    config: Sequence[str], p50_us: Sequence[float], default: Sequence[str], default_us: Sequence[float],
    runner_up: Sequence[str], runner_up_us: Sequence[float | None], noise: Sequence[float], numerics: Sequence[str],
) -> list[str]:  # fmt: skip
    """Return the canonical JSON of choices, given by columns: configs by theirs, no runner-up as `null` and None."""
    return [
        f'{{"config":{a},"default":{c},"default_us":{d!r},"noise":{g!r},"numerics":{h},"p50_us":{b!r},'
        f'"runner_up":{e},"runner_up_us":{"null" if f is None else repr(f)}}}'
        for a, b, c, d, e, f, g, h in zip(
            config, p50_us, default, default_us, runner_up, runner_up_us, noise, _quoted(numerics), strict=True
        )
    ]


def _quoted(values: Sequence[str]) -> Iterator[str]:
    """Return each as JSON text; a column of thousands has few different ones."""
    return map({value: quoted(value) for value in set(values)}.__getitem__, values)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number here")
