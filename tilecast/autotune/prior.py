"""What is expected of a task's configs before they run: the cost model, corrected by what its neighbours have shown.

A neighbour is the same layer's other GEMM, another bucket, another shard or an earlier environment. Of each, only how
its configs compare with each other counts, and only as far as the model did not expect it: a config's correction is
the mean of those residuals over configs like it (Nadaraya–Watson), drawn towards none where little is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tilecast.problem import TileConfig

DOUBT_OF_MODEL = 0.25
"""Standard deviation of the log of what the model says of a config it was never corrected for."""
DOUBT_OF_NEIGHBOUR = 0.05
SHRINK = 0.3
"""Weight of the model's own opinion beside the neighbours'."""
STEP = 0.7
FARTHEST = 1.5
"""Distance of one factor of two in a parameter, and the most that one parameter can add."""
UNKNOWN_QUANTILE = 0.5
"""Where the model has no opinion, a config stands in the middle of the others."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """What another task has shown: its configs' times in µs, what the model said of them, and how near it is (0–1)."""

    times: Mapping[TileConfig, float]
    predicted: Mapping[TileConfig, float]
    weight: float


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The log of each config's expected time, and the standard deviation of its error; only differences matter."""

    log_time: dict[TileConfig, float]
    doubt: float


def expect(
    configs: Sequence[TileConfig], predicted: Mapping[TileConfig, float], neighbours: Sequence[Neighbour]
) -> Expectation:
    """Return what is expected of `configs`; `predicted` (µs) may lack some of them, or all."""
    logs = [math.log(predicted[c]) if c in predicted else math.nan for c in configs]
    known = sorted(value for value in logs if not math.isnan(value))
    middle = known[int(UNKNOWN_QUANTILE * (len(known) - 1))] if known else 0.0
    base = np.array([middle if math.isnan(value) else value for value in logs])
    # Summed for each config: the same ones run in task after task, and a kernel has far fewer than all tasks timed.
    weights: dict[TileConfig, float] = {}
    residuals: dict[TileConfig, float] = {}
    for neighbour in neighbours:
        differences = {c: math.log(us) - math.log(neighbour.predicted.get(c, 1.0)) for c, us in neighbour.times.items()}
        if len(differences) < 2:
            continue
        level = median(differences.values())
        for config, difference in differences.items():
            weights[config] = weights.get(config, 0.0) + neighbour.weight
            residuals[config] = residuals.get(config, 0.0) + neighbour.weight * (difference - level)
    if not weights:
        return Expectation(log_time=dict(zip(configs, base.tolist(), strict=True)), doubt=DOUBT_OF_MODEL)
    likeness = np.exp(-_distances(configs, list(weights)))
    total = likeness @ np.array(list(weights.values()))
    correction = (likeness @ np.array(list(residuals.values()))) / (total + SHRINK)
    trust = float(np.sort(total / (total + SHRINK))[(len(configs) - 1) // 2])
    doubt = DOUBT_OF_NEIGHBOUR + (1 - trust) * (DOUBT_OF_MODEL - DOUBT_OF_NEIGHBOUR)
    return Expectation(log_time=dict(zip(configs, (base + correction).tolist(), strict=True)), doubt=doubt)


def _distances(rows: Sequence[TileConfig], columns: Sequence[TileConfig]) -> NDArray[np.float64]:
    """Return float64 [rows, columns] distances: infinite between kernels, else a sum over parameters."""
    found = np.full((len(rows), len(columns)), math.inf)
    for kernel in {config.kernel for config in rows} & {config.kernel for config in columns}:
        own = [i for i, config in enumerate(rows) if config.kernel == kernel]
        other = [i for i, config in enumerate(columns) if config.kernel == kernel]
        names = tuple(sorted({name for i in own for name, _ in rows[i].params}))
        a, b = (
            np.array([_coordinates(side[i], names) for i in chosen]).reshape(len(chosen), len(names))
            for side, chosen in ((rows, own), (columns, other))
        )
        # Most parameters are the same in all configs, and add nothing.
        varied = [i for i in range(len(names)) if np.ptp(np.concatenate([a[:, i], b[:, i]])) > 0]
        apart = np.zeros((len(own), len(other)))
        for i in varied:
            apart += np.minimum(STEP * np.abs(a[:, i, None] - b[None, :, i]), FARTHEST)
        found[np.ix_(own, other)] = apart
    return found


@lru_cache(maxsize=1 << 14)
def _coordinates(config: TileConfig, names: tuple[str, ...]) -> tuple[float, ...]:
    params = dict(config.params)
    return tuple(_coordinate(params.get(name, 0)) for name in names)


def _coordinate(value: int | str | bool) -> float:
    if isinstance(value, str):
        # Any two names are far apart.
        return float(int.from_bytes(value.encode(), "little") % 9973) * 10
    return math.log2(1 + abs(value)) + (100.0 if value < 0 else 0.0)
