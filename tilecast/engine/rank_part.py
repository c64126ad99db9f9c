"""A rank's part of a tensor that torch.distributed splits over ranks."""

from __future__ import annotations

from typing import cast

import torch


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this rank's part of a distributed one, without gradients."""
    to_local = getattr(tensor, "to_local", None)
    with torch.no_grad():
        found: torch.Tensor = tensor if to_local is None else to_local()
        return found.detach()


def placed_like(known: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return `part` as this rank's part of a tensor that is split as `known` is; `part` itself where that is whole."""
    placements = getattr(known, "placements", None)
    if placements is None:
        return part
    # Imported here: it takes a while, and whole tensors need none of it.
    from torch.distributed.tensor import DTensor

    mesh = cast(DTensor, known).device_mesh
    found: torch.Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=known.shape, stride=known.stride()
    )
    return found
