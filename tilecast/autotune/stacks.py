"""Random quantised weights: to be timed, where only bytes matter, or to be compared, where orders must show.

Quantising billions of weights takes minutes, so a few are drawn and quantised and the rest are stretches of those.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tilecast.kernels.formats import CODE_DTYPES, QuantizedStack, quantize
from tilecast.kernels.scales import scale_shape
from tilecast.problem import ExpertGemm, ExpertLayer, weight_format

POOL_ELEMENTS = 1 << 22
"""Weights drawn and quantised once per stack."""


def quantized_stack(gemm: ExpertGemm, std: float, seed: int, device: torch.device | None = None) -> QuantizedStack:
    """Return normal deviates in the layer's weight format, no two experts with the same rows, on any device the same.

    Raises InputError where the layer's sizes do not fit the format.
    """
    form, generator = weight_format(gemm.layer.weight_format), torch.Generator().manual_seed(seed)
    parts = 2 if gemm.name == "up" and gemm.layer.gated else 1
    width, block = gemm.n // parts, max(1, form.rows)
    most = -(-min(POOL_ELEMENTS // gemm.k, parts * width * gemm.layer.experts) // block) * block
    pool = _pool(gemm, max(block, most), std, generator)
    experts, count = gemm.layer.experts, scale_shape(gemm)
    codes = torch.empty((experts, gemm.n, pool.codes.shape[2]), dtype=torch.uint8, device=device)
    scales = torch.empty((experts, *count), dtype=pool.scales.dtype, device=device)
    zeros = None if pool.zeros is None else torch.empty(scales.shape, dtype=torch.uint8, device=device)
    source = pool.codes.view(torch.uint8)[0]
    for place in range(experts * parts):
        expert, part = divmod(place, parts)
        start = 0
        while start < width:
            # Each stretch begins elsewhere in the pool. A block's scale fits the codes of another, drawn as they are.
            offset = int(torch.randint(source.shape[0], (1,), generator=generator)) if place else 0
            length = min(source.shape[0] - offset, width - start)
            first = part * width + start
            codes[expert, first : first + length] = source[offset : offset + length]
            low, high = (start // form.rows, -(-(start + length) // form.rows)) if form.rows else (0, 1)
            into = slice(part * (count[0] // parts) + low, part * (count[0] // parts) + high)
            taken = (offset // block + torch.arange(high - low)) % pool.scales.shape[1]
            scales[expert, into] = pool.scales[0, taken].to(scales.device)
            if zeros is not None and pool.zeros is not None:
                zeros[expert, into] = pool.zeros[0, taken].to(zeros.device)
            start += length
    return QuantizedStack(format=pool.format, codes=codes.view(pool.codes.dtype), scales=scales, zeros=zeros)


def _pool(gemm: ExpertGemm, rows: int, std: float, generator: torch.Generator) -> QuantizedStack:
    alone = ExpertLayer(
        hidden=gemm.k, intermediate=rows, experts=1, top_k=1, dtype=gemm.layer.dtype, gated=False, activation="relu",
        weight_format=gemm.layer.weight_format,
    )  # fmt: skip
    drawn = torch.empty((1, rows, gemm.k)).normal_(0, std, generator=generator)
    if gemm.misfit is not None:
        # Said of the layer itself, not of what stands for it here.
        quantize(torch.empty(0), gemm)
    return quantize(drawn, alone.up)


CODE_BITS = {"awq": 3, "int4": 3, "int8": 7, "fp8": 0}
"""Codes, less their zero points, are below two to this power; those of fp8 are drawn so."""
SPREAD = 8
"""Powers of two that scales, and codes of fp8, are spread over."""


def wide_stack(gemm: ExpertGemm, generator: torch.Generator) -> QuantizedStack:
    """Return random codes under scales of many magnitudes; the second half of K (`half_of`) repeats the first."""
    form, experts = weight_format(gemm.layer.weight_format), gemm.layer.experts
    columns, half = scale_shape(gemm)[1], half_of(gemm)
    codes = _codes((experts, gemm.n, gemm.k), form.kind, generator)
    codes[..., half : 2 * half] = codes[..., :half]
    if form.codes_per_byte == 2:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    shape = (experts, *scale_shape(gemm))
    exponents = torch.randint(-SPREAD, 1, shape, generator=generator) - CODE_BITS[form.kind]
    scales = torch.ldexp(torch.rand(shape, generator=generator) + 1, exponents)
    zeros = torch.randint(16, shape, generator=generator, dtype=torch.uint8) if form.kind == "awq" else None
    groups = half // form.group if form.group else 0
    if 2 * groups <= columns:
        for tensor in (scales, zeros):
            if tensor is not None:
                tensor[..., groups : 2 * groups] = tensor[..., :groups]
    dtype = torch.float32 if form.kind == "fp8" else torch.float16
    codes = codes.contiguous().view(CODE_DTYPES[form.kind])
    return QuantizedStack(format=gemm.layer.weight_format, codes=codes, scales=scales.to(dtype), zeros=zeros)


def half_of(gemm: ExpertGemm) -> int:
    """Return how many elements of K the second half repeats: whole groups where K has two, else part of one."""
    group = weight_format(gemm.layer.weight_format).group
    return gemm.k // group // 2 * group if group and gemm.k >= 2 * group else min(gemm.k, group or gemm.k) // 2


LONGEST_SUM = 256
"""Elements of K that kernels may sum as integers where the format has no groups: products of 16 and 8 bits, in 32."""


def one_exact_sum(gemm: ExpertGemm) -> bool:
    """Return whether codes are integers and all of K is so short that a kernel may take it as one exact sum."""
    form = weight_format(gemm.layer.weight_format)
    return form.kind in ("awq", "int4", "int8") and gemm.k <= (form.group or LONGEST_SUM)


def _codes(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return random codes of a kind, one in each uint8."""
    count = math.prod(shape)
    size = min(count, POOL_ELEMENTS)
    if kind == "fp8":
        signs = torch.randint(2, (size,), generator=generator) * 2 - 1
        exponents = torch.randint(-SPREAD, 0, (size,), generator=generator)
        values = torch.ldexp((torch.rand(size, generator=generator) + 1) * signs, exponents)
        pool = values.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        low, high = (-127, 128) if kind == "int8" else (0, 16)
        pool = torch.randint(low, high, (size,), generator=generator).to(CODE_DTYPES[kind]).view(torch.uint8)
    out = torch.empty(count, dtype=torch.uint8)
    for start in range(0, count, max(size, 1)):
        length = min(size, count - start)
        # Rolled by a stretch of its own, so that no two experts hold the same rows.
        shift = int(torch.randint(size, (1,), generator=generator)) if start else 0
        out[start : start + length] = pool.roll(-shift)[:length]
    return out.view(shape)


def moved(stack: QuantizedStack, device: torch.device) -> QuantizedStack:
    """Return a stack on a device."""
    zeros = None if stack.zeros is None else stack.zeros.to(device)
    return replace(stack, codes=stack.codes.to(device), scales=stack.scales.to(device), zeros=zeros)
