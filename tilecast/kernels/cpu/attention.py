"""Attention whose bits depend on nothing but the query's own keys: not on batch, padding, chunks or cache length.

Numerics (`_attention.py`): float32 throughout, one rounding into the output. Masked keys are skipped, real ones are
taken in ascending order, in blocks counted from the first real one.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tilecast.errors import InputError
from tilecast.kernels.cpu._attention import ARGS, ENTRY, VALUE_CHAIN, Attention, Variant
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import available_threads, load, run
from tilecast.kernels.cpu.linear import WORK_OF_A_THREAD
from tilecast.kernels.cpu.moe_launch import take_scratch
from tilecast.kernels.dtypes import DTYPE_NAMES
from tilecast.kernels.ranges import KeyRanges

ROWS_PER_JOB = 64
SCORE_BYTES = 1 << 18
"""Scores of one job are kept to about this size, so that they stay in the second-level cache."""

_Block = ctypes.c_int64 * len(ARGS)
_INDEX = {name: index for index, name in enumerate(ARGS)}


class Sizes(NamedTuple):
    """Sizes of one call, and how its work is cut."""

    batch: int
    query_heads: int
    heads: int
    queries: int
    keys: int
    depth: int
    width: int


@cache
def _address(variant: Variant) -> int:
    return load(lambda module: Attention(module, variant).build(), {"attention": asdict(variant)}, ENTRY)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention's result [B, Hq, Tq, Dv], which lies in memory as [B, Tq, Hq, Dv].

    query [B, Hq, Tq, D], key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv] have one dtype (float32, bfloat16 or
    float16) and a contiguous last dimension; Hq is a multiple of Hkv. `ranges` says which keys are real, `sinks`
    [Hq] adds exp(sink) to each head's sum of weights, `softcap` c > 0 replaces a score s by c · tanh(s / c). A query
    without any real key gets zeros. Raises InputError.
    """
    sizes = check_operands("llvm.attention", query, key, value, ranges, sinks)
    out = torch.empty(sizes.batch, sizes.queries, sizes.query_heads, sizes.width, dtype=query.dtype)
    result = out.transpose(1, 2)
    if out.numel() == 0:
        return result
    isa = host_isa()
    if query.dtype == torch.float16 and not isa.half:
        raise InputError(f"llvm.attention: {isa.name} has no fp16 conversion instruction; use float32 or bfloat16")
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    padded = -(-sizes.width // isa.lanes) * isa.lanes
    if padded != sizes.width:
        # Whole vectors of values; heads this narrow occur in test models only.
        wide = attend(
            query, key, F.pad(value, (0, padded - sizes.width)), ranges, scale=scale, softcap=softcap, sinks=sinks
        )
        out.copy_(wide.transpose(1, 2)[..., : sizes.width])
        return result
    sink_values = None if sinks is None else sinks.to(torch.float32).contiguous()
    variant = Variant(
        dtype=DTYPE_NAMES[query.dtype], mask=ranges.mask is not None, bias=ranges.bias is not None,
        sinks=sinks is not None, softcap=softcap > 0, mr=12 if isa.registers > 16 else 6, key_vectors=2,
        value_vectors=2 if sizes.width % (2 * isa.lanes) == 0 else 1, lanes=isa.lanes, fma=isa.fma,
    )  # fmt: skip
    block = _Block()
    group = sizes.query_heads // sizes.heads
    pitch = sizes.keys + variant.keys + isa.lanes
    rows = min(ROWS_PER_JOB, max(8, SCORE_BYTES // (4 * pitch)))
    queries = max(1, min(sizes.queries, rows // group))
    parts = _scratch_parts(variant, sizes, queries * group, pitch)
    jobs = sizes.batch * sizes.heads * -(-sizes.queries // queries)
    work = sizes.batch * sizes.query_heads * sizes.queries * sizes.keys * (sizes.depth + sizes.width)
    threads = min(available_threads(), jobs, max(1, work // WORK_OF_A_THREAD))
    room = -(-sum(parts.values()) // 4096) * 4096
    scratch = take_scratch("attention", threads * room)
    words = {
        "first": ranges.first.data_ptr(), "stop": ranges.stop.data_ptr(),
        "sinks": 0 if sink_values is None else sink_values.data_ptr(),
        "batch": sizes.batch, "heads": sizes.heads, "groups": group, "queries": sizes.queries,
        "depth": sizes.depth, "width": sizes.width, "block": queries, "pitch": pitch,
        "scale": _bits(scale), "softcap": _bits(softcap),
        "scratch": -(-scratch.data_ptr() // 64) * 64, "scratch_stride": room,
    }  # fmt: skip
    at = 0
    for name, size in parts.items():
        words[f"at_{name}"] = at
        at += size
    strided = {"query": query, "key": key, "value": value, "out": result, "mask": ranges.mask, "bias": ranges.bias}
    for name, tensor in (*strided.items(), ("range", ranges.first)):
        if tensor is not None:
            for letter, stride in zip("bht", _strides(tensor), strict=True):
                words[f"{name}_{letter}"] = stride
            words.setdefault(name, tensor.data_ptr())
    for name, word in words.items():
        if name in _INDEX:
            block[_INDEX[name]] = word
    run(_address(variant), ctypes.addressof(block), threads)
    return result


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the first three strides in bytes, 0 for a dimension that is broadcast."""
    return [
        0 if size == 1 else stride * tensor.itemsize
        for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False)
    ]


def _scratch_parts(variant: Variant, sizes: Sizes, rows: int, pitch: int) -> dict[str, int]:
    """Return the bytes of each part of a thread's scratch, in order."""
    sums = 8 * variant.mr * sizes.width
    parts = {
        "pointers": 8 * (variant.keys + rows), "staged": max(4 * sizes.depth * variant.keys, sums),
        "queries": 4 * rows * sizes.depth, "scores": 4 * rows * pitch, "sums": 4 * rows, "rows": 16 * rows,
    }  # fmt: skip
    return {name: -(-size // 64) * 64 for name, size in parts.items()}


def _bits(value: float) -> int:
    return int(struct.unpack("I", struct.pack("f", value))[0])


def check_operands(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges,
    sinks: torch.Tensor | None,
) -> Sizes:
    """Return the sizes of one call. Raises InputError for operands that do not fit together."""
    seen = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (query, key, value))
    if not all(t.dim() == 4 and t.dtype == query.dtype for t in (query, key, value)) or query.dtype not in DTYPE_NAMES:
        raise InputError(
            f"{kernel}: query, key and value are {seen}; expected [B, H, T, D] of one dtype, "
            f"{', '.join(DTYPE_NAMES.values())}"
        )
    batch, query_heads, queries, depth = query.shape
    _, heads, keys, _ = key.shape
    width = value.shape[-1]
    fits = key.shape == (batch, heads, keys, depth) and value.shape == (batch, heads, keys, width)
    if not fits or heads == 0 or query_heads % heads or depth == 0:
        raise InputError(f"{kernel}: query, key and value are {seen}, which do not fit together")
    allowed = {(batch, one, queries) for one in (1, query_heads)}
    if tuple(ranges.first.shape) not in allowed or ranges.keys != keys:
        raise InputError(
            f"{kernel}: the mask is for {tuple(ranges.first.shape)} rows of {ranges.keys} keys, the operands are {seen}"
        )
    if sinks is not None and sinks.shape != (query_heads,):
        raise InputError(f"{kernel}: sinks are {tuple(sinks.shape)}, expected {(query_heads,)}")
    return Sizes(batch, query_heads, heads, queries, keys, depth, width)


__all__ = ["VALUE_CHAIN", "attend", "check_operands"]
