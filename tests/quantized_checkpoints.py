"""Quantised checkpoints of tiny models, packed code by code in plain Python, and their dequantised twins.

Nothing here uses Tilecast: it is what its reading and writing are held against.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import save_tiny

EXPERT = re.compile(r".*\.experts\.\d+\.\w+\.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]
Quantizer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Takes a weight [N, K]; gives its tensors by part, and what they stand for in float32."""


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def packed_along_columns(codes: list[list[int]], order: tuple[int, ...], bits: int = 4) -> torch.Tensor:
    """Return words int32 [R, C·bits/32] of codes [R][C]: the i-th field of a word is column order[i] of its columns."""
    each = 32 // bits
    return torch.tensor(
        [
            [signed(sum(row[start + order[i]] << bits * i for i in range(each))) for start in range(0, len(row), each)]
            for row in codes
        ],
        dtype=torch.int32,
    )


def grouped(weight: torch.Tensor, group: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return integers [N, K] from 0 to levels, zero points [N, K/group] and float16 scales, rounded to nearest."""
    rows, width = weight.shape
    parts = weight.float().view(rows, width // group, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = ((high - low) / levels).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, levels)
    codes = ((parts / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, levels)
    return codes.view(rows, width).int(), zeros.int(), scales


def dequantized(codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor) -> torch.Tensor:
    group = codes.shape[1] // scales.shape[1]
    wide = zeros.repeat_interleave(group, 1) if isinstance(zeros, torch.Tensor) else zeros
    return (codes - wide).float() * scales.float().repeat_interleave(group, 1)


def awq(group: int = 32) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = grouped(weight, group, 15)
        tensors = {
            "qweight": packed_along_columns(codes.T.tolist(), AWQ_ORDER),
            "qzeros": packed_along_columns(zeros.T.tolist(), AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
        return tensors, dequantized(codes, zeros, scales)

    return quantize


def packed(bits: int, group: int, *, symmetric: bool = True) -> Quantizer:
    """Integers as compressed-tensors packs them: the lowest bits first, zero points along the rows."""
    order = tuple(range(32 // bits))

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size = group or weight.shape[1]
        shape = torch.tensor(weight.shape)
        if not symmetric:
            codes, zeros, scales = grouped(weight, size, (1 << bits) - 1)
            words = packed_along_columns(codes.tolist(), order, bits)
            points = packed_along_columns(zeros.T.tolist(), order, bits).T.contiguous()
            tensors = {"weight_packed": words, "weight_scale": scales, "weight_zero_point": points}
            return {**tensors, "weight_shape": shape}, dequantized(codes, zeros, scales)
        codes, scales = of_one_sign(weight, size, (1 << bits - 1) - 1)
        words = packed_along_columns((codes + (1 << bits - 1)).tolist(), order, bits)
        return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}, dequantized(codes, 0, scales)

    return quantize


def of_one_sign(weight: torch.Tensor, group: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = weight.shape
    parts = weight.float().view(rows, width // group, group)
    scales = (parts.abs().amax(-1) / limit).clamp(min=1e-4).to(torch.bfloat16)
    codes = (parts / scales.float()[..., None]).round().clamp(-limit - 1, limit)
    return codes.view(rows, width).int(), scales


def int8(group: int = 0) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scales = of_one_sign(weight, group or weight.shape[1], 127)
        return {"weight": codes.to(torch.int8), "weight_scale": scales}, dequantized(codes, 0, scales)

    return quantize


def fp8(shared: str) -> Quantizer:
    """e4m3 with a scale for every `block` of 128 by 128, every `channel`, or the whole `tensor`."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, width = weight.shape
        tall, wide = {"block": (128, 128), "channel": (1, width), "tensor": (rows, width)}[shared]
        shape = -(-rows // tall), -(-width // wide)
        scales, spread = torch.empty(shape), torch.empty(rows, width)
        for i in range(shape[0]):
            for j in range(shape[1]):
                part = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
                scales[i, j] = weight[part].abs().max() / 448
                spread[part] = scales[i, j]
        codes = (weight.float() / spread).to(torch.float8_e4m3fn)
        name = "weight_scale_inv" if shared == "block" else "weight_scale"
        return {"weight": codes, name: scales if shared != "tensor" else scales[0]}, codes.float() * spread

    return quantize


def quantized_twins(
    folder: Path,
    family: str,
    quantize: Quantizer,
    config: dict[str, Any],
    names: re.Pattern[str] = EXPERT,
    **changes: Any,
) -> tuple[Path, Path]:
    """Save a tiny model with the weights that `names` matches quantised, and its dequantised float32 twin."""
    dense = save_tiny(family, folder / "dense", **changes)
    weights = load_file(dense / "model.safetensors")
    stored: Tensors = {}
    for name, weight in weights.items():
        if names.fullmatch(name) is None:
            stored[name] = weight
            continue
        parts, weights[name] = quantize(weight)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    assert len(stored) > len(weights), "nothing was quantised"
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    other = folder / "quantized"
    other.mkdir()
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((dense / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return other, dense


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed_config(format_: str, **weights: Any) -> dict[str, Any]:
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": known | weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}
