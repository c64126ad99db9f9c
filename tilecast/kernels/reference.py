"""The whole layer in float64: the oracle of every test and of the tuner's correctness gate.

Each function takes operands in the layer's dtype and computes exactly what NUMERICS asks for, without any
intermediate rounding, so that its distance to a kernel's result is the kernel's own error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilecast.errors import InputError
from tilecast.kernels.routing import ExpertLayout
from tilecast.problem import ExpertLayer

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0
"""gpt-oss's clamped SwiGLU: (clamp(u, ±7) + 1) · g · sigmoid(1.702 g), g clamped from above at 7."""


def activate(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Apply an activation in the operands' own precision; `up` is None when the layer is not gated."""
    if activation == "swiglu_oai":
        gate = gate.clamp(max=SWIGLU_OAI_LIMIT)
        value = gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate)
        return value if up is None else value * (up.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT) + 1)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "drelu": F.relu,
        "identity": lambda x: x,
    }
    if activation not in functions:
        raise InputError(f"activation is {activation!r}, expected one of {', '.join([*functions, 'swiglu_oai'])}")
    value = functions[activation](gate)
    if activation == "drelu" and up is not None:
        up = F.relu(up)
    return value if up is None else value * up


def reference_up(
    layer: ExpertLayer,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    route: ExpertLayout,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the up GEMM's result [T·k, I] in `dtype`: hidden [T, H], weight [E, N, H], bias [E, N] or None.

    Rows of absent slots are zero. With a lower `dtype` this is the same-dtype torch that errors are judged by.
    """
    rows = hidden.to(dtype)
    out = torch.zeros(route.tokens * route.top_k, layer.intermediate, dtype=dtype, device=hidden.device)
    for expert, slots in _experts(route):
        product = rows[slots // route.top_k] @ weight[expert].to(dtype).T
        if bias is not None:
            product = product + bias[expert].to(dtype)
        gate = product[:, : layer.intermediate]
        up = product[:, layer.intermediate :] if layer.gated else None
        out[slots] = activate(gate, up, layer.activation)
    return out


def reference_down(
    layer: ExpertLayer,
    intermediate: torch.Tensor,
    weight: torch.Tensor,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the down GEMM and combine [T, H] in `dtype`: intermediate [T·k, I], weight [E, H, I]."""
    rows = intermediate.to(dtype)
    slots_out = torch.zeros(route.tokens * route.top_k, layer.hidden, dtype=dtype, device=intermediate.device)
    scale = topk_weights.to(dtype).flatten()
    for expert, slots in _experts(route):
        product = rows[slots] @ weight[expert].to(dtype).T
        if bias is not None:
            product = product + bias[expert].to(dtype)
        slots_out[slots] = product * scale[slots, None]
    return slots_out.view(route.tokens, route.top_k, layer.hidden).sum(1)


def reference_layer(
    layer: ExpertLayer,
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the whole layer's result [T, H] in `dtype`, without rounding the intermediate."""
    intermediate = reference_up(layer, hidden, w13, route, bias13, dtype)
    return reference_down(layer, intermediate, w2, route, topk_weights, bias2, dtype)


def _experts(route: ExpertLayout) -> list[tuple[int, torch.Tensor]]:
    offsets = route.offsets.tolist()
    found = []
    for expert in range(route.experts):
        if offsets[expert + 1] > offsets[expert]:
            found.append((expert, route.slots[offsets[expert] : offsets[expert + 1]].long()))
    return found
