"""The sizes of weights as the CPU kernels hold them: columns and K with their padding, neurons with theirs."""

from __future__ import annotations

from dataclasses import replace

from tilecast.kernels.cpu._dots import interleaved_length
from tilecast.kernels.cpu._micro import CACHE_LINE
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.problem import DTYPES, ExpertGemm, weight_format

PLAIN_SCALE_PANEL = 64
"""Columns of a panel of scales where the codes themselves are plain."""


def padded_columns(gemm: ExpertGemm, lanes: int) -> int:
    """Return the number of columns of a packed (or virtually packed) stack."""
    pair = 2 if gemm.name == "up" and gemm.layer.gated else 1
    width = gemm.n // pair
    columns = -(-width // lanes) * lanes * pair
    unit = max(8 * lanes, 64)
    return -(-columns // unit) * unit


def padded_k(gemm: ExpertGemm, *, pairs: bool) -> int:
    """Return K, rounded up to even where weights are held in pairs, to whole words where they are quantised."""
    form = weight_format(gemm.layer.weight_format)
    unit = 32 // form.bits if form.bits else 2 if pairs else 1
    return -(-gemm.k // unit) * unit


def column_bytes(gemm: ExpertGemm, depth: int) -> int:
    """Return the bytes of `depth` weights of one column; without scales, where quantised."""
    form = weight_format(gemm.layer.weight_format)
    return depth * (form.bits or 8 * DTYPES[gemm.layer.dtype]) // 8


def pitch(length: int, dtype: str) -> int:
    """Return the elements from one neuron of `length` elements to the next: an odd number of cache lines."""
    in_line = CACHE_LINE // DTYPES[dtype]
    return (-(-length // in_line) | 1) * in_line


def gate_gemm(gemm: ExpertGemm) -> ExpertGemm:
    """Return the GEMM that a gated up projection's gate rows are by themselves."""
    return ExpertGemm(layer=replace(gemm.layer, gated=False, activation="relu"), name="up")


def row_pitch(k: int, dtype: str, lanes: int) -> int:
    """Return the elements from one interleaved row of K elements to the next; a vector past its end may be read."""
    length = interleaved_length(k)
    return pitch(length + (2 * lanes if -(-k // FLUSH_K) % lanes else 0), dtype)
