"""Times with what all configs of a round had in common taken out: drift, a busy memory bus, the round's own routing.

A round runs its configs one after the other on equal operands, so what slowed one of them down slowed the others, too.
In a model log time = config + round + noise, the rounds' levels are found by median polish (Tukey, "Exploratory Data
Analysis", 1977), which a few outliers do not move; then every sample is put at the level that the rounds have on
average. Configs that ran in different rounds become comparable, and the noise that is left is that of a comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
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
    moments = sorted({moment for of_config in samples.values() for moment in of_config})
    place = {moment: i for i, moment in enumerate(moments)}
    # Flat, config after config and in the order of moments. Not NumPy's logarithm: it depends on the CPU it runs on.
    ordered = [sorted(of_config.items()) for of_config in samples.values()]
    flat = [us for mine in ordered for _, us in mine]
    logs = np.array(list(map(math.log, flat)))
    of_config = np.repeat(np.arange(len(ordered)), [len(mine) for mine in ordered])
    of_moment = np.array([place[moment] for mine in ordered for moment, _ in mine], dtype=np.int64)
    together = np.bincount(of_moment, minlength=len(moments))
    shared = together >= MIN_TOGETHER
    if not shared.any():
        return {config: [us for _, us in mine] for config, mine in zip(samples, ordered, strict=True)}
    level, own = _polished(logs, of_config, of_moment, shared)
    # The level to compare at: that of the median moment, so that times stay those of this device.
    usual = median(level[shared].tolist())
    rest = logs - level[of_moment] - own[of_config]
    at_level = (own[of_config] + usual + rest).tolist()
    values = iter(
        [
            math.exp(log) if among else us
            for log, among, us in zip(at_level, shared[of_moment].tolist(), flat, strict=True)
        ]
    )
    return {config: list(islice(values, len(mine))) for config, mine in zip(samples, ordered, strict=True)}


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
