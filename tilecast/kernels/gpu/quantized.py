"""Weights of the formats other than dense, as the Triton kernels take them: pointers, strides, limits, numerics.

The kernels read a `QuantizedStack` as it is, in the layout `plain`, and make codes into numbers in registers. A scale
that belongs to a group of K multiplies each weight, in float32, and the product is rounded once to the rows' dtype;
one that holds for all of K multiplies the finished sum, and the codes themselves, exact in 16 bits, are multiplied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.kernels.gpu.build import Constant
from tilecast.kernels.gpu.target import Target
from tilecast.kernels.gpu.tiles import instruction
from tilecast.kernels.scales import scale_shape
from tilecast.problem import MAX_DIMENSION, ExpertGemm, TileConfig, weight_format

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.formats import QuantizedStack

CODE_TYPES = {"awq": "i32", "int4": "i32", "int8": "i8", "fp8": "u8"}
WORD = 8
"""Codes of 4 bits in a word, the first in its lowest bits."""
WIDENS_E4M3 = ("89", "90", "100", "120", "gfx950")
"""Targets with an instruction that makes e4m3 of OCP's kind wider (PTX ISA, `cvt.f16x2.e4m3x2`; CDNA 4 ISA guide)."""
CODE_CONSTANTS = ("KIND", "GROUP", "SCALE_EXPERT", "SCALE_ROW", "SCALE_BLOCK", "SCALE_UP", "BITWISE")
"""What the kernels on codes are compiled for beside what those on dense weights are."""


def quantized(gemm: ExpertGemm) -> bool:
    """Return whether the weights are codes."""
    return gemm.layer.weight_format != "dense"


def code_type(gemm: ExpertGemm) -> str:
    """Return Triton's name of the type that codes are read as: 4 bits as words, e4m3 as bytes for every target."""
    return CODE_TYPES[weight_format(gemm.layer.weight_format).kind]


def scale_type(gemm: ExpertGemm) -> str:
    """Return the dtype of scales that `formats.quantize` makes and checkpoints mostly have."""
    return "fp32" if weight_format(gemm.layer.weight_format).kind == "fp8" else "fp16"


def code_signature(gemm: ExpertGemm, scale_dtype: str | None) -> tuple[tuple[str, str], ...]:
    """Return the arguments that stand for the weights: codes, scales, zero points (codes where there are none)."""
    code = f"*{code_type(gemm)}"
    zeros = "*u8" if weight_format(gemm.layer.weight_format).kind == "awq" else code
    return ("weights", code), ("scales", f"*{scale_dtype or scale_type(gemm)}"), ("zeros", zeros)


def code_operands(stack: QuantizedStack) -> tuple[torch.Tensor, ...]:
    """Return what is launched for `code_signature`."""
    import torch

    kind = weight_format(stack.format).kind
    codes = stack.codes if kind == "int8" else stack.codes.view(torch.uint8 if kind == "fp8" else torch.int32)
    return codes, stack.scales, codes if stack.zeros is None else stack.zeros


def code_constants(gemm: ExpertGemm, target: Target) -> dict[str, Constant]:
    """Return the strides of codes in bytes or words, which replace those of dense weights, and `CODE_CONSTANTS`."""
    form = weight_format(gemm.layer.weight_format)
    rows, columns = scale_shape(gemm)
    pairs = gemm.name == "up" and gemm.layer.gated
    width = gemm.k // (WORD if form.bits == 4 else 1)
    return {
        "EXPERT_STRIDE": gemm.n * width, "COLUMN_STRIDE": width,
        "UP_STRIDE": gemm.layer.intermediate * width if pairs else 0,
        "KIND": form.kind, "GROUP": form.group, "SCALE_EXPERT": rows * columns, "SCALE_ROW": columns,
        "SCALE_BLOCK": form.rows or MAX_DIMENSION, "SCALE_UP": rows // 2 if pairs else 0,
        "BITWISE": form.kind == "fp8" and target.arch not in WIDENS_E4M3,
    }  # fmt: skip


def code_numerics(gemm: ExpertGemm, config: TileConfig, target: Target) -> dict[str, Json]:
    """Return the fields of the numerics class in which codes differ from dense weights.

    Triton lets the lanes of `mma.sync` hold the K of a step in another order where operands were codes, so each kind
    of instruction is a class of its own, whatever the sums of one are.
    """
    form = weight_format(gemm.layer.weight_format)
    where = f"times scale in fp32, rounded to {gemm.layer.dtype}" if form.group else "scale after the sum, in fp32"
    return {
        "weights": f"{gemm.layer.weight_format}: codes less zero points, {where}",
        "instruction": instruction(gemm, config, target),
    }
