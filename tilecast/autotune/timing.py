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

from tilecast.autotune.levels import Moment, drift, levelled_rounds
from tilecast.evidence import Measurement
from tilecast.measurement import made_of
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


@dataclass(frozen=True)
class Pool:
    """What the measurements of one GEMM, token count and run say.

    `timings` are of the configs that are `ok` on every rank seen, `failures` of the others. `samples` are the levelled
    ones in µs, by rank, in the order of the configs beside them: whoever needs no more is spared the look-ups.
    """

    timings: dict[TileConfig, Timing]
    failures: dict[TileConfig, str]
    samples: Mapping[int, tuple[Sequence[TileConfig], Sequence[Sequence[float]]]]

    def by_config(self) -> dict[TileConfig, dict[int, Sequence[float]]]:
        """Return the levelled samples in µs by config and rank."""
        found: dict[TileConfig, dict[int, Sequence[float]]] = {}
        for rank, (configs, values) in self.samples.items():
            for config, own in zip(configs, values, strict=True):
                found.setdefault(config, {})[rank] = own
        return found

    def slowest(self) -> dict[TileConfig, tuple[int, tuple[float, ...]]]:
        """Return for each config with samples the rank whose time counts, and that rank's samples in µs."""
        every = self.by_config()
        ranks = {config: _slowest(by_rank) for config, by_rank in every.items()}
        return {config: (rank, tuple(every[config][rank])) for config, rank in ranks.items()}


def pool(
    measurements: Iterable[Measurement], *, anywhere: bool = False
) -> tuple[dict[TileConfig, Timing], dict[TileConfig, str]]:
    """Return the timings of the configs that are `ok` on every rank seen, and the failures of the others.

    The measurements are of one GEMM, token count and run; what records a broken class is not a failure to run. With
    `anywhere`, for ranks that divide the work, a config needs to have run on one of them: times are compared as if all
    ranks were equally fast, which is good enough to go on with, and not to decide.
    """
    found = pooled(measurements, anywhere=anywhere)
    return found.timings, found.failures


def pooled(measurements: Iterable[Measurement], *, anywhere: bool = False) -> Pool:
    """Return all that `pool` goes by."""
    timed, failures, ranks = _by_rank(measurements, one=anywhere)
    samples, moments = {}, 0
    for rank, of_rank in timed.items():
        values, levels = levelled_rounds(of_rank.values())
        samples[rank] = list(of_rank), values
        moments = max(moments, levels)
    found = Pool({}, failures, samples)
    configs, counted = _counted(found, 1 if anywhere else len(ranks))
    centred = _centred(counted)
    found.timings.update(zip(configs, _timings(configs, centred, _Spread.of(centred, moments)), strict=True))
    return found


def _counted(found: Pool, ranks: int) -> tuple[Sequence[TileConfig], Sequence[Sequence[float]]]:
    """Return the configs that ran on so many ranks and failed on none, and the slowest rank's samples of each."""
    if ranks == len(found.samples) == 1 and not found.failures:
        (only,) = found.samples.values()
        return only
    counted = {
        config: by_rank[_slowest(by_rank)]
        for config, by_rank in found.by_config().items()
        if len(by_rank) == ranks and config not in found.failures
    }
    return list(counted), list(counted.values())


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
    """Configs' samples, each one's smallest first, their centres and widths in µs, 0 where too few tell nothing."""

    samples: list[list[float]]
    centres: list[float]
    widths: list[float]


def _centred(samples: Sequence[Sequence[float]]) -> _Centred:
    """Look at each config's samples; many at once where there are equally many of each, as in sweeps: it is faster."""
    alike: dict[int, list[int]] = {}
    for place, values in enumerate(samples):
        alike.setdefault(len(values), []).append(place)
    if len(alike) == 1 and len(samples) >= MANY:
        return _alike(samples)
    ordered, centres, widths = [sorted(values) for values in samples], [0.0] * len(samples), [0.0] * len(samples)
    for count, places in alike.items():
        if len(places) >= MANY:
            found = _alike([ordered[place] for place in places])
            of_these = found.centres, found.widths
        else:
            told = count >= OWN_SAMPLES
            own = [ordered[place] for place in places]
            of_these = list(map(centre, own)), [_width_of(values) if told else 0.0 for values in own]
        for place, middle, width in zip(places, *of_these, strict=True):
            centres[place], widths[place] = middle, width
    return _Centred(ordered, centres, widths)


def _alike(samples: Sequence[Sequence[float]]) -> _Centred:
    """Return `_centred` of samples that are equally many of each config, the same to the bit."""
    rows = np.array(samples)
    rows.sort(axis=1)
    if rows.shape[1] >= OWN_SAMPLES:
        widths = ((_quantiles(rows, 0.9) - _quantiles(rows, 0.1)) / P90_P10_SIGMAS).tolist()
    else:
        widths = [0.0] * len(rows)
    return _Centred(rows.tolist(), _centres(rows).tolist(), widths)


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
    def of(cls, configs: _Centred, moments: int) -> _Spread:
        counts = list(map(len, configs.samples))
        every = np.array([value for values in configs.samples for value in values])
        residuals = np.sort(every / np.repeat(np.array(configs.centres), counts) - 1).tolist()
        free = len(residuals) - len(counts) - max(0, moments - 1)
        if free < FEWEST_FREE:
            return cls(UNKNOWN_SPREAD, 1.0, _student(FEWEST_FREE))
        grown = math.sqrt(len(residuals) / free)
        return cls(_width_of(residuals) * grown, grown, _student(free))


def _student(free: int) -> float:
    """Return Student's 95% quantile over the normal one, for so many degrees of freedom (to 1% from three on)."""
    return 1 + 1.0 / free + 1.2 / free**2


def _width_of(ordered: Sequence[float]) -> float:
    # Wide enough to feel the long tails that times have.
    return (_quantile(ordered, 0.9) - _quantile(ordered, 0.1)) / P90_P10_SIGMAS


def _quantile(ordered: Sequence[float], part: float) -> float:
    position = (len(ordered) - 1) * part
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


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
) -> tuple[dict[int, dict[TileConfig, dict[Moment, tuple[float, ...]]]], dict[TileConfig, str], set[int]]:
    """Return the samples by rank, config and round, the failures, and the ranks; with `one`, all ranks are one."""
    timed: dict[int, dict[TileConfig, dict[Moment, tuple[float, ...]]]] = {}
    failures: dict[TileConfig, str] = {}
    ranks: set[int] = set()
    for m in measurements:
        if m.status != "ok":
            if not breaks_class(m):
                ranks.add(m.rank)
                failures.setdefault(m.config, f"{m.status} on rank {m.rank}: {m.detail}")
            continue
        ranks.add(m.rank)
        rounds = timed.setdefault(0 if one else m.rank, {}).setdefault(m.config, {})
        # Of a round that is given twice the later samples count, as far as they go.
        number, before = (m.rank, m.round), rounds.get((m.rank, m.round))
        rounds[number] = m.samples_us if before is None else m.samples_us + before[len(m.samples_us) :]
    return timed, failures, ranks


def _slowest(by_rank: Mapping[int, Sequence[float]]) -> int:
    if len(by_rank) == 1:
        return next(iter(by_rank))
    return max(by_rank, key=lambda rank: (centre(by_rank[rank]), rank))


def _timings(configs: Sequence[TileConfig], centred: _Centred, spread: _Spread) -> list[Timing]:
    shared, factor = SHARED_SAMPLES * spread.shared**2, CENTRE_FACTOR * spread.doubt
    found = []
    for config, values, middle, width in zip(configs, centred.samples, centred.centres, centred.widths, strict=True):
        count = len(values)
        known = count if count >= OWN_SAMPLES else 0
        own = width * spread.grown / middle
        error = factor * math.sqrt((known * own**2 + shared) / (known + SHARED_SAMPLES)) / math.sqrt(count)
        found.append(made_of(Timing, {"config": config, "p50_us": middle, "error": error, "samples": count}))
    return found


def noise(a: Timing, b: Timing) -> float:
    """Return the relative difference that a win must exceed to be one, with 95% confidence."""
    return max(NOISE_FLOOR, ONE_SIDED_95 * math.hypot(a.error, b.error))


def within_noise(a: Timing, best: Timing) -> bool:
    """Whether `a` is not measurably slower than `best`."""
    return a.p50_us <= best.p50_us * (1 + noise(a, best))


def fastest(timings: Iterable[Timing]) -> Timing:
    """Return the timing with the smallest time, equal ones by the order on configs."""
    return min(timings, key=lambda t: (t.p50_us, t.config.sort_key))
