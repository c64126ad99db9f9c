"""Operands with a share of dead neurons, for layers whose activation makes exact zeros.

Hidden states get a mean of one, and the weight rows that decide over a neuron a small one below zero: a gate is then a
normal deviate that is positive as often as wanted. Rows that enter down have that share of exact zeros.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from tilecast.problem import EXACT_ZEROS, ExpertGemm

RAREST = 1e-4
"""Neurons are never all dead, nor all alive: a normal deviate has no such mean."""
BIAS_VARIANCE = 0.25


def has_zeros(gemm: ExpertGemm) -> bool:
    """Return whether a profile's sparsity is about this GEMM."""
    return gemm.layer.activation in EXACT_ZEROS and gemm.layer.weight_format == "dense"


def sparse_rows(rows: torch.Tensor, gemm: ExpertGemm, sparsity: float, seed: int) -> torch.Tensor:
    """Return rows of normal deviates as they enter a GEMM of that sparsity."""
    if gemm.name == "up":
        return rows + 1
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(rows.shape, generator=generator) < sparsity
    return rows.masked_fill(dead.to(rows.device), 0)


def sparse_weights(weights: torch.Tensor, gemm: ExpertGemm, sparsity: float) -> torch.Tensor:
    """Shift the rows of an up projection [E, N, K], of deviates with variance 1/K, that decide what is alive."""
    layer = gemm.layer
    if gemm.name == "down":
        return weights
    alive = min(1 - RAREST, max(RAREST, 1 - sparsity))
    # Both of dReLU's factors have to be positive, and are independent.
    alive = math.sqrt(alive) if layer.activation == "drelu" else alive
    spread = math.sqrt(2 + (BIAS_VARIANCE if layer.bias else 0))
    shift = NormalDist().inv_cdf(alive) * spread / gemm.k
    deciding = layer.intermediate if layer.gated and layer.activation != "drelu" else gemm.n
    for expert in weights:
        expert[:deciding] += torch.tensor(shift, device=weights.device)
    return weights
