"""Which keys are real for each query: a range, and inside of it what a mask leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tilecast.errors import InputError

SLACK = 64
"""Elements behind a mask or bias that kernels may read, though never use."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyRanges:
    """The real keys of each query are those from `first` up to, not including, `stop`, less what `mask` leaves out.

    first, stop: int32 [B, 1 or H, Tq], equal where a query has no key at all; keys: Tk; mask: uint8
    [B, 1 or H, Tq, Tk], 0 for what is left out, or None; bias: float32 of that shape, added to the scores, or None.
    """

    first: torch.Tensor
    stop: torch.Tensor
    keys: int
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def full_ranges(query: torch.Tensor, key: torch.Tensor) -> KeyRanges:
    """Return ranges that leave nothing out: query [B, H, Tq, D], key [B, H, Tk, D]. They are not to be written to."""
    return _full_ranges(query.shape[0], query.shape[2], key.shape[2], query.device)


@lru_cache(maxsize=16)
def _full_ranges(batch: int, queries: int, keys: int, device: torch.device) -> KeyRanges:
    # Each layer asks for the same.
    first = torch.zeros((batch, 1, queries), dtype=torch.int32, device=device)
    return KeyRanges(first=first, stop=torch.full_like(first, keys), keys=keys)


def causal_ranges(query: torch.Tensor, key: torch.Tensor, offset: int = 0) -> KeyRanges:
    """Return ranges in which query t has the keys 0 to t + offset: query [B, H, Tq, D], key [B, H, Tk, D]."""
    batch, _, queries, _ = query.shape
    stop = torch.arange(1 + offset, queries + 1 + offset, dtype=torch.int32, device=query.device)
    stop = stop.clamp(0, key.shape[2]).expand(batch, 1, queries).contiguous()
    return KeyRanges(first=torch.zeros_like(stop), stop=stop, keys=key.shape[2])


def ranges_of(mask: torch.Tensor, batch: int, queries: int, keys: int) -> KeyRanges:
    """Return the ranges of a mask that broadcasts to [B, 1 or H, Tq, Tk]: booleans, True for real keys, or floats.

    A float mask is added to the scores; what it lowers by more than half of its dtype's range is left out. Raises
    InputError.
    """
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    try:
        mask = mask.expand(batch, mask.shape[1], queries, keys)
    except RuntimeError:
        raise InputError(f"mask is {tuple(mask.shape)}, expected [{batch}, 1 or heads, {queries}, {keys}]") from None
    bias: torch.Tensor | None = None
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise InputError(f"mask is {mask.dtype}, expected booleans (True for real keys) or floats to add")
        real = mask > torch.finfo(mask.dtype).min / 2
        added = torch.where(real, mask, 0.0).to(torch.float32)
        bias = _with_slack(added) if bool((added != 0).any()) else None
        mask = real
    positions = torch.arange(1, keys + 1, dtype=torch.int32, device=mask.device)
    stop = torch.where(mask, positions, 0).amax(-1) if keys else mask.new_zeros(mask.shape[:3], dtype=torch.int32)
    first = torch.where(mask, positions - 1, keys).amin(-1) if keys else stop
    first = torch.minimum(first, stop).to(torch.int32).contiguous()
    stop = stop.to(torch.int32).contiguous()
    whole = bool((mask.sum(-1) == stop - first).all())
    return KeyRanges(
        first=first, stop=stop, keys=keys, mask=None if whole else _with_slack(mask.to(torch.uint8)), bias=bias
    )


def _with_slack(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy with SLACK readable elements behind it."""
    room = torch.zeros(tensor.numel() + SLACK, dtype=tensor.dtype, device=tensor.device)
    copy = room[: tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    return copy
