"""What a config's samples say: its time in a bucket, how sure that is, and whether two of them differ.

A time is the Hodges-Lehmann estimate of the samples' centre, the median of the means of all pairs: nearly as unmoved by
outliers as the median, and as sharp with two thirds of the samples. Its error follows from the spread that the
task's samples have in common, corrected by the config's own as far as that is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tilecast.autotune.levels import Moment, drift, levelled
from tilecast.evidence import Measurement
from tilecast.problem import TileConfig

NOISE_FLOOR = 0.01
"""No win below 1% is believed."""
CENTRE_FACTOR = 1.05
"""Standard error of a Hodges-Lehmann estimate over that of a mean, for normal samples (Lehmann, "Nonparametrics")."""
ONE_SIDED_95 = 1.645
"""Standard errors that a win must exceed to be one with 95% confidence."""
P90_P10_SIGMAS = 2.5631
"""Distance of the 90th from the 10th percentile of a normal distribution, in standard deviations."""
SHARED_SAMPLES = 8
"""The spread that a task's configs have in common counts like so many samples of a config's own."""
OWN_SAMPLES = 4
"""Fewer say nothing about a config's own spread."""
UNKNOWN_SPREAD = 0.05
"""Relative spread of samples where too few were taken of any config to see it."""
FEWEST_FREE = 6
"""With fewer degrees of freedom left, residuals say nothing about the spread."""
FEW_PAIRED = 12
"""Below, a list of all pairs is made faster than an array."""
MANY = 12
"""From so many configs on arrays are faster than lists."""
MAX_PAIRED = 64
"""Samples of which all pairs are made; of more the median is sharp enough."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One config's pooled samples in one bucket: the slowest rank's time in µs and its relative standard error."""

    config: TileConfig
    p50_us: float
    error: float
    samples: int


def breaks_class(measurement: Measurement) -> bool:
    """Whether a measurement records that its config's bits are not those of its class; it has no samples."""
    return measurement.status == "unstable" and not measurement.samples_us


def pool(
    measurements: Iterable[Measurement], *, anywhere: bool = False
) -> tuple[dict[TileConfig, Timing], dict[TileConfig, str]]:
    """Return the timings of the configs that are `ok` on every rank seen, and the failures of the others.

    The measurements are of one GEMM, token count and run; what records a broken class is not a failure to run. With
    `anywhere`, for ranks that divide the work, a config needs to have run on one of them: times are compared as if all
    ranks were equally fast, which is good enough to go on with, and not to decide.
    """
    samples, failures, ranks, moments = _by_rank(measurements, one=anywhere)
    counted = _centred(
        {
            config: by_rank[_slowest(by_rank)]
            for config, by_rank in samples.items()
            if config not in failures and (anywhere or set(by_rank) == ranks)
        }
    )
    spread = _Spread.of(list(counted.values()), moments)
    return {config: _timing(config, centred, spread) for config, centred in counted.items()}, failures


def centre(samples: Sequence[float]) -> float:
    """Return the Hodges-Lehmann estimate of at least one sample's centre: the median of the means of all pairs."""
    ordered = sorted(samples)
    count = len(ordered)
    if count > MAX_PAIRED:
        return _quantile(ordered, 0.5)
    if count < FEW_PAIRED:
        return _quantile(sorted([(a + b) / 2 for i, a in enumerate(ordered) for b in ordered[i:]]), 0.5)
    values = np.array(ordered)
    first, second = _pairs(count)
    means = (values[first] + values[second]) / 2
    # An odd number of means has one in the middle, which then is taken twice.
    low, high = (len(means) - 1) // 2, len(means) // 2
    means.partition((low, high))
    a, b = float(means[low]), float(means[high])
    return a + (b - a) * ((len(means) - 1) / 2 - low)


@cache
def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of all pairs among `count`, each with itself included."""
    first, second = np.triu_indices(count)
    return first, second


@dataclass(frozen=True)
class _Centred:
    """A config's samples, the smallest first, their centre and their width in µs, 0 where they are too few to tell."""

    samples: Sequence[float]
    centre: float
    width: float


def _centred(samples: Mapping[TileConfig, Sequence[float]]) -> dict[TileConfig, _Centred]:
    """Return the same of many configs at once where they have equally many samples, as sweeps do: it is faster."""
    ordered = {config: sorted(values) for config, values in samples.items()}
    alike: dict[int, list[TileConfig]] = {}
    for config, values in ordered.items():
        alike.setdefault(len(values), []).append(config)
    found = {}
    for count, configs in alike.items():
        told = count >= OWN_SAMPLES
        if len(configs) < MANY:
            for config in configs:
                values = ordered[config]
                found[config] = _Centred(values, centre(values), _width(values) if told else 0.0)
            continue
        rows = np.array([ordered[config] for config in configs])
        widths = (_quantiles(rows, 0.9) - _quantiles(rows, 0.1)) / P90_P10_SIGMAS if told else np.zeros(len(rows))
        for config, middle, width in zip(configs, _centres(rows).tolist(), widths.tolist(), strict=True):
            found[config] = _Centred(ordered[config], middle, width)
    return {config: found[config] for config in samples}


def _centres(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `centre` of each row, the same to the bit; rows are in order."""
    count = rows.shape[1]
    if count > MAX_PAIRED:
        return _quantiles(rows, 0.5)
    first, second = _pairs(count)
    return _quantiles(np.sort((rows[:, first] + rows[:, second]) / 2, axis=1), 0.5)


def _quantiles(rows: NDArray[np.float64], part: float) -> NDArray[np.float64]:
    """Return `_quantile` of each row, the same to the bit."""
    position = (rows.shape[1] - 1) * part
    low = int(position)
    high = min(low + 1, rows.shape[1] - 1)
    found: NDArray[np.float64] = rows[:, low] + (rows[:, high] - rows[:, low]) * (position - low)
    return found


@dataclass(frozen=True)
class _Spread:
    """The relative standard deviation that a task's samples have in common.

    `grown` is by how much residuals understate it: each config's centre and each moment's level are fitted to the same
    samples. `doubt` is what not knowing it exactly adds to an error.
    """

    shared: float
    grown: float
    doubt: float

    @classmethod
    def of(cls, configs: Sequence[_Centred], moments: int) -> _Spread:
        residuals = [value / one.centre - 1 for one in configs for value in one.samples]
        free = len(residuals) - len(configs) - max(0, moments - 1)
        if free < FEWEST_FREE:
            return cls(UNKNOWN_SPREAD, 1.0, _student(FEWEST_FREE))
        grown = math.sqrt(len(residuals) / free)
        return cls(_width(residuals) * grown, grown, _student(free))


def _student(free: int) -> float:
    """Return Student's 95% quantile over the normal one, for so many degrees of freedom (to 1% from three on)."""
    return 1 + 1.0 / free + 1.2 / free**2


def _width(values: Sequence[float]) -> float:
    # Wide enough to feel the long tails that times have.
    ordered = sorted(values)
    return (_quantile(ordered, 0.9) - _quantile(ordered, 0.1)) / P90_P10_SIGMAS


def _quantile(ordered: Sequence[float], part: float) -> float:
    position = (len(ordered) - 1) * part
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def pooled_samples(measurements: Iterable[Measurement]) -> dict[TileConfig, tuple[int, tuple[float, ...]]]:
    """Return for each config with samples the rank whose time counts, and that rank's samples in µs."""
    samples, _, _, _ = _by_rank(measurements)
    slowest = {config: _slowest(by_rank) for config, by_rank in samples.items()}
    return {config: (rank, tuple(samples[config][rank])) for config, rank in slowest.items()}


def moments_apart(measurements: Iterable[Measurement]) -> float:
    """Return `drift` of the rank on which it was largest: what is taken out of the samples before they are compared."""
    return max((drift(of_rank) for of_rank in _timed(measurements).values()), default=0.0)


def _timed(measurements: Iterable[Measurement]) -> dict[int, dict[TileConfig, dict[Moment, float]]]:
    """Return the samples of what ran, by rank, config and moment."""
    timed: dict[int, dict[TileConfig, dict[Moment, float]]] = {}
    for m in measurements:
        if m.status == "ok":
            moments = timed.setdefault(m.rank, {}).setdefault(m.config, {})
            moments.update({(m.rank, m.round, number): us for number, us in enumerate(m.samples_us)})
    return timed


def _by_rank(
    measurements: Iterable[Measurement], *, one: bool = False
) -> tuple[dict[TileConfig, dict[int, list[float]]], dict[TileConfig, str], set[int], int]:
    """Return the levelled samples by config and rank, the failures, the ranks, and how many levels a rank had."""
    timed: dict[int, dict[TileConfig, dict[Moment, float]]] = {}
    failures: dict[TileConfig, str] = {}
    ranks: set[int] = set()
    for m in measurements:
        if breaks_class(m):
            continue
        ranks.add(m.rank)
        if m.status != "ok":
            failures.setdefault(m.config, f"{m.status} on rank {m.rank}: {m.detail}")
            continue
        moments = timed.setdefault(0 if one else m.rank, {}).setdefault(m.config, {})
        moments.update({(m.rank, m.round, number): us for number, us in enumerate(m.samples_us)})
    samples: dict[TileConfig, dict[int, list[float]]] = {}
    levels = 0
    for rank, of_rank in timed.items():
        levels = max(levels, len({moment for moments in of_rank.values() for moment in moments}))
        for config, values in levelled(of_rank).items():
            samples.setdefault(config, {})[rank] = values
    return samples, failures, ranks, levels


def _slowest(by_rank: Mapping[int, Sequence[float]]) -> int:
    if len(by_rank) == 1:
        return next(iter(by_rank))
    return max(by_rank, key=lambda rank: (centre(by_rank[rank]), rank))


def _timing(config: TileConfig, centred: _Centred, spread: _Spread) -> Timing:
    middle, count = centred.centre, len(centred.samples)
    known = count if count >= OWN_SAMPLES else 0
    own = centred.width * spread.grown / middle
    pooled = math.sqrt((known * own**2 + SHARED_SAMPLES * spread.shared**2) / (known + SHARED_SAMPLES))
    error = CENTRE_FACTOR * spread.doubt * pooled / math.sqrt(count)
    return Timing(config=config, p50_us=middle, error=error, samples=count)


def noise(a: Timing, b: Timing) -> float:
    """Return the relative difference that a win must exceed to be one, with 95% confidence."""
    return max(NOISE_FLOOR, ONE_SIDED_95 * math.hypot(a.error, b.error))


def within_noise(a: Timing, best: Timing) -> bool:
    """Whether `a` is not measurably slower than `best`."""
    return a.p50_us <= best.p50_us * (1 + noise(a, best))


def fastest(timings: Iterable[Timing]) -> Timing:
    """Return the timing with the smallest time, equal ones by the order on configs."""
    return min(timings, key=lambda t: (t.p50_us, t.config.sort_key))
