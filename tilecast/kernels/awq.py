"""AWQ's packed tensors, as AutoAWQ writes them in its version `gemm`, made into rows of a `QuantizedStack` and back.

A linear layer of N outputs and K inputs is qweight int32 [K, N/8], qzeros int32 [K/group, N/8] and scales float16
[K/group, N]; its weight is (code - zero) · scale, the zero points stored as they are. Nibble i of a word, from the
lowest bits, holds column ORDER[i] of the eight; words are little-endian, as safetensors keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilecast.errors import InputError
from tilecast.problem import GROUPS

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(ORDER.index(column) for column in range(8))
"""The nibble that holds each column."""
CODES_PER_WORD = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What scales of integers are kept in."""


class Rows(NamedTuple):
    """Weight rows of one projection as a `QuantizedStack` holds them: codes, scales and perhaps zero points."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


class AwqTensors(NamedTuple):
    """One linear layer as AutoAWQ stores it."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [R, 8·C] of AWQ's words int32 [R, C]."""
    pairs = words.contiguous().view(torch.uint8).view(words.shape[0], -1, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    return nibbles[..., list(PLACES)].flatten(1)


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Return AWQ's words int32 [R, C/8] of codes uint8 [R, C], each below 16."""
    nibbles = codes.view(codes.shape[0], -1, CODES_PER_WORD)[..., list(ORDER)]
    pairs = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32).flatten(1)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Return uint8 [N, K/2] of codes uint8 [N, K], each below 16: the even k in the low half of a byte."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()


def unpack_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [N, K] of uint8 [N, K/2]."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def check_awq(found: AwqTensors, shape: tuple[int, int], group: int, what: str) -> None:
    """Raise InputError, naming `what`, unless tensors are those of a weight [N, K] in groups of `group`."""
    rows, width = shape
    if group not in GROUPS:
        raise InputError(f"{what} has groups of {group}, expected one of {', '.join(map(str, GROUPS))}")
    if width % group:
        raise InputError(f"{what} has {width} inputs, which cut a group of {group} in two")
    if rows % CODES_PER_WORD:
        raise InputError(f"{what} has {rows} outputs, which do not fill words of {CODES_PER_WORD} codes")
    words = rows // CODES_PER_WORD
    for name, tensor, wanted, kind in (
        ("qweight", found.qweight, (width, words), torch.int32),
        ("qzeros", found.qzeros, (width // group, words), torch.int32),
        ("scales", found.scales, (width // group, rows), None),
    ):
        kept = tensor.dtype in SCALE_DTYPES if kind is None else tensor.dtype is kind
        if not kept or tuple(tensor.shape) != wanted:
            raise InputError(
                f"{what}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind or 'floats'} {wanted} for a "
                f"weight of {rows} outputs and {width} inputs in groups of {group}"
            )


def rows_of_awq(found: AwqTensors) -> Rows:
    """Return checked AWQ tensors as rows: codes uint8 [N, K/2], scales [N, K/group], zeros uint8 [N, K/group]."""
    # Turned as words, which are eight columns each, and taken apart column by column: nothing is as large as the codes
    # one a byte would be, and checkpoints have tens of billions.
    turned = found.qweight.T
    even, odd = turned[:, ::2].contiguous(), turned[:, 1::2].contiguous()
    pairs = torch.empty((len(turned), CODES_PER_WORD, even.shape[1]), dtype=torch.uint8, device=even.device)
    for column, place in enumerate(PLACES):
        low = even >> 4 * place & 15
        pairs[:, column] = low.bitwise_or_((odd >> 4 * place & 15) << 4)
    zeros = unpack_words(found.qzeros).T.contiguous()
    return Rows(pairs.flatten(0, 1), found.scales.T.contiguous(), zeros)


def awq_of_rows(rows: Rows) -> AwqTensors:
    """Return rows as AutoAWQ stores them: the reverse of `rows_of_awq`. N is a multiple of 8."""
    assert rows.zeros is not None, "AWQ has zero points"
    qweight = pack_words(unpack_pairs(rows.codes).T.contiguous())
    return AwqTensors(qweight, pack_words(rows.zeros.T.contiguous()), rows.scales.T.contiguous())
