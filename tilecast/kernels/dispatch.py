"""Sorting and routing by the fastest means on a tensor's device."""

import torch

from tilecast.kernels import routing
from tilecast.kernels.cpu import sorting
from tilecast.kernels.gpu.router import route_device
from tilecast.kernels.gpu.sorting import DeviceLayout
from tilecast.kernels.routing import ExpertLayout


def sort_slots(topk_ids: torch.Tensor, experts: int) -> ExpertLayout:
    """Sort routed slots by expert, stably, by the fastest means on the ids' device.

    `topk_ids` is an integer tensor [T, k]; ids outside [0, experts) are absent. Raises InputError.
    """
    if topk_ids.device.type == "cpu":
        return sorting.sort_slots(topk_ids, experts)
    if topk_ids.device.type == "cuda":
        return DeviceLayout(topk_ids, experts)
    return routing.sort_slots(topk_ids, experts)


def route(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score tokens and choose experts by the fastest means on hidden's device, as `routing.route` does.

    Returns ids (int32 [T, k]) and weights (float32 [T, k]). Raises InputError.
    """
    chosen = route_device if hidden.device.type == "cuda" else routing.route
    return chosen(hidden, router_weight, top_k, scoring=scoring, renormalize=renormalize)
