"""Which experts the tokens of a launch go to: draws of a routing profile, typical ones among several."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from tilecast.autotune.routing_profiles import UNIFORM, RoutingProfile
from tilecast.autotune.seeds import hash_seed
from tilecast.problem import ExpertLayer

DRAWS = 32
"""Routing draws tried for one with the typical number of active experts."""
MAX_DRAWN = 1 << 22
"""Scores drawn at most for one skewed routing: many tokens are typical by themselves."""
PILOT_SEED = 0x71107


def typical_active_experts(layer: ExpertLayer, tokens: int) -> int:
    """Return the expected number of this rank's experts that uniform routing of `tokens` reaches, at least 1."""
    missed = (1 - layer.top_k / layer.global_experts) ** tokens
    return max(1, round(layer.experts * (1 - missed)))


def uniform_ids(layer: ExpertLayer, tokens: int, seed: int) -> torch.Tensor:
    """Return int32 [T, k]: distinct experts per token out of all global ones, each as likely.

    Among a few draws, the one whose number of active local experts is nearest to the expected one is taken:
    the weights read would otherwise differ between launches by more than configs do. So a rank of an
    expert-parallel layer has at least one slot to work on wherever a draw gave it one.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = typical_active_experts(layer, tokens)

    def draw() -> torch.Tensor:
        scores = torch.rand(tokens, layer.global_experts, generator=generator)
        return scores.topk(layer.top_k, dim=1, sorted=False).indices

    return _most_typical(layer, seed, DRAWS, draw, lambda ids: abs(_load(layer, ids)[0] - wanted))


def routed_ids(layer: ExpertLayer, tokens: int, seed: int, profile: RoutingProfile = UNIFORM) -> torch.Tensor:
    """Return int32 [T, k]: distinct experts per token out of all global ones, drawn by a profile.

    For skewed profiles these are Gumbel top-k draws, among a few the one nearest to the median number of active local
    experts and the median load of the busiest; see `uniform_ids` for why. Raises InputError for a histogram that says
    nothing of the layer.
    """
    if profile.is_uniform:
        return uniform_ids(layer, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = profile.log_weights(layer).to(torch.float32)
    wanted, most = _typical_load(layer, tokens, profile)

    def gap_of(ids: torch.Tensor) -> int:
        active, busiest = _load(layer, ids)
        # The busiest expert's load is a sum over many tokens: within 3% it is the typical one.
        return abs(active - wanted) + max(0, abs(busiest - most) - most // 32)

    def draw() -> torch.Tensor:
        return _gumbel_topk(weights, tokens, layer.top_k, generator)

    return _most_typical(layer, seed, _draws(layer, tokens), draw, gap_of)


def _most_typical(
    layer: ExpertLayer,
    seed: int,
    draws: int,
    draw: Callable[[], torch.Tensor],
    gap_of: Callable[[torch.Tensor], int],
) -> torch.Tensor:
    """Return int32 ids of the first draw with the smallest gap, at least one slot of them a local expert's."""
    best, best_gap = torch.empty(0), math.inf
    for _ in range(draws):
        ids = draw()
        gap = gap_of(ids)
        if gap < best_gap:
            best, best_gap = ids, gap
        if gap == 0:
            break
    if layer.experts < layer.global_experts and not bool((best < layer.experts).any()):
        best[0, 0] = seed % layer.experts
    return best.to(torch.int32)


def typical_counts(layer: ExpertLayer, tokens: int, profile: RoutingProfile = UNIFORM, seed: int = 0) -> list[int]:
    """Return the rows that each of this rank's experts gets in a typical routing of `tokens` by a profile."""
    ids = routed_ids(layer, tokens, hash_seed(seed, tokens), profile)
    return torch.bincount(ids.flatten(), minlength=layer.global_experts)[: layer.experts].tolist()


@lru_cache(maxsize=256)
def _typical_load(layer: ExpertLayer, tokens: int, profile: RoutingProfile) -> tuple[int, int]:
    """Return the median number of active local experts, at least 1, and the median load of the busiest one."""
    generator = torch.Generator().manual_seed(PILOT_SEED)
    weights = profile.log_weights(layer).to(torch.float32)
    seen = [
        _load(layer, _gumbel_topk(weights, tokens, layer.top_k, generator)) for _ in range(_draws(layer, tokens) | 1)
    ]
    middle = len(seen) // 2
    return max(1, sorted(active for active, _ in seen)[middle]), max(1, sorted(most for _, most in seen)[middle])


def _draws(layer: ExpertLayer, tokens: int) -> int:
    return max(2, min(DRAWS, MAX_DRAWN // (tokens * layer.global_experts)))


def _gumbel_topk(weights: torch.Tensor, tokens: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    clocks = torch.empty(tokens, len(weights)).exponential_(generator=generator)
    # Experts that nobody chose are the last resort, which a token needs where fewer than k were chosen at all.
    return (weights.clamp(min=-1e30) - clocks.log()).topk(top_k, dim=1, sorted=False).indices


def _load(layer: ExpertLayer, ids: torch.Tensor) -> tuple[int, int]:
    counts = torch.bincount(ids.flatten(), minlength=layer.global_experts)[: layer.experts]
    return int((counts > 0).sum()), int(counts.max())
