"""What is done with stacks of expert weights whatever their format: cutting them for ranks, turning K around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from tilecast.errors import InputError
from tilecast.kernels.formats import QuantizedStack, scale_rows
from tilecast.problem import ExpertGemm, weight_format

Weights: TypeAlias = torch.Tensor | QuantizedStack
"""Plain weights [E, N, K] of one GEMM: a tensor of the layer's dtype, or a stack in the layer's weight format."""


def tensors_of(weights: Weights) -> tuple[torch.Tensor, ...]:
    """Return the tensors that hold plain weights."""
    return weights.tensors if isinstance(weights, QuantizedStack) else (weights,)


def detached(weights: Weights) -> Weights:
    """Return the same weights as views that need no gradient and do not keep the tensors given alive."""
    if isinstance(weights, torch.Tensor):
        return weights.detach()
    zeros = None if weights.zeros is None else weights.zeros.detach()
    return replace(weights, codes=weights.codes.detach(), scales=weights.scales.detach(), zeros=zeros)


def cut_stack(
    stack: QuantizedStack, gemm: ExpertGemm, experts: slice, rows: Sequence[range], columns: range | None = None
) -> QuantizedStack:
    """Return contiguous copies of some experts, ranges of weight rows and a range of K (None: all) of a whole GEMM's.

    Raises InputError where a range begins or ends inside a block of rows, or a group of K, that shares a scale.
    """
    form = weight_format(stack.format)
    parts = 2 if gemm.name == "up" and gemm.layer.gated else 1
    width = gemm.n // parts
    for part in rows:
        _check_cut("rows", part.start % width, form.rows, width)
        _check_cut("rows", (part.stop - 1) % width + 1, form.rows, width)
    columns = range(gemm.k) if columns is None else columns
    for place in (columns.start, columns.stop):
        _check_cut("elements of K", place, form.group, gemm.k)
    bytes_ = slice(columns.start // form.codes_per_byte, columns.stop // form.codes_per_byte)
    of_group = slice(columns.start // form.group, -(-columns.stop // form.group)) if form.group else slice(None)
    where = scale_rows(gemm)
    scaled = torch.cat([torch.unique_consecutive(where[part.start : part.stop]) for part in rows]).to(stack.device)

    def of_scales(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[experts].index_select(1, scaled)[..., of_group].contiguous()

    # Codes are moved as bytes: not every operation takes fp8.
    codes = stack.codes.view(torch.uint8)[experts]
    picked = torch.cat([codes[:, part.start : part.stop, bytes_] for part in rows], dim=1)
    zeros = None if stack.zeros is None else of_scales(stack.zeros)
    return replace(stack, codes=picked.view(stack.codes.dtype), scales=of_scales(stack.scales), zeros=zeros)


def _check_cut(what: str, place: int, block: int, end: int) -> None:
    if block > 1 and place % block and place != end:
        raise InputError(f"a cut at {place} {what} is inside a block of {block} that shares a scale")


def reversal(gemm: ExpertGemm) -> torch.Tensor:
    """Return the elements of K from the last to the first: int64 [K].

    A last group of K that is shorter than the others stays where it is, turned in itself: scales belong to places.
    """
    group = weight_format(gemm.layer.weight_format).group
    whole = gemm.k // group * group if group else gemm.k
    return torch.cat((torch.arange(whole - 1, -1, -1), torch.arange(gemm.k - 1, whole - 1, -1)))


def backward(weights: Weights, gemm: ExpertGemm) -> Weights:
    """Return plain weights whose K is in the order of `reversal`."""
    order = reversal(gemm).to(weights.device)
    if isinstance(weights, torch.Tensor):
        return weights.index_select(-1, order)
    form = weight_format(weights.format)
    codes = weights.codes.view(torch.uint8)
    # Two codes of 4 bits change places in their byte where the bytes do.
    codes = codes << 4 | codes >> 4 if form.codes_per_byte == 2 else codes
    order = order[:: form.codes_per_byte] // form.codes_per_byte
    turned = codes.index_select(-1, order).view(weights.codes.dtype)
    zeros = None if weights.zeros is None else _turned_groups(weights.zeros, gemm, form.group)
    return replace(weights, codes=turned, scales=_turned_groups(weights.scales, gemm, form.group), zeros=zeros)


def _turned_groups(tensor: torch.Tensor, gemm: ExpertGemm, group: int) -> torch.Tensor:
    whole = gemm.k // group if group else 0
    return torch.cat((tensor[..., :whole].flip(-1), tensor[..., whole:]), dim=-1)
