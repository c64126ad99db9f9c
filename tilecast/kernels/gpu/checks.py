"""Whether the operands of an expert GEMM are what its compiled kernels read: one clear line where they are not."""

from __future__ import annotations

import torch

from tilecast.errors import InputError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.gpu.layouts import LAYOUTS
from tilecast.kernels.gpu.quantized import quantized
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import ExpertGemm

TRITON_TYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BOUNDARY = 16
"""Bytes that a pointer is a multiple of in every compiled kernel; elsewhere Triton would compile slower code."""


def check_call(weights: GemmWeights, route: ExpertLayout, rows: torch.Tensor) -> None:
    """Raise InputError unless weights, routing and rows belong together."""
    experts = weights.gemm.layer.experts
    if route.experts != experts:
        raise InputError(f"slots are routed over {route.experts} experts, the weights have {experts}")
    if route.top_k != weights.gemm.layer.top_k:
        raise InputError(f"slots are routed to {route.top_k} experts, the layer's top-k is {weights.gemm.layer.top_k}")
    devices = {rows.device, weights.data.device, route.ids.device}
    if len(devices) > 1:
        raise InputError(f"operands are on {', '.join(sorted(str(d) for d in devices))}, expected one device")


def check_rows(what: str, tensor: torch.Tensor, shape: tuple[int, int], *dtypes: str) -> None:
    """Raise InputError unless a tensor is contiguous, of a shape and of one of the dtypes."""
    wanted = [TORCH_DTYPES[name] for name in dtypes]
    if tensor.shape != shape or tensor.dtype not in wanted or not tensor.is_contiguous():
        raise InputError(
            f"{what} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"expected contiguous {' or '.join(str(d) for d in wanted)} {shape}"
        )


def check_output(tensor: torch.Tensor, shape: tuple[int, int], *dtypes: str) -> None:
    """Raise InputError unless an output is as `check_rows` wants it and begins on a 16-byte boundary."""
    check_rows("output", tensor, shape, *dtypes)
    check_boundary("output", tensor)


def check_boundary(what: str, tensor: torch.Tensor) -> None:
    """Raise InputError unless a tensor begins on a 16-byte boundary."""
    if tensor.data_ptr() % BOUNDARY:
        raise InputError(f"{what} {tuple(tensor.shape)}: data are not on a {BOUNDARY}-byte boundary; clone the tensor")


def check_weights(weights: GemmWeights) -> None:
    """Raise InputError unless the stored weights are what their layout says."""
    gemm, data, bias = weights.gemm, weights.data, weights.bias
    if quantized(gemm):
        for tensor in check_stack(data, gemm).tensors:
            check_boundary(f"{gemm.layer.weight_format} weights", tensor)
        _check_bias(bias, (gemm.layer.experts, gemm.n), data.device)
        return
    shape = (gemm.layer.experts, gemm.k, gemm.n) if weights.layout.startswith("kn") else (
        gemm.layer.experts, gemm.n, gemm.k
    )  # fmt: skip
    dtype = TORCH_DTYPES[gemm.layer.dtype]
    if isinstance(data, QuantizedStack):
        raise InputError(f"weights are a stack of {data.format}, the layer's are dense")
    if weights.layout not in LAYOUTS or data.dtype != dtype or data.shape != shape or not data.is_contiguous():
        raise InputError(
            f"weights in layout {weights.layout} are {data.dtype} {tuple(data.shape)}, expected contiguous {dtype} "
            f"{shape} in one of {', '.join(LAYOUTS)}"
        )
    check_boundary("weights", data)
    _check_bias(bias, (shape[0], gemm.n), data.device)


def check_stack(stack: object, gemm: ExpertGemm) -> QuantizedStack:
    """Return the stack, which must be one of `gemm`'s format. Raises InputError."""
    if not isinstance(stack, QuantizedStack):
        raise InputError(f"weights are a {type(stack).__name__}, expected a stack of {gemm.layer.weight_format}")
    stack.check(gemm)
    return stack


def _check_bias(bias: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if bias is None:
        return
    if bias.shape != shape or bias.dtype not in TRITON_TYPES:
        raise InputError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected floats {shape}")
    if not bias.is_contiguous() or bias.device != device:
        raise InputError(f"bias is on {bias.device} with strides {bias.stride()}, expected contiguous on {device}")
    check_boundary("biases", bias)
