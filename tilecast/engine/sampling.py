"""Sampling of one row, by a generator of its own: a request's tokens do not depend on what else is in the batch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from tilecast.errors import InputError


def request_seed(seed: int, request: int) -> int:
    """Return the seed of one request of a run: another one for each (seed, request number)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request}".encode()).digest()[:8], "little")


def sample_row(
    logits_row: torch.Tensor,
    seed: int,
    step: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> int:
    """Return the token that one row of logits [V] gives at a step of the request with this seed.

    temperature 0 takes the largest logit, the lowest index on ties. Otherwise: logits over temperature, the `top_k`
    largest (0: all), of those the fewest whose probabilities reach `top_p`, and one draw by a counter-based generator
    (Philox) of (seed, step). All in float64, ties by index, so equal logits give equal tokens anywhere. Raises
    InputError.
    """
    if logits_row.dim() != 1 or logits_row.numel() == 0 or not logits_row.dtype.is_floating_point:
        raise InputError(f"logits are {logits_row.dtype} {tuple(logits_row.shape)}, expected floats [vocabulary]")
    if not (temperature >= 0 and np.isfinite(temperature)) or not 0 < top_p <= 1 or top_k < 0 or step < 0:
        raise InputError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}, step {step}: expected temperature ≥ 0, "
            "0 < top_p ≤ 1, top_k ≥ 0, step ≥ 0"
        )
    logits = logits_row.detach().to("cpu", torch.float64).numpy()
    if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all():
        raise InputError("logits hold NaN or infinity, or rule every token out: nothing can be sampled")
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    reached = np.cumsum(weights)
    if top_p < 1:
        kept = int(np.searchsorted(reached, top_p * reached[-1])) + 1
        reached = reached[:kept]
    key = np.array([seed % (1 << 64), step], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key)).random()
    return int(order[min(int(np.searchsorted(reached, draw * reached[-1], side="right")), len(reached) - 1)])
