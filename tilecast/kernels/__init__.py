"""Implementations of the expert GEMMs, their registry, the router and the float64 oracle."""

import torch

from tilecast.kernels import routing
from tilecast.kernels.cpu import sorting
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.onednn import OneDnnLinear
from tilecast.kernels.cpu.sparse import SparseExperts
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.fp8 import Fp8
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.router import route_device
from tilecast.kernels.gpu.sorting import DeviceLayout
from tilecast.kernels.gpu.split_k import SplitK
from tilecast.kernels.gpu.tma import Tma
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import Registry

registry = Registry(
    (MoeGemm(), OneDnnLinear(), SparseExperts(), Grouped(), Decode(), Tma(), Persistent(), SplitK(), Fp8())
)
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


__all__ = ["registry", "route", "sort_slots"]
