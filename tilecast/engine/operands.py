"""The operands of an expert layer: what weights make which layer, and what inputs fit it."""

from __future__ import annotations

import torch

from tilecast.engine.runtime import Runtime
from tilecast.environment import environment_for
from tilecast.errors import DeviceError, InputError
from tilecast.kernels.spec import TORCH_DTYPES
from tilecast.problem import ExpertLayer, check_int

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def layer_of(
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
) -> ExpertLayer:
    """Return the layer that plain weights make, as `prepare_experts` takes them. Raises InputError."""
    if w13.dim() != 3 or w2.dim() != 3:
        raise InputError(
            f"w13 is {seen(w13)} and w2 {seen(w2)}, expected [E, {'2I' if gated else 'I'}, H] and [E, H, I]"
        )
    if w13.dtype not in DTYPE_NAMES or w2.dtype != w13.dtype:
        raise InputError(
            f"w13 is {w13.dtype} and w2 {w2.dtype}, expected one of {', '.join(DTYPE_NAMES.values())} for both"
        )
    experts, hidden, intermediate = w2.shape
    wanted = (experts, intermediate * (2 if gated else 1), hidden)
    if w13.shape != wanted:
        raise InputError(f"w13 is {seen(w13)}, expected {wanted} to fit w2 {tuple(w2.shape)} with gated={gated}")
    if (bias13 is None) != (bias2 is None):
        raise InputError("one of bias13 and bias2 is given, expected both or none; pass zeros for the other")
    for name, bias, shape in (("bias13", bias13, wanted[:2]), ("bias2", bias2, (experts, hidden))):
        if bias is not None and (bias.shape != shape or not bias.dtype.is_floating_point):
            raise InputError(f"{name} is {seen(bias)}, expected floats {shape}")
    for name, tensor in (("w13", w13), ("w2", w2), ("bias13", bias13), ("bias2", bias2)):
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(f"{name} {tuple(tensor.shape)} is not contiguous; pass {name}.contiguous()")
        if tensor is not None and tensor.device != w13.device:
            raise InputError(f"{name} is on {tensor.device}, expected {w13.device} like w13")
    check_int("top-k", top_k, 1)
    return ExpertLayer(
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        dtype=DTYPE_NAMES[w13.dtype],
        activation=activation,
        gated=gated,
        bias=bias13 is not None,
        global_experts=experts if global_experts is None else global_experts,
    )


def check_inputs(
    layer: ExpertLayer, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return contiguous hidden [T, H], ids [T, k] and float32 weights [T, k]. Raises InputError."""
    width, top_k = layer.hidden, layer.top_k
    if hidden.dtype is not TORCH_DTYPES[layer.dtype]:
        raise InputError(f"hidden is {hidden.dtype}, expected {TORCH_DTYPES[layer.dtype]} like the weights")
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


def seen(tensor: torch.Tensor) -> str:
    """Return what a message says of a tensor: its dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_device(weights: torch.Tensor, runtime: Runtime) -> None:
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
