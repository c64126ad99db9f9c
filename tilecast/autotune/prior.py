"""What is expected of a task's configs before they run: the cost model, corrected by what its neighbours have shown.

A neighbour is the same layer's other GEMM, another bucket, another shard or an earlier environment. Of each, only how
its configs compare with each other counts, and only as far as the model did not expect it: a config's correction is
the mean of those residuals over configs like it (Nadaraya–Watson), drawn towards none where little is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

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
    base = torch.tensor([middle if math.isnan(value) else value for value in logs], dtype=torch.float64)
    residuals: list[float] = []
    weights: list[float] = []
    seen: list[TileConfig] = []
    for neighbour in neighbours:
        differences = {c: math.log(us) - math.log(neighbour.predicted.get(c, 1.0)) for c, us in neighbour.times.items()}
        if len(differences) < 2:
            continue
        level = median(differences.values())
        for config, difference in differences.items():
            seen.append(config)
            residuals.append(difference - level)
            weights.append(neighbour.weight)
    if not seen:
        return Expectation(log_time=dict(zip(configs, base.tolist(), strict=True)), doubt=DOUBT_OF_MODEL)
    weight = torch.exp(-_distances(configs, seen)) * torch.tensor(weights, dtype=torch.float64)
    total = weight.sum(1)
    correction = (weight @ torch.tensor(residuals, dtype=torch.float64)) / (total + SHRINK)
    trust = float((total / (total + SHRINK)).median())
    doubt = DOUBT_OF_NEIGHBOUR + (1 - trust) * (DOUBT_OF_MODEL - DOUBT_OF_NEIGHBOUR)
    return Expectation(log_time=dict(zip(configs, (base + correction).tolist(), strict=True)), doubt=doubt)


def _distances(rows: Sequence[TileConfig], columns: Sequence[TileConfig]) -> torch.Tensor:
    """Return [rows, columns] distances: infinite between kernels, else a sum over parameters."""
    found = torch.full((len(rows), len(columns)), math.inf, dtype=torch.float64)
    for kernel in {config.kernel for config in rows} & {config.kernel for config in columns}:
        own = [i for i, config in enumerate(rows) if config.kernel == kernel]
        other = [i for i, config in enumerate(columns) if config.kernel == kernel]
        names = sorted({name for i in own for name, _ in rows[i].params})
        a, b = (_coordinates([side[i] for i in chosen], names) for side, chosen in ((rows, own), (columns, other)))
        apart = (STEP * (a[:, None, :] - b[None, :, :]).abs()).clamp(max=FARTHEST).sum(2)
        found[torch.tensor(own)[:, None], torch.tensor(other)[None, :]] = apart
    return found


def _coordinates(configs: Sequence[TileConfig], names: Sequence[str]) -> torch.Tensor:
    values = [[_coordinate(dict(config.params).get(name, 0)) for name in names] for config in configs]
    return torch.tensor(values, dtype=torch.float64).reshape(len(configs), len(names))


def _coordinate(value: int | str | bool) -> float:
    if isinstance(value, str):
        # Any two names are far apart.
        return float(int.from_bytes(value.encode(), "little") % 9973) * 10
    return math.log2(1 + abs(value)) + (100.0 if value < 0 else 0.0)
