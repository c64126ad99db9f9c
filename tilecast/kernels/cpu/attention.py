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
from tilecast.kernels.cpu._attention import Attention
from tilecast.kernels.cpu._attention_variant import ARGS, ENTRY, VALUE_CHAIN, Variant
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import load, run
from tilecast.kernels.cpu.launch import aligned, take_scratch, threads_for
from tilecast.kernels.dtypes import DTYPE_NAMES
from tilecast.kernels.ranges import KeyRanges

WORK_OF_A_THREAD = 1 << 17
"""Multiply-adds below which waking another thread costs more than it gives; bits do not depend on it."""
ROWS_PER_JOB = 64
SCORE_BYTES = 1 << 18
"""Scores of one job are kept to about this size, so that they stay in the second-level cache."""

_Block = ctypes.c_int64 * len(ARGS)


class Sizes(NamedTuple):
    """Sizes of one call, and how its work is cut."""

    batch: int
    query_heads: int
    heads: int
    queries: int
    keys: int
    depth: int
    width: int


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
    out = torch.empty(sizes.batch, sizes.queries, sizes.query_heads, sizes.width, dtype=query.dtype, device="cpu")
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
    variant, address = _code(
        query.dtype, ranges.mask is not None, ranges.bias is not None, sinks is not None, softcap > 0,
        sizes.width % (2 * isa.lanes) == 0,
    )  # fmt: skip
    group = sizes.query_heads // sizes.heads
    pitch = sizes.keys + variant.keys + isa.lanes
    rows = min(ROWS_PER_JOB, max(8, SCORE_BYTES // (4 * pitch)))
    queries = max(1, min(sizes.queries, rows // group))
    parts = _scratch_parts(variant, sizes, queries * group, pitch)
    jobs = sizes.batch * sizes.heads * -(-sizes.queries // queries)
    work = sizes.batch * sizes.query_heads * sizes.queries * sizes.keys * (sizes.depth + sizes.width)
    threads = min(jobs, threads_for(work, WORK_OF_A_THREAD))
    room = -(-parts[-1] // 4096) * 4096
    scratch = take_scratch("attention", threads * room)
    # In the order of ARGS, by place: decoding comes here once a layer, and naming them takes longer than the rest.
    block = _Block(
        0, 0,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), ranges.first.data_ptr(),
        ranges.stop.data_ptr(), _pointer(ranges.mask), _pointer(ranges.bias), _pointer(sink_values),
        *_strides(query), *_strides(key), *_strides(value), *_strides(result), *_strides(ranges.first)[:2],
        *(_NO_STRIDES if ranges.mask is None else _strides(ranges.mask)),
        *(_NO_STRIDES if ranges.bias is None else _strides(ranges.bias)),
        sizes.batch, sizes.heads, group, sizes.queries, sizes.depth, sizes.width, queries, pitch,
        _bits(scale), _bits(softcap),
        aligned(scratch), room, *parts[:-1],
    )  # fmt: skip
    run(address, ctypes.addressof(block), threads)
    return result


_NO_STRIDES = (0, 0, 0)


@cache
def _code(dtype: torch.dtype, mask: bool, bias: bool, sinks: bool, softcap: bool, wide: bool) -> tuple[Variant, int]:
    """Return a variant for this machine, and the address of its code."""
    isa = host_isa()
    variant = Variant(
        dtype=DTYPE_NAMES[dtype], mask=mask, bias=bias, sinks=sinks, softcap=softcap,
        mr=12 if isa.registers > 16 else 6, key_vectors=2, value_vectors=2 if wide else 1, lanes=isa.lanes,
        fma=isa.fma,
    )  # fmt: skip
    return variant, load(lambda module: Attention(module, variant).build(), {"attention": asdict(variant)}, ENTRY)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the first three strides in bytes, 0 for a dimension that is broadcast."""
    size = tensor.itemsize
    return [0 if one == 1 else stride * size for one, stride in zip(tensor.shape[:3], tensor.stride(), strict=False)]


def _scratch_parts(variant: Variant, sizes: Sizes, rows: int, pitch: int) -> list[int]:
    """Return where each part of a thread's scratch begins, in bytes and in the order of ARGS, and where all end."""
    sums = 8 * variant.mr * sizes.width
    pointers, staged = 8 * (variant.keys + rows), max(4 * sizes.depth * variant.keys, sums)
    at = [0]
    for size in (pointers, staged, 4 * rows * sizes.depth, 4 * rows * pitch, 4 * rows, 16 * rows):
        at.append(at[-1] + -(-size // 64) * 64)
    return at


def _bits(value: float) -> int:
    return int(struct.unpack("I", struct.pack("f", value))[0])


def _seen(*tensors: torch.Tensor) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)


def check_operands(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges,
    sinks: torch.Tensor | None,
) -> Sizes:
    """Return the sizes of one call. Raises InputError for operands that do not fit together."""
    if not all(t.dim() == 4 and t.dtype == query.dtype for t in (query, key, value)) or query.dtype not in DTYPE_NAMES:
        raise InputError(
            f"{kernel}: query, key and value are {_seen(query, key, value)}; expected [B, H, T, D] of one dtype, "
            f"{', '.join(DTYPE_NAMES.values())}"
        )
    batch, query_heads, queries, depth = query.shape
    _, heads, keys, _ = key.shape
    width = value.shape[-1]
    fits = key.shape == (batch, heads, keys, depth) and value.shape == (batch, heads, keys, width)
    if not fits or heads == 0 or query_heads % heads or depth == 0:
        raise InputError(f"{kernel}: query, key and value are {_seen(query, key, value)}, which do not fit together")
    if tuple(ranges.first.shape) not in ((batch, 1, queries), (batch, query_heads, queries)) or ranges.keys != keys:
        raise InputError(
            f"{kernel}: the mask is for {tuple(ranges.first.shape)} rows of {ranges.keys} keys, the operands are "
            f"{_seen(query, key, value)}"
        )
    if sinks is not None and sinks.shape != (query_heads,):
        raise InputError(f"{kernel}: sinks are {tuple(sinks.shape)}, expected {(query_heads,)}")
    return Sizes(batch, query_heads, heads, queries, keys, depth, width)


__all__ = ["VALUE_CHAIN", "attend", "check_operands"]
