"""The expert-sorted layout in compiled code: a stable counting sort, a few µs where torch takes tens."""

from __future__ import annotations

import ctypes

import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu._sorting import SORT_ARGS, emit_sort
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import load, run
from tilecast.kernels.routing import ExpertLayout

_Block = ctypes.c_int64 * len(SORT_ARGS)
_addresses: dict[torch.dtype, int] = {}


def _address(dtype: torch.dtype) -> int:
    known = _addresses.get(dtype)
    if known is None:
        bits = 64 if dtype == torch.int64 else 32
        known = load(
            lambda module: emit_sort(module, "sort_slots", bits, host_isa().lanes), {"sort_slots": bits}, "sort_slots"
        )
        _addresses[dtype] = known
    return known


def sort_slots(topk_ids: torch.Tensor, experts: int) -> ExpertLayout:
    """Do on CPU tensors what `tilecast.kernels.routing.sort_slots` does, in compiled code; raises InputError."""
    if topk_ids.dim() != 2 or topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise InputError(f"topk_ids is {topk_ids.dtype} {tuple(topk_ids.shape)}, expected integers [tokens, top_k]")
    if topk_ids.dtype not in (torch.int64, torch.int32):
        topk_ids = topk_ids.to(torch.int64)
    given = topk_ids.contiguous()
    tokens, top_k = given.shape
    count = tokens * top_k
    if count >= 1 << 31:
        raise InputError(f"{tokens} tokens × top-{top_k} are more slots than int32 counts; split the batch")
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device="cpu")
    slots = torch.empty(count, dtype=torch.int32, device="cpu")
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="cpu")
    block = _Block(count, experts, given.data_ptr(), ids.data_ptr(), slots.data_ptr(), offsets.data_ptr())
    run(_address(given.dtype), ctypes.addressof(block), 1)
    return ExpertLayout(tokens=tokens, top_k=top_k, experts=experts, ids=ids, slots=slots, offsets=offsets)
