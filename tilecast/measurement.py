"""What was measured: one config timed on one rank, its natural key, and what all times have in common."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from tilecast.canonical import quoted
from tilecast.errors import InputError
from tilecast.problem import ExpertGemm, TileConfig, check_int, check_name

T = TypeVar("T")

STATUSES = ("ok", "compile_error", "resource", "timeout", "runtime_error", "wrong_result", "unstable", "duplicate")


def check_time(what: str, value: object) -> None:
    """Raise InputError unless `value` is a time in µs: finite and above 0."""
    if type(value) is float and 0.0 < value < math.inf:
        return  # Nearly always, and a table has thousands.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{what} is {value!r}, expected a finite time in microseconds above 0")


def made_of(cls: type[T], fields: dict[str, Any]) -> T:
    """Return a frozen dataclass's instance: a third of the time that setting and checking every field takes."""
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", fields)
    return made


def many_of(cls: type[T], fields: Iterable[dict[str, Any]]) -> list[T]:
    """Return `made_of` of many."""
    each = list(fields)
    made = [object.__new__(cls) for _ in each]
    deque(map(object.__setattr__, made, itertools.repeat("__dict__"), each), maxlen=0)
    return made


def percentile(samples_us: tuple[float, ...] | list[float], percent: float) -> float:
    """Return the linearly interpolated percentile (0 to 100) of at least one sample, in µs."""
    ordered = sorted(samples_us)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One config timed on one rank in one round.

    The natural key is (environment, gemm, tokens, routing, config, rank, run, round): storing the same
    key twice keeps the first. `samples_us` is empty unless the status is `ok` or `unstable`.
    `error_ratio` is the error against the float64 oracle divided by same-dtype torch's error; None where
    the config was not checked in this round. `detail` says why a status is not `ok`.
    """

    environment: str
    gemm: ExpertGemm
    tokens: int
    config: TileConfig
    status: str = "ok"
    samples_us: tuple[float, ...] = ()
    routing: str = "uniform"
    numerics: str = ""
    error_ratio: float | None = None
    rank: int = 0
    world_size: int = 1
    run: int = 0
    round: int = 0
    detail: str = ""
    measured_at: float = 0.0

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_name("status", self.status, STATUSES)
        check_int("tokens", self.tokens, 1)
        check_int("world size", self.world_size, 1)
        check_int("rank", self.rank, 0, self.world_size - 1)
        check_int("run", self.run, 0, 1 << 31)
        check_int("round", self.round, 0, 1 << 31)
        object.__setattr__(self, "samples_us", tuple(float(sample) for sample in self.samples_us))
        for sample in self.samples_us:
            check_time("sample", sample)
        if self.status == "ok" and not self.samples_us:
            raise InputError("a measurement with status ok needs at least one sample")
        if self.error_ratio is not None and not (math.isfinite(self.error_ratio) and self.error_ratio >= 0):
            raise InputError(f"error ratio is {self.error_ratio!r}, expected a finite number of at least 0")

    @property
    def p20_us(self) -> float:
        """20th percentile of the samples in µs; infinity without samples."""
        return percentile(self.samples_us, 20) if self.samples_us else math.inf

    @property
    def p50_us(self) -> float:
        """Median of the samples in µs; infinity without samples."""
        return percentile(self.samples_us, 50) if self.samples_us else math.inf

    @property
    def p80_us(self) -> float:
        """80th percentile of the samples in µs; infinity without samples."""
        return percentile(self.samples_us, 80) if self.samples_us else math.inf

    @cached_property
    def key(self) -> str:
        """SHA-256 of the natural key."""
        return measurement_key(
            environment=self.environment,
            layer=self.gemm.layer.digest,
            gemm=self.gemm.name,
            tokens=self.tokens,
            routing=self.routing,
            config=self.config.digest,
            rank=self.rank,
            run=self.run,
            round=self.round,
        )

    @classmethod
    def of_checked(cls, **fields: Any) -> Measurement:
        """Return the measurement of all its fields, and its `key`, which the caller knows to pass the checks above."""
        return made_of(cls, fields)


def measurement_key(
    *, environment: str, layer: str, gemm: str, tokens: int, routing: str, config: str, rank: int, run: int, round: int
) -> str:
    """Return the SHA-256 of the canonical JSON of a measurement's natural key; layer and config by their digests.

    The text is put together here, since stores hold millions.
    """
    behind = key_behind_config(
        environment=environment, layer=layer, gemm=gemm, tokens=tokens, routing=routing, rank=rank, run=run, round=round
    )
    return key_of(config, behind)


def key_of(config: str, behind: str) -> str:
    """Return a measurement's key: of its config's digest, and of what `key_behind_config` says of its race."""
    return hashlib.sha256(f'{{"config":{quoted(config)}{behind}'.encode("ascii")).hexdigest()


def keys_of(configs: Sequence[str], behind: Sequence[str]) -> list[str]:
    """Return `key_of` of each pair of one and the other; most of them recur."""
    start = {config: f'{{"config":{quoted(config)}'.encode("ascii") for config in set(configs)}
    end = {text: text.encode("ascii") for text in set(behind)}
    return [hashlib.sha256(start[a] + end[b]).hexdigest() for a, b in zip(configs, behind, strict=True)]


def key_behind_config(
    *, environment: str, layer: str, gemm: str, tokens: int, routing: str, rank: int, run: int, round: int
) -> str:
    """Return what follows the config in the canonical JSON of a natural key: the same for all configs of a round."""
    return (
        f',"environment":{quoted(environment)},"gemm":{quoted(gemm)},"layer":{quoted(layer)},"rank":{rank},'
        f'"round":{round},"routing":{quoted(routing)},"run":{run},"tokens":{tokens}}}'
    )
