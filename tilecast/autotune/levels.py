"""Times with what all configs of a round had in common taken out: drift, a busy memory bus, the round's own routing.

A round runs its configs one after the other on equal operands, so what slowed one of them down slowed the others, too.
In a model log time = config + round + noise, the rounds' levels are found by median polish (Tukey, "Exploratory Data
Analysis", 1977), which a few outliers do not move; then every sample is put at the level that the rounds have on
average. Configs that ran in different rounds become comparable, and the noise that is left is that of a comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import median
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tilecast.evidence import percentile

Config = TypeVar("Config", bound=Hashable)
Moment = tuple[int, ...]
"""A round, and the number of a sample within it; perhaps, before these, the rank."""
MIN_TOGETHER = 2
"""A moment in which one config was timed has no level of its own: it would take over the config's."""
SWEEPS = 8
TOLERANCE = 1e-4


def levelled(samples: Mapping[Config, Mapping[Moment, float]]) -> dict[Config, list[float]]:
    """Return each config's samples (µs, above 0) in the order of moments, without the levels of the moments.

    With few configs in a moment its level takes over a part of their noise: the spread that is left is too small by
    what was estimated, as any residual's is, while the centres are as sharp as those of differences between configs.
    """
    place = {moment: i for i, moment in enumerate(sorted({m for of_config in samples.values() for m in of_config}))}
    ordered = [sorted(of_config.items()) for of_config in samples.values()]
    values = _levelled(
        [us for mine in ordered for _, us in mine],
        [len(mine) for mine in ordered],
        [place[moment] for mine in ordered for moment, _ in mine],
        len(place),
    )
    return dict(zip(samples, values, strict=True))


def levelled_rounds(samples: Iterable[Mapping[Moment, Sequence[float]]]) -> tuple[list[list[float]], int]:
    """Return `levelled` of configs' samples by round, whose moments are their numbers in it; and the count of moments.

    The same to the bit, in a third of the time, where a round has many samples.
    """
    ordered = [list(mine.items()) if len(mine) < 2 else sorted(mine.items()) for mine in samples]
    longest: dict[Moment, int] = {}
    for mine in ordered:
        for number, values in mine:
            if longest.get(number, 0) < len(values):
                longest[number] = len(values)
    start, total = {}, 0
    for number in sorted(longest):
        start[number] = total
        total += longest[number]
    of_moment = [
        place
        for mine in ordered
        for number, values in mine
        for place in range(start[number], start[number] + len(values))
    ]
    found = _levelled(
        [us for mine in ordered for _, values in mine for us in values],
        [sum(len(values) for _, values in mine) for mine in ordered],
        of_moment,
        total,
    )
    return list(found), total


def _levelled(flat: list[float], counts: Sequence[int], moments: Sequence[int], total: int) -> Iterator[list[float]]:
    """Return each config's samples without their moments' levels; they are flat here, config after config."""
    of_moment = np.array(moments, dtype=np.int64)
    shared = np.bincount(of_moment, minlength=total) >= MIN_TOGETHER
    if shared.any():
        # Not NumPy's logarithm: it depends on the CPU it runs on.
        logs = np.array(list(map(math.log, flat)))
        of_config = np.repeat(np.arange(len(counts)), counts)
        level, own = _polished(logs, of_config, of_moment, shared)
        # The level to compare at: that of the median moment, so that times stay those of this device.
        usual = median(level[shared].tolist())
        at_level = own[of_config] + usual + (logs - level[of_moment] - own[of_config])
        if shared.all():
            flat = list(map(math.exp, at_level.tolist()))
        else:
            among = zip(at_level.tolist(), shared[of_moment].tolist(), flat, strict=True)
            flat = [math.exp(log) if known else us for log, known, us in among]
    values = iter(flat)
    return (list(islice(values, count)) for count in counts)


def moment_levels(samples: Mapping[Config, Mapping[Moment, float]]) -> dict[Moment, float]:
    """Return by how much each moment with several configs was slower than the median one, as a factor."""
    together = Counter(moment for of_config in samples.values() for moment in of_config)
    level: dict[Moment, float] = {}
    for config, values in levelled(samples).items():
        for moment, value in zip(sorted(samples[config]), values, strict=True):
            if together[moment] >= MIN_TOGETHER:
                level[moment] = samples[config][moment] / value
    return level


def drift(samples: Mapping[Config, Mapping[Moment, float]]) -> float:
    """Return by how much the slow moments exceed the fast ones: the 90th over the 10th percentile of levels, minus one.

    That is what a time of now may be off from one of another minute, whatever is compared within one; 0 without levels.
    """
    level = list(moment_levels(samples).values())
    return percentile(level, 90) / percentile(level, 10) - 1 if level else 0.0


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


def _polished(
    logs: Floats, of_config: Integers, of_moment: Integers, shared: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """Return each moment's level, 0 where it is not `shared`, and each config's own log time."""
    configs, moments = _Groups(of_config), _Groups(of_moment)
    level = np.zeros(len(shared))
    for _ in range(SWEEPS):
        own = configs.medians(logs - level[of_moment])
        new = np.where(shared, moments.medians(logs - own[of_config]), 0.0)
        moved = float(np.abs(new - level).max())
        level = new
        if moved < TOLERANCE:
            break
    return level, own


class _Groups:
    """Values by group, each of which has at least one."""

    def __init__(self, of: Integers) -> None:
        """Take each value's group, from 0."""
        self._of = of
        counts = np.bincount(of)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._low, self._high = starts + (counts - 1) // 2, starts + counts // 2

    def medians(self, values: Floats) -> Floats:
        """Return each group's median."""
        ordered = values[np.lexsort((values, self._of))]
        found: Floats = (ordered[self._low] + ordered[self._high]) / 2
        return found
