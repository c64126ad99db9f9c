"""Warm starts: what was decided for a task like this one on another shard, for other tokens, or elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tilecast.environment import Environment
from tilecast.evidence import Decision
from tilecast.problem import ExpertGemm, TileConfig

MOST = 2
"""Configs that are worth starting with: a distant relative's best is rarely among the best here."""
FARTHEST = 4.0
"""Distance beyond which a decision says nothing; one is a factor of two in tokens or in a size."""


def warm_hints(
    decisions: Iterable[tuple[Environment, Decision]], gemm: ExpertGemm, tokens: int, environment: Environment
) -> tuple[TileConfig, ...]:
    """Return the configs that were chosen for the nearest tasks on devices of this kind, nearest first."""
    ranked = []
    for made, decision in decisions:
        if made.device_kind != environment.device_kind:
            continue
        choice = decision.up if gemm.name == "up" else decision.down
        distance = _distance(decision, gemm, tokens) + 0.5 * (made.device != environment.device)
        if distance <= FARTHEST:
            ranked.append((distance, choice.config.sort_key, choice.config))
    ranked.sort(key=lambda item: item[:2])
    return tuple(dict.fromkeys(config for _, _, config in ranked))[:MOST]


def _distance(decision: Decision, gemm: ExpertGemm, tokens: int) -> float:
    """Return how far a decision's task is: infinite for another dtype, weight format or kind of layer."""
    there, here = decision.layer, gemm.layer
    if (there.dtype, there.weight_format, there.gated, there.bias) != (
        here.dtype, here.weight_format, here.gated, here.bias,
    ):  # fmt: skip
        return math.inf
    pairs = [
        (there.hidden, here.hidden), (there.intermediate, here.intermediate), (there.experts, here.experts),
        (there.top_k, here.top_k), (decision.bucket.tokens, tokens),
    ]  # fmt: skip
    return sum(abs(math.log2(a / b)) for a, b in pairs)
