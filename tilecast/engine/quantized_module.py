"""An experts module of transformers whose weights are quantised: the stacks beside it, and dense weights on demand.

The module's own parameters have the shape and dtype of the dense weights, and no memory: they read as NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from tilecast.engine.rank_part import local, placed_like
from tilecast.errors import InputError
from tilecast.kernels.formats import QuantizedStack
from tilecast.problem import ExpertLayer

STACKS = "_tilecast_stacks"
"""The attribute of a module that holds its `Stacks` while nothing else does."""


class Stacks(NamedTuple):
    """Quantised weights of one module: w13 [E, 2I or I, H], gate rows before up rows, and w2 [E, H, I]."""

    w13: QuantizedStack
    w2: QuantizedStack

    def to(self, device: torch.device) -> Stacks:
        """Return the stacks on a device."""
        return Stacks(*(_moved(stack, device) for stack in self))


def attach(module: torch.nn.Module, stacks: Stacks, known: dict[str, torch.Tensor]) -> None:
    """Make a module one of quantised weights, where those of w13 and w2 are the parameters `known`, by name.

    Its parameters are split over ranks as `known` are, and the stacks are this rank's part. Raises InputError where
    those are not.
    """
    # What is hashed is the class; mypy judges how its objects are.
    module.__class__ = _movable(type(module))  # type: ignore[arg-type]
    transposed = bool(getattr(module, "is_transposed", False))
    for (name, parameter), stack in zip(known.items(), stacks, strict=True):
        experts, rows, width = stack.shape
        shape = (experts, width, rows) if transposed else (experts, rows, width)
        if local(parameter).shape != shape:
            raise InputError(f"{name} is {tuple(local(parameter).shape)} on this rank, its quantised weights {shape}")
        module._parameters[name] = _without_memory(parameter, parameter.dtype, stack.device)
    module.__dict__[STACKS] = stacks


def stacks_of(module: torch.nn.Module) -> Stacks | None:
    """Return the quantised weights that a module holds."""
    return cast("Stacks | None", module.__dict__.get(STACKS))


def detach(module: torch.nn.Module) -> None:
    """Let go of a module's stacks, which somebody else holds from now on."""
    module.__dict__.pop(STACKS, None)


def hand_back(module: torch.nn.Module, stacks: Stacks, names: tuple[str, ...]) -> None:
    """Give a module its stacks, on the device of its parameters `names`, which are without memory even if copied."""
    for name in names:
        known = module.get_parameter(name)
        module._parameters[name] = _without_memory(known, known.dtype, known.device)
        module.__dict__[STACKS] = stacks.to(known.device)


def make_dense(module: torch.nn.Module) -> None:
    """Give a module the dense weights that its stacks stand for, in the dtype and on the device of its parameters."""
    stacks = stacks_of(module)
    if stacks is None:
        return
    gated, concatenated = bool(getattr(module, "has_gate", True)), bool(getattr(module, "is_concatenated", True))
    names = ("gate_up_proj" if gated else "up_proj", "down_proj")
    w13, w2 = dense_weights(stacks, gated=gated, dtype=module.get_parameter(names[1]).dtype)
    if gated and not concatenated:
        w13 = torch.stack(w13.chunk(2, dim=1), dim=2).flatten(1, 2)
    for name, weight in zip(names, (w13, w2), strict=True):
        weight = weight.transpose(1, 2).contiguous() if getattr(module, "is_transposed", False) else weight
        known = module.get_parameter(name)
        module._parameters[name] = torch.nn.Parameter(placed_like(known, weight.to(known.device)), requires_grad=False)
    detach(module)


def dense_weights(stacks: Stacks, *, gated: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 [E, 2I or I, H] and w2 [E, H, I] in `dtype`, computed in float32."""
    experts, hidden, intermediate = stacks.w2.shape
    layer = ExpertLayer(
        hidden=hidden, intermediate=intermediate, experts=experts, top_k=1, gated=gated, weight_format=stacks.w2.format,
        activation="silu" if gated else "identity",
    )  # fmt: skip
    found = []
    for stack, gemm in zip(stacks, layer.gemms, strict=True):
        dense = torch.empty(stack.shape, dtype=dtype, device=stack.device)
        for expert in range(experts):
            dense[expert] = stack.dequantized(gemm, expert, torch.float32)
        found.append(dense)
    return found[0], found[1]


def _moved(stack: QuantizedStack, device: torch.device) -> QuantizedStack:
    if stack.device == device:
        return stack
    zeros = None if stack.zeros is None else stack.zeros.to(device)
    return replace(stack, codes=stack.codes.to(device), scales=stack.scales.to(device), zeros=zeros)


def _without_memory(known: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a parameter without memory, of the shape of `known` and split over ranks as it is."""
    empty = torch.full((1,), float("nan"), dtype=dtype, device=device).expand(local(known).shape)
    return torch.nn.Parameter(placed_like(known, empty), requires_grad=False)


class _Quantized(torch.nn.Module):
    """What a module of quantised weights does otherwise than its own class."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move, or cast, without giving parameters memory; codes and scales are moved, never cast."""
        held = {name: p for name, p in self._parameters.items() if p is not None and p.numel()}
        bare = {name: p for name, p in held.items() if not any(local(p).stride())}
        for name in bare:
            self._parameters[name] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, untyped
        for name, parameter in bare.items():
            one = fn(local(parameter)[(0,) * parameter.dim()].clone())
            self._parameters[name] = _without_memory(parameter, one.dtype, one.device)
            stacks = stacks_of(self)
            if stacks is not None:
                self.__dict__[STACKS] = stacks.to(one.device)
        return self


@functools.cache
def _movable(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return a module class with what `_Quantized` does; it keeps its name."""
    if issubclass(kind, _Quantized):
        return kind
    return type(kind.__name__, (_Quantized, kind), {"__module__": kind.__module__})
