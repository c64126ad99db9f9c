"""The whole layer in float64: the oracle of every test and of the tuner's correctness gate.

Each function takes operands in the layer's dtype and computes exactly what NUMERICS asks for, without any
intermediate rounding, so that its distance to a kernel's result is the kernel's own error. Quantised weights count as
the numbers that they stand for; they are dequantised a few rows of one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilecast.errors import InputError
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import FP8_ROWS, ROWS_GROUP
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertGemm, ExpertLayer

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0
"""gpt-oss's clamped SwiGLU: (clamp(u, ±7) + 1) · g · sigmoid(1.702 g), g clamped from above at 7."""
MAX_DEQUANTIZED = 1 << 24
"""Elements of quantised weights that are dequantised at once."""


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
    weight: Weights,
    route: ExpertLayout,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    activations: str = "",
) -> torch.Tensor:
    """Return the up GEMM's result [T·k, I] in `dtype`: hidden [T, H], weight [E, N, H], bias [E, N] or None.

    Rows of absent slots are zero. With a lower `dtype` this is the same-dtype torch that errors are judged by; it gets
    quantised weights dequantised in float32 and rounded once. `activations` is what kernels of that numerics field
    round rows to: nothing, or `FP8_ROWS`.
    """
    rows = rounded_rows(hidden, activations).to(dtype)
    out = torch.zeros(route.tokens * route.top_k, layer.intermediate, dtype=dtype, device=hidden.device)
    for expert, slots in _experts(route):
        product = _product(rows[slots // route.top_k], weight, layer.up, expert)
        if bias is not None:
            product = product + bias[expert].to(dtype)
        gate = product[:, : layer.intermediate]
        up = product[:, layer.intermediate :] if layer.gated else None
        out[slots] = activate(gate, up, layer.activation)
    return out


def reference_down(
    layer: ExpertLayer,
    intermediate: torch.Tensor,
    weight: Weights,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    activations: str = "",
) -> torch.Tensor:
    """Return the down GEMM and combine [T, H] in `dtype`: intermediate [T·k, I], weight [E, H, I]."""
    rows = rounded_rows(intermediate, activations).to(dtype)
    slots_out = torch.zeros(route.tokens * route.top_k, layer.hidden, dtype=dtype, device=intermediate.device)
    scale = topk_weights.to(dtype).flatten()
    for expert, slots in _experts(route):
        product = _product(rows[slots], weight, layer.down, expert)
        if bias is not None:
            product = product + bias[expert].to(dtype)
        slots_out[slots] = product * scale[slots, None]
    return slots_out.view(route.tokens, route.top_k, layer.hidden).sum(1)


def reference_layer(
    layer: ExpertLayer,
    hidden: torch.Tensor,
    w13: Weights,
    w2: Weights,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the whole layer's result [T, H] in `dtype`, without rounding the intermediate."""
    intermediate = reference_up(layer, hidden, w13, route, bias13, dtype)
    return reference_down(layer, intermediate, w2, route, topk_weights, bias2, dtype)


def rounded_rows(rows: torch.Tensor, activations: str) -> torch.Tensor:
    """Return rows [M, K] as a kernel with this numerics field multiplies them; float64 where they are rounded.

    A scale is the largest magnitude in 128 elements of one row over the largest of e4m3. Raises InputError.
    """
    if not activations:
        return rows
    if activations != FP8_ROWS:
        raise InputError(f"activations are {activations!r}, expected none or {FP8_ROWS}")
    count, width = rows.shape
    largest = torch.finfo(torch.float8_e4m3fn).max
    grouped = F.pad(rows.to(torch.float32), (0, -width % ROWS_GROUP)).view(count, -1, ROWS_GROUP)
    scales = (grouped.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-12)
    codes = (grouped / scales).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return (codes.double() * scales.double()).flatten(1)[:, :width]


def _product(rows: torch.Tensor, weight: Weights, gemm: ExpertGemm, expert: int) -> torch.Tensor:
    """Return rows [M, K] times one expert's weights [N, K], in the rows' dtype."""
    if isinstance(weight, torch.Tensor):
        return rows @ weight[expert].to(rows.dtype).T
    exact = torch.float64 if rows.dtype is torch.float64 else torch.float32
    step = max(1, MAX_DEQUANTIZED // gemm.k)
    parts = [
        rows @ weight.dequantized(gemm, expert, exact, slice(first, first + step)).to(rows.dtype).T
        for first in range(0, gemm.n, step)
    ]
    return torch.cat(parts, dim=1)


def _experts(route: ExpertLayout) -> list[tuple[int, torch.Tensor]]:
    offsets = route.offsets.tolist()
    found = []
    for expert in range(route.experts):
        if offsets[expert + 1] > offsets[expert]:
            found.append((expert, route.slots[offsets[expert] : offsets[expert + 1]].long()))
    return found
