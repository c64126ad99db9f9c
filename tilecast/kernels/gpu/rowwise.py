"""Torch's operations on a GPU with bits that are free of the batch: products, sums, softmax, functions, attention.

Tiles, blocks and warps depend on the operation, dtype and head sizes alone; no tile is larger for more rows, so these
are slower than torch's own where there are many. CPU tensors run under Triton's interpreter, in tests.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from tilecast.errors import InputError
from tilecast.kernels.gpu.build import MAX_SIDE, Build, Constant
from tilecast.kernels.gpu.sorting import aligned
from tilecast.kernels.ranges import KeyRanges

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KINDS = ("exp", "cos", "sin", "sigmoid", "silu", "gelu", "gelu_tanh")
BLOCK_T, BLOCK_N = 32, 64
"""A product's tile. Below 64 rows, so that sm_90 has one instruction for all tiles."""
BLOCK_ROW = 1024
"""Elements that a sum or softmax takes at a time, and a function's of one program."""
BLOCK_KEYS = 32
MAX_HEAD = 512
"""The longest head that attention takes: a program holds 32 keys of it."""


def _build(function: str, signature: dict[str, str], constants: dict[str, Constant], stages: int = 1) -> Build:
    return Build(
        module="_rowwise", function=function, signature=tuple(signature.items()), constants=tuple(constants.items()),
        num_warps=4, num_stages=stages,
    )  # fmt: skip


@lru_cache(maxsize=256)
def product_build(dtype: torch.dtype, bias: bool) -> Build:
    """Return the kernel of `multiply`."""
    pointer = f"*{TYPE_NAMES[dtype]}"
    wide = dtype == torch.float32
    sizes = {"tokens": "i32", "columns": "i32", "length": "i32"}
    return _build(
        "product", {"rows": pointer, "weights": pointer, "bias": pointer, "out": pointer, **sizes},
        {"HAS_BIAS": bias, "WIDE": wide, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N, "BLOCK_K": 32 if wide else 64},
        stages=3,
    )  # fmt: skip


@lru_cache(maxsize=256)
def row_build(function: str, **constants: Constant) -> Build:
    """Return the kernel of a function that takes float32 and its count: row_sum, softmax or elementwise."""
    count = "count" if function == "elementwise" else "length"
    names = ("values" if function == "elementwise" else "rows", "out")
    return _build(function, {**dict.fromkeys(names, "*fp32"), count: "i32"}, {**constants, "BLOCK": BLOCK_ROW})


@lru_cache(maxsize=256)
def attention_build(
    dtype: torch.dtype, depth: int, width: int, *, mask: bool, bias: bool, sinks: bool, cap: bool
) -> Build:
    """Return the kernel of `attend`."""
    pointer = f"*{TYPE_NAMES[dtype]}"
    signature = {
        "query": pointer, "key": pointer, "value": pointer, "first": "*i32", "stop": "*i32", "mask": "*u8",
        "bias": "*fp32", "sinks": "*fp32", "out": pointer, "queries": "i32", "keys": "i32", "groups": "i32",
        "range_heads": "i32", "scale": "fp32", "cap": "fp32",
    }  # fmt: skip
    constants: dict[str, Constant] = {
        "HAS_MASK": mask, "HAS_BIAS": bias, "HAS_SINKS": sinks, "HAS_CAP": cap, "DEPTH": depth, "WIDTH": width,
        "LANES_D": _power_of_two(depth), "LANES_V": _power_of_two(width), "BLOCK": BLOCK_KEYS,
    }  # fmt: skip
    return _build("attention", signature, constants)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def multiply(rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows · weightsᵀ + bias, [B, T, N]: rows [B, T, K], weights [B, N, K], bias [B, N] or None, of one dtype.

    Accumulated in float32 in ascending order of K and rounded once. Raises InputError for operands that do not fit.
    """
    batch, tokens, length = rows.shape
    columns = weights.shape[1]
    fits = weights.shape == (batch, columns, length) and (bias is None or bias.shape == (batch, columns))
    operands = [rows, weights, *([] if bias is None else [bias])]
    if not fits or rows.dtype not in TYPE_NAMES or len({(t.dtype, t.device) for t in operands}) > 1:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in operands)
        raise InputError(f"product of {shapes}: expected [B, T, K], [B, N, K] and [B, N] of one dtype and device")
    out = torch.empty(batch, tokens, columns, dtype=rows.dtype, device=rows.device)
    held = [aligned(t.detach()) for t in operands]
    build = product_build(rows.dtype, bias is not None)
    tiles = -(-tokens // BLOCK_T) * -(-columns // BLOCK_N)
    for begin in range(0, batch, MAX_SIDE):
        part = slice(begin, begin + MAX_SIDE)
        some = [aligned(t[part]) for t in held]
        into = aligned(out[part])
        build.launch((tiles, into.shape[0]), rows.device, *some[:2], some[-1], into, tokens, columns, length)
        if into.data_ptr() != out[part].data_ptr():
            out[part] = into
    return out


def row_sum(rows: torch.Tensor) -> torch.Tensor:
    """Return the sums of float32 rows [..., L] over L."""
    out = torch.empty(rows.shape[:-1], dtype=torch.float32, device=rows.device)
    row_build("row_sum").launch((out.numel(),), rows.device, aligned(rows), out, rows.shape[-1])
    return out


def softmax(rows: torch.Tensor, *, log: bool = False) -> torch.Tensor:
    """Return the softmax of float32 rows [..., L] over L, or its logarithm."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    programs = rows.numel() // max(1, rows.shape[-1])
    row_build("softmax", LOG=log).launch((programs,), rows.device, aligned(rows), out, rows.shape[-1])
    return out


def function_of(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Return a function of KINDS of float32 values of any shape."""
    assert kind in KINDS, kind
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    build = row_build("elementwise", KIND=kind)
    build.launch((math.ceil(out.numel() / BLOCK_ROW),), values.device, aligned(values), out, out.numel())
    return out


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: KeyRanges, *, scale: float,
    softcap: float = 0.0, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return attention's result [B, Hq, Tq, Dv]; operands as in `tilecast.kernels.cpu.attention.attend`.

    A program takes one query of one head, without tensor cores. Raises InputError.
    """
    batch, heads, queries, depth = query.shape
    keys, width = key.shape[2], value.shape[-1]
    if max(depth, width) > MAX_HEAD or max(heads, batch) > MAX_SIDE:
        raise InputError(f"attention of {heads} heads of {depth} and {width}: expected heads of at most {MAX_HEAD}")
    out = torch.empty(batch, heads, queries, width, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    build = attention_build(
        query.dtype, depth, width, mask=ranges.mask is not None, bias=ranges.bias is not None,
        sinks=sinks is not None, cap=softcap > 0,
    )  # fmt: skip
    first, stop = aligned(ranges.first), aligned(ranges.stop)
    absent: Any = first
    range_heads = ranges.first.shape[1]
    others = [_spread(part, range_heads) for part in (ranges.mask, ranges.bias)]
    sink_values = None if sinks is None else aligned(sinks.detach().float())
    build.launch(
        (queries, heads, batch), query.device, *(aligned(t.detach()) for t in (query, key, value)), first, stop,
        *(absent if t is None else t for t in (*others, sink_values)), out, queries, keys, heads // key.shape[1],
        range_heads, float(scale), float(softcap),
    )  # fmt: skip
    return out


def _spread(part: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Return a mask or bias with as many heads as the ranges have."""
    return None if part is None else aligned(part.expand(part.shape[0], heads, *part.shape[2:]))
