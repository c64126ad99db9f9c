"""What a config's samples say: its time in a bucket, how sure that is, and whether two of them differ.

A time is the Hodges-Lehmann estimate of the samples' centre, the median of the means of all pairs: nearly as unmoved by
outliers as the median, and as sharp with two thirds of the samples. Its error follows from the spread that the
task's samples have in common, corrected by the config's own as far as that is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tilecast.autotune.levels import Moment, levelled
from tilecast.evidence import Measurement, percentile
from tilecast.problem import TileConfig

NOISE_FLOOR = 0.01
"""No win below 1% is believed."""
CENTRE_FACTOR = 1.05
"""Standard error of a Hodges-Lehmann estimate over that of a mean, for normal samples (Lehmann, "Nonparametrics")."""
ONE_SIDED_95 = 1.645
"""Standard errors that a win must exceed to be one with 95% confidence."""
P80_P20_SIGMAS = 1.6832
"""Distance of the 80th from the 20th percentile of a normal distribution, in standard deviations."""
SHARED_SAMPLES = 8
"""The spread that a task's configs have in common counts like so many samples of a config's own."""
OWN_SAMPLES = 4
"""Fewer say nothing about a config's own spread."""
UNKNOWN_SPREAD = 0.05
"""Relative spread of samples where too few were taken of any config to see it."""
FEWEST_RESIDUALS = 6
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
    samples, failures, ranks = _by_rank(measurements, one=anywhere)
    counted = {
        config: by_rank[_slowest(by_rank)]
        for config, by_rank in samples.items()
        if config not in failures and (anywhere or set(by_rank) == ranks)
    }
    shared = shared_spread(counted.values())
    return {config: _timing(config, values, shared) for config, values in counted.items()}, failures


def centre(samples: Sequence[float]) -> float:
    """Return the Hodges-Lehmann estimate of at least one sample's centre: the median of the means of all pairs."""
    ordered = sorted(samples)
    if len(ordered) > MAX_PAIRED:
        return percentile(ordered, 50)
    return percentile([(a + b) / 2 for i, a in enumerate(ordered) for b in ordered[i:]], 50)


def shared_spread(samples: Iterable[Sequence[float]]) -> float:
    """Return the relative standard deviation that several configs' samples have around their centres."""
    residuals: list[float] = []
    for values in samples:
        if len(values) > 1:
            # A centre lies nearer to its own samples than to others: of n, all but (n - 1) / n of the variance is left.
            grown = math.sqrt(len(values) / (len(values) - 1))
            middle = centre(values)
            residuals += [(value / middle - 1) * grown for value in values]
    if len(residuals) < FEWEST_RESIDUALS:
        return UNKNOWN_SPREAD
    return (percentile(residuals, 80) - percentile(residuals, 20)) / P80_P20_SIGMAS


def pooled_samples(measurements: Iterable[Measurement]) -> dict[TileConfig, tuple[int, tuple[float, ...]]]:
    """Return for each config with samples the rank whose time counts, and that rank's samples in µs."""
    samples, _, _ = _by_rank(measurements)
    slowest = {config: _slowest(by_rank) for config, by_rank in samples.items()}
    return {config: (rank, tuple(samples[config][rank])) for config, rank in slowest.items()}


def _by_rank(
    measurements: Iterable[Measurement], *, one: bool = False
) -> tuple[dict[TileConfig, dict[int, list[float]]], dict[TileConfig, str], set[int]]:
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
    for rank, of_rank in timed.items():
        for config, values in levelled(of_rank).items():
            samples.setdefault(config, {})[rank] = values
    return samples, failures, ranks


def _slowest(by_rank: Mapping[int, Sequence[float]]) -> int:
    return max(by_rank, key=lambda rank: (centre(by_rank[rank]), rank))


def _timing(config: TileConfig, samples: Sequence[float], shared: float) -> Timing:
    middle, count = centre(samples), len(samples)
    known = count if count >= OWN_SAMPLES else 0
    own = (percentile(list(samples), 80) - percentile(list(samples), 20)) / P80_P20_SIGMAS / middle
    spread = math.sqrt((known * own**2 + SHARED_SAMPLES * shared**2) / (known + SHARED_SAMPLES))
    return Timing(config=config, p50_us=middle, error=CENTRE_FACTOR * spread / math.sqrt(count), samples=count)


def noise(a: Timing, b: Timing) -> float:
    """Return the relative difference that a win must exceed to be one, with 95% confidence."""
    return max(NOISE_FLOOR, ONE_SIDED_95 * math.hypot(a.error, b.error))


def within_noise(a: Timing, best: Timing) -> bool:
    """Whether `a` is not measurably slower than `best`."""
    return a.p50_us <= best.p50_us * (1 + noise(a, best))


def fastest(timings: Iterable[Timing]) -> Timing:
    """Return the timing with the smallest time, equal ones by the order on configs."""
    return min(timings, key=lambda t: (t.p50_us, t.config.sort_key))
