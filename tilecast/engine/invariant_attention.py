"""Batch-invariant attention under the name `tilecast` in transformers' table of attention functions.

Models that are loaded with `attn_implementation="tilecast"` use it, inside of `invariant()` and outside. transformers
is imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from tilecast.engine.adapted import adapted_of
from tilecast.engine.invariant import Invariant, invariant
from tilecast.engine.invariant_forms import ranges_for
from tilecast.engine.invariant_recurrent import offer_recurrent, without_form
from tilecast.errors import InputError
from tilecast.kernels.attend import attend
from tilecast.kernels.ranges import causal_ranges, full_ranges

NAME = "tilecast"


def register_attention() -> None:
    """Make `attn_implementation="tilecast"` known to transformers. Safe to call again."""
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    masking: Any = importlib.import_module("transformers.masking_utils")
    modeling.ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    masking.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, masking.sdpa_mask)


def use_attention(model: Any) -> None:
    """Have a transformers model use this attention in all its layers, and inside of `invariant()` linear attention and
    state spaces token by token. Raises what transformers raises."""
    register_attention()
    model.set_attn_implementation(NAME)
    offer_recurrent(model)


@contextlib.contextmanager
def row_wise_attention(model: Any) -> Iterator[None]:
    """Have a model that writes its attention out use this one meanwhile; `invariant()` takes torch's fused one itself.

    A model that cannot be switched is left as it is: what it runs is then among the uncovered operations.
    """
    own = getattr(model.config, "_attn_implementation", None)
    if own == "eager":
        with contextlib.suppress(ValueError):
            use_attention(model)
    try:
        yield
    finally:
        if own == "eager":
            model.set_attn_implementation(own)


@contextlib.contextmanager
def row_by_row(model: Any) -> Iterator[Invariant]:
    """Run a transformers model inside of `invariant()`, with what it writes out itself, and its experts, in view."""
    offer_recurrent(model)
    with row_wise_attention(model), invariant() as context:
        for name in without_form(model):
            context.uncovered[f"the state that {name} keeps"] += 1
        for state in map(adapted_of, model.modules()):
            runtime = None if state is None else state.runtime
            if runtime is not None and runtime.policy != "reproducible":
                # No operation of torch tells of it.
                context.uncovered[f"experts under the policy {runtime.policy}"] += 1
        yield context


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention's result [B, Tq, Hq, Dv] as transformers wants it; operands as in its other functions.

    Raises InputError for what it lacks: dropout, position biases and paged caches.
    """
    if dropout:
        raise InputError(f"attention by tilecast has no dropout, asked for {dropout}; call model.eval()")
    for name in ("position_bias", "cache"):
        if others.get(name) is not None:
            raise InputError(f"attention by tilecast takes no {name}; use attn_implementation='sdpa'")
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        ranges = ranges_for(
            attention_mask if attention_mask.shape[-1] == keys else attention_mask[..., :keys],
            query.shape[0],
            queries,
            keys,
        )
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        ranges = causal_ranges(query, key) if causal and queries > 1 else full_ranges(query, key)
    out = attend(
        query, key, value, ranges, scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return out.transpose(1, 2), None
