"""The expert-sorted layout in compiled code: a stable counting sort, a few µs where torch takes tens."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from llvmlite import ir

from tilecast.errors import InputError
from tilecast.kernels.cpu._build import I32, I64, PTR, VOID, Emit, i32, i64
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import load, run
from tilecast.kernels.routing import ExpertLayout

_Block = ctypes.c_int64 * 6
# count, experts, given ids, then the results: ids, slots, offsets
_addresses: dict[torch.dtype, int] = {}


def _build_sort(module: Any, bits: int) -> None:
    isa = host_isa()
    emit = Emit(ir.Function(module, ir.FunctionType(VOID, [PTR]), "sort_slots"), isa.lanes, isa.fma)
    block = emit.function.args[0]
    count, experts = emit.load(block, 0, I64), emit.load(block, 8, I64)
    given, ids, slots, offsets = (emit.load(block, 8 * i, PTR) for i in range(2, 6))

    with emit.loop(0, emit.iadd(experts, 1)) as e:
        emit.store(i32(0), offsets, emit.imul(e, 4))
    with emit.loop(0, count) as i:
        value = emit.load(given, emit.imul(i, bits // 8), ir.IntType(bits))
        wide = value if bits == 64 else emit.sext(value, I64)
        # Unsigned, so that negative ids are out of range too.
        present = emit.icmp_unsigned("<", wide, experts)
        emit.store(emit.select(present, emit.trunc(wide, I32), i32(-1)), ids, emit.imul(i, 4))
        with emit.builder.if_then(present):
            at = emit.imul(emit.iadd(wide, 1), 4)
            emit.store(emit.add(emit.load(offsets, at, I32), i32(1)), offsets, at)
    with emit.loop(0, experts) as e:
        at = emit.imul(e, 4)
        following = emit.iadd(at, 4)
        total = emit.add(emit.load(offsets, at, I32), emit.load(offsets, following, I32))
        emit.store(total, offsets, following)
    # Each expert's begin serves as its cursor and ends up as the next one's begin …
    with emit.loop(0, count) as i:
        expert = emit.sext(emit.load(ids, emit.imul(i, 4), I32), I64)
        with emit.builder.if_then(emit.icmp_signed(">=", expert, i64(0))):
            at = emit.imul(expert, 4)
            position = emit.load(offsets, at, I32)
            emit.store(emit.trunc(i, I32), slots, emit.imul(emit.zext(position, I64), 4))
            emit.store(emit.add(position, i32(1)), offsets, at)
    # … so that afterwards all begins move up by one place.
    with emit.loop(0, experts) as e:
        at = emit.imul(emit.isub(experts, e), 4)
        emit.store(emit.load(offsets, emit.isub(at, 4), I32), offsets, at)
    emit.store(i32(0), offsets, 0)
    emit.finish()


def _address(dtype: torch.dtype) -> int:
    known = _addresses.get(dtype)
    if known is None:
        bits = 64 if dtype == torch.int64 else 32
        known = load(lambda module: _build_sort(module, bits), {"sort_slots": bits}, "sort_slots")
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
    ids = torch.empty((tokens, top_k), dtype=torch.int32)
    slots = torch.empty(count, dtype=torch.int32)
    offsets = torch.empty(experts + 1, dtype=torch.int32)
    block = _Block(count, experts, given.data_ptr(), ids.data_ptr(), slots.data_ptr(), offsets.data_ptr())
    run(_address(given.dtype), ctypes.addressof(block), 1)
    return ExpertLayout(tokens=tokens, top_k=top_k, experts=experts, ids=ids, slots=slots, offsets=offsets)
