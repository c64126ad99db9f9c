"""Router, stable top-k and the expert-sorted layout, on any device, in plain torch.

Scores are float32 from the first product on. Ties go to the lower expert index: `torch.topk` promises no
order on ties, a stable descending sort does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecast.errors import InputError

SCORINGS = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Routed slots sorted by expert.

    A slot is `token * top_k + position`. `slots` (int32, [tokens * top_k]) holds expert 0's slots in ascending
    order, then expert 1's, …; `offsets` (int32, [experts + 1]) says where each expert's begin; entries past
    `offsets[-1]` have no meaning. Slots whose expert id is not in [0, experts) are absent. `ids` is int32
    [tokens, top_k].
    """

    tokens: int
    top_k: int
    experts: int
    ids: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor


def sort_slots(topk_ids: torch.Tensor, experts: int) -> ExpertLayout:
    """Sort routed slots by expert, stably. `topk_ids` is an integer tensor [T, k]; raises InputError.

    `tilecast.kernels.sort_slots` does the same in compiled code where it can.
    """
    not_integers = topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex or topk_ids.dtype == torch.bool
    if topk_ids.dim() != 2 or not_integers:
        raise InputError(f"topk_ids is {topk_ids.dtype} {tuple(topk_ids.shape)}, expected integers [tokens, top_k]")
    tokens, top_k = topk_ids.shape
    # Clamped before narrowing, so that an id such as 2**32 cannot wrap around into a real expert.
    # Narrow and unsigned types cannot hold the bounds themselves and go through int64.
    wide = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int64)
    ids = wide.clamp(-1, experts).to(torch.int32).contiguous()
    keys = torch.where(ids < 0, experts, ids).flatten()
    slots = torch.sort(keys, stable=True).indices.to(torch.int32)
    counts = torch.bincount(keys, minlength=experts + 1)[:experts]
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = counts.cumsum(0)
    return ExpertLayout(tokens=tokens, top_k=top_k, experts=experts, ids=ids, slots=slots, offsets=offsets)


def route(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score tokens and choose experts.

    hidden is [T, H], router_weight [E, H], both of any float dtype. Returns ids (int32 [T, k], by descending
    score, ties by ascending expert) and weights (float32 [T, k]). Raises InputError.
    """
    check_router(hidden, router_weight, top_k, scoring)
    logits = router_logits(hidden, router_weight)
    scores = logits.softmax(-1) if scoring == "softmax" else _sigmoid(logits)
    # On the scores themselves, not the logits: that is what the families' own code orders by.
    ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    if renormalize:
        weights = weights / ordered_sum(weights)
    return indices[:, :top_k].to(torch.int32).contiguous(), weights.contiguous()


def check_router(hidden: torch.Tensor, router_weight: torch.Tensor, top_k: int, scoring: str) -> None:
    """Raise InputError unless the operands of `route` fit together."""
    if scoring not in SCORINGS:
        raise InputError(f"scoring is {scoring!r}, expected one of {', '.join(SCORINGS)}")
    _check_shapes(hidden, router_weight)
    if not 1 <= top_k <= router_weight.shape[0]:
        raise InputError(f"top-k is {top_k}, expected 1 to {router_weight.shape[0]} (the number of experts)")


def router_logits(hidden: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [T, E] whose bits do not depend on how many tokens there are.

    A matmul library picks its kernel, and so its sum order, by shape, by a row's place in its tile and, for few
    outputs, by where the operands lie in memory. So every token is a product of its own, [1, H] by [H, E], all
    of one batch: one shape, whatever T is. Operands are brought to whole 64-byte lines first. Raises InputError.
    """
    _check_shapes(hidden, router_weight)
    weight = _whole_lines(router_weight.to(torch.float32), _MIN_ROUTER_ROWS)
    rows = _whole_lines(hidden.to(torch.float32), 1)
    tokens, experts = hidden.shape[0], router_weight.shape[0]
    logits = torch.bmm(rows[:, None, :], weight.T.expand(rows.shape[0], -1, -1))[:, 0, :]
    return logits[:tokens, :experts]


def _check_shapes(hidden: torch.Tensor, router_weight: torch.Tensor) -> None:
    if hidden.dim() != 2 or router_weight.dim() != 2 or hidden.shape[1] != router_weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(router_weight.shape)}"
        raise InputError(f"hidden states and router weight are {shapes}, expected [tokens, H] and [experts, H]")


_LINE = 16
"""Float32 elements of a 64-byte line."""
_MIN_ROUTER_ROWS = 4
"""With fewer outputs, MKL falls back to a dot product whose order depends on alignment (measured)."""


def _whole_lines(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Return float32 [R, C] as it is, or zero-padded to full lines and at least `rows` rows, starting on a line."""
    height, width = matrix.shape
    aligned = matrix.is_contiguous() and matrix.data_ptr() % (4 * _LINE) == 0
    if aligned and width % _LINE == 0 and height >= rows:
        return matrix
    padded = matrix.new_zeros(max(height, rows), -(-width // _LINE) * _LINE)
    padded[:height, :width] = matrix
    return padded


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid, bits free of an element's place; torch.sigmoid's last few go through another exp."""
    return torch.reciprocal(1 + torch.exp(-logits))


def ordered_sum(weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last dimension, kept, added in ascending position."""
    total = weights[..., :1].clone()
    for position in range(1, weights.shape[-1]):
        total += weights[..., position : position + 1]
    return total
