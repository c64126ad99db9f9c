"""What lies around the experts of somebody else's model on a CPU: linears, norms, and attention in 16 bits.

torch reads weights of one row at half of the memory's speed, takes six operations for a norm, and its bf16 attention of
one query is far below the memory's speed. All parts run as under `invariant()`, with its bits: a row's do not depend on
the other rows. They differ from torch's own in the order of sums alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilecast.engine import around_linears, around_norms
from tilecast.engine.around_linears import give_linear_back, take_linears
from tilecast.engine.around_norms import give_norm_back, take_norm
from tilecast.engine.invariant_attention import attention_forward

ATTENDS = "_tilecast_attends"
"""The attribute of a module whose attention in 16 bits Tilecast runs."""
SDPA = "sdpa"


def take_over(model: torch.nn.Module, experts: Iterable[str]) -> int:
    """Run a model's linears, norms and attention on Tilecast's kernels from now on; return the packed copies' bytes.

    Linears that are on the CPU, large enough and torch's own class get a packed copy beside their weight, which stays
    as it is; RMS norms are those that compute what the kernel computes; attention that goes through transformers'
    `sdpa` is taken in bf16 and fp16. Routers, the linears beside the `experts` modules (names) with an output for each
    expert, stay torch's: who is routed where is theirs to say.
    """
    routers = {linear for name in experts for linear in _routers(model, name)}
    modules = [module for module in model.modules() if module not in routers]
    for module in modules:
        take_norm(module)
        if hasattr(module, "is_causal") or hasattr(module, "num_key_value_groups"):
            # What transformers' sdpa function looks at.
            module.__dict__[ATTENDS] = True
    _offer_attention()
    return take_linears(modules)


def _routers(model: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    experts = model.get_submodule(name)
    count = getattr(experts, "num_experts", None)
    for child in model.get_submodule(name.rpartition(".")[0]).children():
        for module in child.modules() if child is not experts else ():
            if isinstance(module, torch.nn.Linear) and (count is None or module.out_features == count):
                yield module


def give_back(model: torch.nn.Module) -> None:
    """Run a model's linears, norms and attention as they ran before `take_over`."""
    for module in model.modules():
        module.__dict__.pop(ATTENDS, None)
        give_linear_back(module)
        give_norm_back(module)


@contextmanager
def as_before(model: torch.nn.Module) -> Iterator[None]:
    """Run a model's linears, norms and attention as before `take_over` meanwhile, keeping the packed copies."""
    held = [
        (module.__dict__, name)
        for module in model.modules()
        for name in (around_linears.STATE, around_norms.STATE, ATTENDS)
        if name in module.__dict__
    ]
    kept = [found.pop(name) for found, name in held]
    try:
        yield
    finally:
        for (found, name), value in zip(held, kept, strict=True):
            found[name] = value


# Attention ---------------------------------------------------------------------------------------------------


@functools.cache
def _offer_attention() -> None:
    """Have transformers' `sdpa` ask, for each call, whether the module is one of those taken over."""
    functions: Any = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    theirs = functions[SDPA]

    @functools.wraps(theirs)
    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,  # transformers' own name: some models give it as a keyword
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        asked = ATTENDS in getattr(module, "__dict__", ()) and not args
        if asked and _attends(query, key, value, attention_mask, kwargs):
            return attention_forward(module, query, key, value, attention_mask, **kwargs)
        return theirs(module, query, key, value, attention_mask, *args, **kwargs)

    functions.register(SDPA, forward)


def _attends(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, options: dict[str, Any]
) -> bool:
    """Whether the kernel takes these operands; nothing may be recorded for gradients, dropped out or paged."""
    if torch.compiler.is_compiling() or type(query) is not torch.Tensor or query.device.type != "cpu":
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    if any(options.get(name) is not None for name in ("cache", "position_bias", "s_aux", "softcap")):
        return False
    fits = query.dim() == key.dim() == value.dim() == 4 and query.dtype == key.dtype == value.dtype
    return (
        fits
        and not options.get("dropout")
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-1] >= key.shape[2]))
    )
