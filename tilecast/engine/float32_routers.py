"""Routers of transformers' models that keep their logits in float32, where the family's own code rounds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tilecast.engine.adapted import adapted_of

FLOAT32 = "_tilecast_float32"
"""The attribute that marks a router whose logits stay in float32."""


class _Float32Linear(TorchFunctionMode):
    """Linear layers with one given weight give float32, from operands taken to it first."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self._weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2 and args[1] is self._weight:
            rows, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            return F.linear(rows.float(), weight.float(), None if bias is None else bias.float())
        return func(*args, **(kwargs or {}))


def keep_router_in_float32(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Have the router beside an experts module compute its logits in float32."""
    parent = model.get_submodule(name.rpartition(".")[0])
    form = getattr(adapted_of(module), "form", None)
    experts = form.global_experts if form is not None else int(getattr(module, "num_experts", 0))
    for child in parent.children():
        if child is module or FLOAT32 in child.__dict__:
            continue
        for weight in child.parameters():
            if weight.dim() == 2 and weight.shape[0] == experts and weight.dtype is not torch.float32:
                child.forward = _under(_Float32Linear, weight, child.forward)
                child.__dict__[FLOAT32] = True


def _under(mode: Callable[[Any], TorchFunctionMode], weight: object, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode(weight):
            return forward(*args, **kwargs)

    return run
