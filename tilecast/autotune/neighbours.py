"""What the tasks that are done say about the next one: how near they are, what was best there, what they showed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tilecast.autotune.timing import Timing
from tilecast.canonical import digest
from tilecast.problem import ExpertGemm, TileConfig

HINTS = 2
"""The best configs of the buckets measured before start in the next one."""
OTHER_GEMM = 0.5
OTHER_LAYER = 0.6
BUCKET_STEP = 0.35
"""How near a task is whose GEMM, layer, or bucket (by a factor of two in tokens) is another."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a finished task has shown: the medians in µs of the configs that ran, and what was expected of them."""

    gemm: ExpertGemm
    tokens: int
    times: Mapping[TileConfig, float]
    predicted: Mapping[TileConfig, float]


def medians(timings: Mapping[TileConfig, Timing]) -> dict[TileConfig, float]:
    """Return the time in µs of each config."""
    return {config: timing.p50_us for config, timing in timings.items()}


def nearness(seen: Shown, gemm: ExpertGemm, tokens: int) -> float:
    """Return how much a task says about another one (0 to 1)."""
    near = math.exp(-BUCKET_STEP * abs(math.log2(seen.tokens / tokens)))
    if seen.gemm.name != gemm.name:
        near *= OTHER_GEMM
    if seen.gemm.layer != gemm.layer:
        near *= OTHER_LAYER
    return near


def best_of_nearest(
    shown: Sequence[Shown], gemm: ExpertGemm, tokens: int, configs: Collection[TileConfig]
) -> tuple[TileConfig, ...]:
    """Return the best configs of the nearest tasks that are candidates here."""
    found: dict[TileConfig, None] = {}
    for seen in sorted(shown, key=lambda seen: -nearness(seen, gemm, tokens)):
        best = min(seen.times, key=lambda config: (seen.times[config], config.sort_key))
        if best in configs:
            found[best] = None
    return tuple(found)[:HINTS]


def drawn(configs: Sequence[TileConfig], seed: int) -> tuple[TileConfig, ...]:
    """Return the configs in an order that favours no corner of the space."""
    return tuple(sorted(configs, key=lambda config: digest({"seed": seed, "config": config.digest})))
