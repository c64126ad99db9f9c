"""A whole layer in one call of compiled code, for as few tokens as decoding has (`_layer`).

Between two layers megabytes of weights stream through the caches, so that every step of Python on the way to a launch
is read from memory again. What is the same from call to call, argument blocks and addresses of scratch, is therefore
kept, and a call gives four addresses to one function. The functions that it calls are those of single launches: bits
are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch

from tilecast.kernels.cpu._layer import DONE, ENTRY, FRAME_ARGS, OTHER_THREADS, emit_layer
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import available_threads, load, openmp_symbol
from tilecast.kernels.cpu.launch import Plan, aligned, take_scratch
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.slots import SlotKernel
from tilecast.kernels.cpu.sparse import SparseExperts
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import DTYPES, ExpertLayer, TileConfig

SCRATCH_BYTES = 8 << 20
"""Scratch of one Python thread, shared by all layers. Calls that need more are launched GEMM by GEMM."""

_Words = ctypes.Array[ctypes.c_int64]
_Call = Callable[[int, int, int, int, int], int]
_NARROW = {torch.int32: 0, torch.int64: 1}


class Frame:
    """What calls with so many tokens, from one Python thread, find ready. Holds all that it points at.

    `call(address, hidden, ids, routing weights, out)` takes addresses of contiguous tensors, nothing is checked: hidden
    [T, H] and out [T, H] of the plans' dtypes, ids [T, k] of the frame's, weights float32 [T, k]. It returns DONE, or
    with another number of threads than when the frame was made OTHER_THREADS, and then did nothing. Only the Python
    thread that the frame was made in may call it.
    """

    __slots__ = ("_kept", "address", "call")

    def __init__(self, address: int, kept: tuple[object, ...]) -> None:
        """Take the address of the frame's words, and what they point at."""
        self.address = address
        self.call = _compiled()
        self._kept = kept


class WholeLayer:
    """One layer's GEMMs by two kept plans, to be run together."""

    __slots__ = ("_layer", "_plans", "_weights")

    def __init__(self, layer: ExpertLayer, plans: tuple[Plan, Plan], weights: tuple[GemmWeights, GemmWeights]) -> None:
        """Take the plans of launches of up and down on their weights."""
        self._layer = layer
        self._plans = plans
        self._weights = weights  # Their memory is what the plans point at.

    def frame(self, tokens: int, ids: torch.dtype) -> Frame | None:
        """Return a frame for this Python thread, None where the GEMMs have to be launched one by one.

        Compiles if need be.
        """
        up, down = self._plans
        threads = up.threads_now()
        if tokens == 0 or threads != down.threads_now() or ids not in _NARROW:
            return None
        layer, slots = self._layer, tokens * self._layer.top_k
        rooms = {
            "ids": 4 * slots, "slots": 4 * slots, "offsets": 4 * (layer.experts + 1),
            "between": DTYPES[layer.dtype] * slots * layer.intermediate,
        }  # fmt: skip
        sides = {"up": (up, tokens, False), "down": (down, slots, True)}
        for gemm, (plan, rows, combined) in sides.items():
            rooms[f"{gemm} scratch"] = threads * plan.scratch_bytes
            rooms |= {f"{gemm} {name}": size for name, size in plan.rooms(rows, combined=combined).items()}
        ends = list(accumulate(-(-size // 64) * 64 for size in rooms.values()))
        if ends[-1] > SCRATCH_BYTES:
            return None
        buffer = take_scratch("layer", SCRATCH_BYTES)
        base = aligned(buffer)
        at = dict(zip(rooms, (base, *(base + end for end in ends)), strict=False))
        sorted_at = {name: at[name] for name in ("ids", "slots", "offsets")}
        blocks: dict[str, _Words] = {}
        for gemm, (plan, rows, combined) in sides.items():
            words = {
                "threads": threads, "tokens": tokens, "top_k": layer.top_k, "rows": rows, **sorted_at,
                "out" if gemm == "up" else "source": at["between"], "scratch": at[f"{gemm} scratch"],
                **{name: at[f"{gemm} {name}"] for name in plan.rooms(rows, combined=combined)},
            }  # fmt: skip
            block = blocks[gemm] = type(plan.template).from_buffer_copy(plan.template)
            for name, value in words.items():
                block[plan.words[name]] = value
        fields = {
            "available": available_threads(), "threads": threads, "wide": _NARROW[ids], "up": up.address,
            "down": down.address, "count": slots, "experts": layer.experts, **sorted_at,
            **{f"{gemm}_block": ctypes.addressof(block) for gemm, block in blocks.items()},
        }  # fmt: skip
        frame = (ctypes.c_int64 * len(FRAME_ARGS))(*(fields.get(name, 0) for name in FRAME_ARGS))
        return Frame(ctypes.addressof(frame), (frame, *blocks.values(), buffer, self))


def whole_layer(
    layer: ExpertLayer,
    kernels: tuple[object, object],
    configs: tuple[TileConfig, TileConfig],
    weights: tuple[GemmWeights, GemmWeights],
    out_dtype: torch.dtype,
) -> WholeLayer | None:
    """Return what runs up and down of a layer together, None where these kernels have to be launched one by one.

    Raises as launches do.
    """
    if openmp_symbol("GOMP_parallel") is None:
        return None
    dtypes = TORCH_DTYPES[layer.dtype], out_dtype
    plans: list[Plan] = []
    for kernel, config, data, dtype in zip(kernels, configs, weights, dtypes, strict=True):
        # A subclass may launch otherwise than its plan says.
        if not isinstance(kernel, SlotKernel) or type(kernel) not in (MoeGemm, SparseExperts):
            return None
        plans.append(kernel.plan(config, data, dtype))
    up, down = plans
    return WholeLayer(layer, (up, down), weights)


@cache
def _compiled() -> _Call:
    """Return the compiled function, the same one for all layers."""
    lanes = host_isa().lanes
    address = load(lambda module: emit_layer(module, lanes), {"layer": lanes}, ENTRY)
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * 5)(address)


__all__ = ["DONE", "OTHER_THREADS", "SCRATCH_BYTES", "Frame", "WholeLayer", "whole_layer"]
