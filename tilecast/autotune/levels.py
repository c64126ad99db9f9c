"""Times with what all configs of a round had in common taken out: drift, a busy memory bus, the round's own routing.

A round runs its configs one after the other on equal operands, so what slowed one of them down slowed the others, too.
In a model log time = config + round + noise, the rounds' levels are found by median polish (Tukey, "Exploratory Data
Analysis", 1977), which a few outliers do not move; then every sample is put at the level that the rounds have on
average. Configs that ran in different rounds become comparable, and the noise that is left is that of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from statistics import median
from typing import TypeVar

Config = TypeVar("Config", bound=Hashable)
Moment = tuple[int, ...]
"""A round, and the number of a sample within it; perhaps, before these, the rank."""
MIN_TOGETHER = 2
"""A moment in which one config was timed has no level of its own: it would take over the config's."""
SWEEPS = 8
TOLERANCE = 1e-4


def levelled(samples: Mapping[Config, Mapping[Moment, float]]) -> dict[Config, list[float]]:
    """Return each config's samples (µs, above 0) in the order of moments, without the levels of the moments.

    Their spread is that of the config's own noise.
    """
    logs = {config: {moment: math.log(us) for moment, us in of_config.items()} for config, of_config in samples.items()}
    by_moment: dict[Moment, list[Config]] = {}
    for config, of_config in logs.items():
        for moment in of_config:
            by_moment.setdefault(moment, []).append(config)
    shared = [moment for moment in sorted(by_moment) if len(by_moment[moment]) >= MIN_TOGETHER]
    level = dict.fromkeys(by_moment, 0.0)
    own: dict[Config, float] = {}
    for _ in range(SWEEPS):
        own = {config: median(log - level[m] for m, log in values.items()) for config, values in logs.items()}
        moved = 0.0
        for moment in shared:
            new = median(logs[config][moment] - own[config] for config in by_moment[moment])
            moved = max(moved, abs(new - level[moment]))
            level[moment] = new
        if moved < TOLERANCE:
            break
    # The level to compare at: that of the median moment, so that times stay those of this device.
    usual = median(level[moment] for moment in shared) if shared else 0.0
    found: dict[Config, list[float]] = {}
    for config, values in logs.items():
        found[config] = []
        for moment in sorted(values):
            together = len(by_moment[moment])
            if together < MIN_TOGETHER:
                found[config].append(samples[config][moment])
                continue
            # The level took over a part of each config's own noise: of n configs, all but (n - 1) / n is left.
            rest = (values[moment] - level[moment] - own[config]) * together / (together - 1)
            found[config].append(math.exp(own[config] + usual + rest))
    return found
