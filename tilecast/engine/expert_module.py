"""What an experts module of transformers computes, and its weights: read from the module itself, never from a config.

Such a module holds `gate_up_proj` (or `up_proj`) and `down_proj` for all experts, perhaps with biases, and says by
attributes how they lie. Its activation is found by trying it, so that a renamed class or a changed clamp is noticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tilecast.engine.operands import layer_of
from tilecast.engine.quantized_module import stacks_of
from tilecast.engine.rank_part import local as local
from tilecast.engine.split_experts import split_layers
from tilecast.errors import InputError
from tilecast.kernels.reference import activate
from tilecast.kernels.stacks import Weights
from tilecast.problem import ACTIVATIONS, ExpertLayer

PROBE_TOLERANCE = 2e-6
"""How far an activation in float32 may be from one of ours in float64, relative to 1 + |value| + |gate| (1 + |up|)."""


class Unsupported(Exception):
    """Why the tuned kernels cannot run a module; the message says it."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one module's experts lie and what they compute.

    `names` are the parameters of w13, w2 and, with a bias, bias13, bias2. `interleaved`: gate and up rows alternate,
    and are to be parted; `transposed`: [E, in, out]. `split` is what is cut over ranks: nothing, `intermediate` (each
    rank's output is a partial sum) or `experts`. `activation` is None where the module's own code runs between the
    GEMMs, as it always does with a norm of every expert's output (`normed`).
    """

    names: tuple[str, ...]
    gated: bool
    activation: str | None
    interleaved: bool
    transposed: bool
    split: str
    global_experts: int
    normed: bool = False


def form_of(module: torch.nn.Module) -> Form:
    """Return the form of an experts module. Raises Unsupported."""
    gated, bias = bool(_said(module, "has_gate", True)), bool(_said(module, "has_bias", False))
    normed = bool(_said(module, "has_post_expert_norm", False))
    first = "gate_up_proj" if gated else "up_proj"
    names = (first, "down_proj", *((f"{first}_bias", "down_proj_bias") if bias else ()))
    for name in names:
        found = getattr(module, name, None)
        if not isinstance(found, torch.Tensor):
            raise Unsupported(f"it has no tensor {name}")
        if not found.dtype.is_floating_point or found.dtype.itemsize < 2:
            raise Unsupported(f"{name} is stored as {found.dtype}")
    transposed = bool(_said(module, "is_transposed", False))
    known = _activation(module, gated, interleaved=not _said(module, "is_concatenated", True))
    activation, interleaved = (None, False) if normed or known is None else known
    if activation is None:
        _check_own_code(module, first, gated=gated, transposed=transposed)
    down = module.get_parameter(names[1]) if names[1] in module._parameters else getattr(module, names[1])
    split = _split(down, transposed)
    if normed and split == "intermediate":
        raise Unsupported("it normalises every expert's output, of which each rank has a partial sum")
    return Form(
        names=names, gated=gated, activation=activation, interleaved=interleaved, transposed=transposed, split=split,
        global_experts=down.shape[0], normed=normed,
    )  # fmt: skip


def mesh_of(module: torch.nn.Module, form: Form) -> Any | None:
    """Return the device mesh over which a module's weights are split; None where they are whole."""
    return None if form.split == "" else getattr(module._parameters[form.names[1]], "device_mesh", None)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """One module's weights as `prepare_experts` takes them; `shared` if they are the module's own memory.

    `dtype` is that of hidden states, and of weights that are not quantised.
    """

    w13: Weights
    w2: Weights
    bias13: torch.Tensor | None
    bias2: torch.Tensor | None
    dtype: torch.dtype
    shared: bool

    def layers(self, form: Form, top_k: int) -> tuple[ExpertLayer, ...]:
        """Return the layer that they make, or the two whose up and down GEMM the module runs on. Raises InputError."""
        experts = max(form.global_experts, top_k)
        layer = layer_of(
            self.w13, self.w2, top_k=top_k, activation=form.activation or "silu", gated=form.gated,
            bias13=self.bias13, bias2=self.bias2, global_experts=experts, dtype=self.dtype,
        )  # fmt: skip
        if form.activation is not None:
            return (layer,)
        if not isinstance(self.w13, torch.Tensor) or not isinstance(self.w2, torch.Tensor):
            raise Unsupported("its own code runs between the GEMMs, which quantised weights do not support yet")
        return split_layers(
            self.w13, self.w2, top_k=top_k, dtype=layer.dtype, bias=layer.bias, global_experts=experts,
            normed=form.normed,
        )  # fmt: skip


def plain_weights(module: torch.nn.Module, form: Form, *, first_rank: bool = True) -> Plain:
    """Return a module's local weights, gate rows before up rows, [E, out, in]; stacks where it has those.

    Where the intermediate size is split, the down projection's bias is kept by the first rank alone, as the ranks'
    outputs are added.
    """
    found = [local(getattr(module, name)) for name in form.names]
    w13, w2, *biases = found
    bias13, bias2 = (None, None) if not biases else (biases[0], biases[1].contiguous())
    parted = form.interleaved and form.gated
    if bias13 is not None:
        bias13 = torch.cat((bias13[:, ::2], bias13[:, 1::2]), dim=1) if parted else bias13.contiguous()
    if bias2 is not None and form.split == "intermediate" and not first_rank:
        bias2 = torch.zeros_like(bias2)
    stacks = stacks_of(module)
    if stacks is not None:
        return Plain(w13=stacks.w13, w2=stacks.w2, bias13=bias13, bias2=bias2, dtype=w2.dtype, shared=True)
    if form.transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    if parted:
        w13 = torch.cat((w13[:, ::2], w13[:, 1::2]), dim=1)
    w13, w2 = w13.contiguous(), w2.contiguous()
    shared = w13.data_ptr() == found[0].data_ptr() and w2.data_ptr() == found[1].data_ptr()
    return Plain(w13=w13, w2=w2, bias13=bias13, bias2=bias2, dtype=w2.dtype, shared=shared)


def stored_again(w13: torch.Tensor, w2: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plain weights as the module had them: the reverse of `plain_weights`."""
    if form.interleaved and form.gated:
        gate, up = w13.chunk(2, dim=1)
        w13 = torch.stack((gate, up), dim=2).flatten(1, 2)
    if form.transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    return w13.contiguous(), w2.contiguous()


def _said(module: torch.nn.Module, name: str, default: bool) -> Any:
    return getattr(module, name, default)


def _split(down: torch.Tensor, transposed: bool) -> str:
    """Return what is cut over ranks. Raises Unsupported for cuts that make no layer."""
    placements = getattr(down, "placements", None)
    if placements is None:
        return ""
    cut = [placement for placement in placements if not placement.is_replicate()]
    if not cut:
        return ""
    dimension = getattr(cut[0], "dim", None)
    inner = 1 if transposed else 2
    if len(placements) != 1 or dimension is None or dimension % 3 not in (0, inner):
        raise Unsupported(f"its weights are split as {placements} over ranks")
    return "experts" if dimension % 3 == 0 else "intermediate"


# The activation, by trying it ---------------------------------------------------------------------------------


def _activation(module: torch.nn.Module, gated: bool, *, interleaved: bool) -> tuple[str, bool] | None:
    """Return which of our activations a module applies, and whether it reads gate and up alternating; None if none."""
    gate, up = _probe()
    values, other = torch.meshgrid(gate, up, indexing="ij")
    values, other = values.reshape(1, -1), other.reshape(1, -1)
    orders = (interleaved, not interleaved) if gated else (False,)
    for alternating in orders:
        try:
            seen = _applied(module, values, other if gated else None, alternating=alternating)
        except Exception:  # Whatever code of others raises: perhaps it wants rows of its own width.
            return None
        if seen is None or seen.shape != values.shape:
            continue
        for name in ACTIVATIONS:
            # Between a gate and an up projection no kernel has it.
            if not (gated and name == "identity") and _same(seen, values, other if gated else None, name):
                return name, alternating
    return None


def _check_own_code(module: Any, first: str, *, gated: bool, transposed: bool) -> None:
    """Raise Unsupported unless what a module runs between the GEMMs makes one row of one row."""
    weight, down = local(getattr(module, first)), local(module.down_proj)
    width, inner = weight.shape[2 if transposed else 1], down.shape[1 if transposed else 2]
    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn((3, width), generator=generator)).to(weight)
    try:
        with torch.no_grad():
            function = module._apply_gate if gated else module.act_fn
            seen, alone = function(rows), torch.cat([function(row) for row in torch.split(rows, 1)])
            if getattr(module, "has_post_expert_norm", False):
                module.post_expert_norm(rows.new_ones(1, down.shape[2 if transposed else 1]))
    except Exception as error:  # Whatever code of others raises says only that it cannot be run by itself.
        raise Unsupported(f"its activation or norm cannot be tried ({type(error).__name__}: {error})") from error
    if seen.shape != (3, inner) or not torch.allclose(seen.float(), alone.float(), rtol=1e-2, atol=1e-3):
        what = type(getattr(module, "act_fn", None)).__name__
        raise Unsupported(f"its activation ({what}, or the module's own _apply_gate) does not go row by row")


def _probe() -> tuple[torch.Tensor, torch.Tensor]:
    """Return values that tell activations and clamps apart: near 0, around every limit in use, and far beyond."""
    powers = torch.logspace(-5, 4, 40, dtype=torch.float32)
    gate = torch.cat((torch.linspace(-12.0, 12.0, 193), powers, -powers))
    up = torch.tensor([1.0, -0.75, 0.0, 3.5, -6.5, 7.25, -9.0, 11.0, -60.0, 3000.0])
    return gate, up


def _applied(
    module: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor | None, *, alternating: bool
) -> torch.Tensor | None:
    functions: Any = module
    with torch.no_grad():
        device = local(next(iter(module.parameters()))).device
        gate = gate.to(device)
        if up is None:
            found = functions.act_fn(gate)
        else:
            up = up.to(device)
            joined = torch.stack((gate, up), dim=2).flatten(1) if alternating else torch.cat((gate, up), dim=1)
            found = functions._apply_gate(joined)
    return found.to("cpu", torch.float64) if isinstance(found, torch.Tensor) else None


def _same(seen: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, name: str) -> bool:
    try:
        wanted = activate(gate.double(), None if up is None else up.double(), name)
    except InputError:
        return False
    if wanted.shape != seen.shape or not bool(torch.isfinite(seen).all()):
        return False
    scale = 1 + wanted.abs() + gate.double().abs() * (1 if up is None else 1 + up.double().abs())
    distance = float(((seen - wanted).abs() / scale).max())
    return not math.isnan(distance) and distance <= PROBE_TOLERANCE
