"""The operands of an expert layer: what weights make which layer, and what inputs fit it."""

from __future__ import annotations

import torch

from tilecast.engine.table_runtime import Runtime
from tilecast.environment import environment_for
from tilecast.errors import DeviceError, InputError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack, check_sizes
from tilecast.kernels.stacks import Weights, tensors_of
from tilecast.problem import ExpertLayer, check_int

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def layer_of(
    w13: Weights,
    w2: Weights,
    *,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
    dtype: torch.dtype | None = None,
) -> ExpertLayer:
    """Return the layer that plain weights make, as `prepare_experts` takes them. Raises InputError."""
    if len(w13.shape) != 3 or len(w2.shape) != 3:
        raise InputError(
            f"w13 is {seen(w13)} and w2 {seen(w2)}, expected [E, {'2I' if gated else 'I'}, H] and [E, H, I]"
        )
    name, weight_format = _stored_as(w13, w2, dtype)
    experts, hidden, intermediate = w2.shape
    wanted = (experts, intermediate * (2 if gated else 1), hidden)
    if w13.shape != wanted:
        raise InputError(f"w13 is {seen(w13)}, expected {wanted} to fit w2 {tuple(w2.shape)} with gated={gated}")
    if (bias13 is None) != (bias2 is None):
        raise InputError("one of bias13 and bias2 is given, expected both or none; pass zeros for the other")
    for what, bias, shape in (("bias13", bias13, wanted[:2]), ("bias2", bias2, (experts, hidden))):
        if bias is not None and (bias.shape != shape or not bias.dtype.is_floating_point):
            raise InputError(f"{what} is {seen(bias)}, expected floats {shape}")
    for what, tensor in (("w13", w13), ("w2", w2), ("bias13", bias13), ("bias2", bias2)):
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            raise InputError(f"{what} {tuple(tensor.shape)} is not contiguous; pass {what}.contiguous()")
        if tensor is not None and tensor.device != w13.device:
            raise InputError(f"{what} is on {tensor.device}, expected {w13.device} like w13")
    check_int("top-k", top_k, 1)
    layer = ExpertLayer(
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        dtype=name,
        weight_format=weight_format,
        activation=activation,
        gated=gated,
        bias=bias13 is not None,
        global_experts=experts if global_experts is None else global_experts,
    )
    for gemm, weights in zip(layer.gemms, (w13, w2), strict=True):
        check_sizes(gemm)
        if isinstance(weights, QuantizedStack):
            weights.check(gemm)
    return layer


def _stored_as(w13: Weights, w2: Weights, dtype: torch.dtype | None) -> tuple[str, str]:
    """Return the name of the hidden states' dtype and the weight format. Raises InputError."""
    known = ", ".join(DTYPE_NAMES.values())
    if isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor):
        if w13.dtype not in DTYPE_NAMES or w2.dtype != w13.dtype:
            raise InputError(f"w13 is {w13.dtype} and w2 {w2.dtype}, expected one of {known} for both")
        if dtype is not None and dtype is not w13.dtype:
            raise InputError(f"dtype is {dtype}, expected {w13.dtype} like the weights, or none")
        return DTYPE_NAMES[w13.dtype], "dense"
    if isinstance(w13, torch.Tensor) or isinstance(w2, torch.Tensor) or w13.format != w2.format:
        raise InputError(f"w13 is {seen(w13)} and w2 {seen(w2)}, expected one weight format for both")
    if dtype not in DTYPE_NAMES:
        raise InputError(f"dtype is {dtype} with {w13.format} weights, expected the hidden states', one of {known}")
    return DTYPE_NAMES[dtype], w13.format


def check_inputs(
    layer: ExpertLayer, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return contiguous hidden [T, H], ids [T, k] and float32 weights [T, k]. Raises InputError."""
    width, top_k = layer.hidden, layer.top_k
    if hidden.dtype is not TORCH_DTYPES[layer.dtype]:
        like = "like the weights" if layer.weight_format == "dense" else "as the experts were prepared for"
        raise InputError(f"hidden is {hidden.dtype}, expected {TORCH_DTYPES[layer.dtype]} {like}")
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        raise InputError(f"hidden is {seen(hidden)}, expected [..., {width}] to fit the weights")
    rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, width)
    wanted = (rows.shape[0], top_k)
    ids = topk_ids if topk_ids.dim() == 2 else topk_ids.reshape(-1, topk_ids.shape[-1] if topk_ids.dim() else 1)
    scales = topk_weights if topk_weights.dim() == 2 else topk_weights.reshape(-1, *topk_weights.shape[-1:])
    if ids.shape != wanted or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"topk_ids is {seen(topk_ids)}, expected int32 or int64 {wanted} to fit hidden")
    if scales.shape != wanted or not scales.dtype.is_floating_point:
        raise InputError(f"topk_weights is {seen(topk_weights)}, expected floats {wanted} to fit hidden")
    if not hidden.device == topk_ids.device == topk_weights.device:
        places = f"hidden is on {hidden.device}, topk_ids on {topk_ids.device}, topk_weights on {topk_weights.device}"
        raise InputError(f"{places}, expected one device")
    if hidden.requires_grad and torch.is_grad_enabled():
        raise InputError("hidden requires grad, but expert layers are forward only; run under torch.inference_mode()")
    if scales.requires_grad:
        scales = scales.detach()
    return rows.contiguous(), ids, scales.to(torch.float32).contiguous()


def seen(weights: Weights) -> str:
    """Return what a message says of a tensor or a stack: its dtype or weight format, and its shape."""
    kind = weights.format if isinstance(weights, QuantizedStack) else str(weights.dtype).removeprefix("torch.")
    return f"{kind} {tuple(weights.shape)}"


def place_of(data: object) -> int:
    """Return a number that tells one layer's weights, as a kernel has them, from others while both live."""
    if isinstance(data, torch.Tensor | QuantizedStack):
        return tensors_of(data)[0].data_ptr()
    return id(data)


def check_device(weights: Weights, runtime: Runtime) -> None:
    """Raise DeviceError unless `runtime` is for the device, or one of equal name and architecture, of the weights."""
    device, wanted = weights.device, runtime.environment
    if device in runtime.devices:
        return
    if device.type != wanted.device_kind:
        raise DeviceError(
            f"the weights are on {device}, but the table in use is for {wanted.device_kind}; move them there"
        )
    if device.type == "cuda":
        there = environment_for(device)
        if (there.device, there.arch) != (wanted.device, wanted.arch):
            raise DeviceError(
                f"the weights are on {device}, a {there.device} ({there.arch}), but the table in use is for "
                f"{wanted.device} ({wanted.arch}); use one kind of GPU in a process"
            )
    runtime.devices.add(device)
