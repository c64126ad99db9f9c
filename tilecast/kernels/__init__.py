"""Implementations of the expert GEMMs, their registry, the router and the float64 oracle."""

import torch

from tilecast.kernels import routing
from tilecast.kernels.cpu import sorting
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.onednn import OneDnnLinear
from tilecast.kernels.gpu.sorting import DeviceLayout
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import Registry

registry = Registry((MoeGemm(), OneDnnLinear()))
"""The kernels of this process. The first one of a device kind gives the defaults."""


def sort_slots(topk_ids: torch.Tensor, experts: int) -> ExpertLayout:
    """Sort routed slots by expert, stably, by the fastest means on the ids' device.

    `topk_ids` is an integer tensor [T, k]; ids outside [0, experts) are absent. Raises InputError.
    """
    if topk_ids.device.type == "cpu":
        return sorting.sort_slots(topk_ids, experts)
    if topk_ids.device.type == "cuda":
        return DeviceLayout(topk_ids, experts)
    return routing.sort_slots(topk_ids, experts)


__all__ = ["registry", "sort_slots"]
