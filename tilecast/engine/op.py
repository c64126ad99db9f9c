"""The layer as operators that `torch.compile` puts into its graph whole, without looking into them.

Inside, at run time, an operator is the ordinary call: the table is looked up with the real token count, kernels
launch on the current stream. Dense weights in the plain layout are tensors of the graph. Packed ones are no tensors
that a graph could hold: it holds a number by which the experts are found while they live; so it is with prepared
quantised ones. The functional form gives quantised weights as the tensors that they consist of.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilecast import kernels
from tilecast.errors import InputError, UsageError
from tilecast.kernels.formats import QuantizedStack

if TYPE_CHECKING:
    from tilecast.engine.experts import PreparedExperts
    from tilecast.engine.placement import PlacedExperts
    from tilecast.engine.split_experts import SplitExperts
    from tilecast.engine.table_runtime import Runtime

    Owner: TypeAlias = PreparedExperts | SplitExperts | PlacedExperts | Runtime

IN_USE = 0
"""The handle of whatever table is in use when the operator runs."""

_handles: WeakKeyDictionary[Owner, int] = WeakKeyDictionary()
_owners: WeakValueDictionary[int, Owner] = WeakValueDictionary()
_numbers = itertools.count(IN_USE + 1)
_by_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def handle_of(owner: Owner) -> int:
    """Return the number by which compiled code finds `owner`; never given to anything else, also after its end."""
    handle = _handles.get(owner)
    if handle is None:
        handle = _handles[owner] = next(_numbers)
        _owners[handle] = owner
    return handle


def remember(w13: torch.Tensor, experts: PreparedExperts) -> None:
    """Let compiled code find experts, with what their kernels keep, by the very tensor that they hold as w13."""
    # Weakly, as the experts hold the tensor.
    _by_weight[w13] = ref(experts)


def call(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor | None,
    w2: torch.Tensor | None,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    *,
    handle: int,
    activation: str,
    gated: bool,
    global_experts: int | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Call the operator from code that is being compiled. Raises InputError if hidden requires grad."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise InputError("hidden requires grad, but expert layers are forward only; run under torch.inference_mode()")
    tensors = [_detached(tensor) for tensor in (topk_weights, w13, w2, bias13, bias2)]
    out: torch.Tensor = experts(hidden, topk_ids, *tensors, handle, activation, gated, global_experts, out_dtype)
    return out


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    # A tensor that needs no detaching goes in as it is, so that it is known again inside.
    return tensor if tensor is None or not tensor.requires_grad else tensor.detach()


@torch.library.custom_op("tilecast::experts", mutates_args=())
def experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor | None,
    w2: torch.Tensor | None,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    handle: int,
    activation: str,
    gated: bool,
    global_experts: int | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Run one expert layer: hidden [..., H], topk_ids and topk_weights [..., k] to a fresh [..., H] of `out_dtype`.

    With w13 and w2, plain weights, `handle` names the runtime; without them, prepared experts whose weights are
    packed. Raises UsageError if what the handle names lives no more, and what the layer itself raises.
    """
    # Imported here: the layer builds on this module.
    from tilecast.engine.functional import run_plain
    from tilecast.engine.table_runtime import Runtime

    owner = None if handle == IN_USE else _owners.get(handle)
    if w13 is not None and w2 is not None:
        known: ReferenceType[PreparedExperts] | None = _by_weight.get(w13)
        prepared = None if known is None or handle == IN_USE else known()
        if prepared is None:
            runtime = owner if isinstance(owner, Runtime) else None
            return run_plain(
                hidden, w13, w2, topk_ids, topk_weights, activation=activation, gated=gated, bias13=bias13,
                bias2=bias2, global_experts=global_experts, runtime=runtime, out_dtype=out_dtype,
            )  # fmt: skip
        owner = prepared
    if owner is None or isinstance(owner, Runtime):
        raise UsageError(
            f"the prepared experts that this was compiled with (handle {handle}) were deleted; keep them as long "
            f"as the compiled code, or compile again"
        )
    return owner(hidden, topk_ids, topk_weights, out_dtype=out_dtype)


@experts.register_fake
def _(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor | None,
    w2: torch.Tensor | None,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    handle: int,
    activation: str,
    gated: bool,
    global_experts: int | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape, dtype=out_dtype)


def call_quantized(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: QuantizedStack,
    w2: QuantizedStack,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    *,
    activation: str,
    gated: bool,
    global_experts: int | None,
) -> torch.Tensor:
    """Call the operator on plain quantised weights, by the table in use. Raises InputError as `call` does."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise InputError("hidden requires grad, but expert layers are forward only; run under torch.inference_mode()")
    out: torch.Tensor = quantized_experts(
        hidden, topk_ids, _detached(topk_weights), [w13.codes, w2.codes], [w13.scales, w2.scales],
        [zeros for zeros in (w13.zeros, w2.zeros) if zeros is not None], f"{w13.format}+{w2.format}",
        _detached(bias13), _detached(bias2), activation, gated, global_experts,
    )  # fmt: skip
    return out


@torch.library.custom_op("tilecast::quantized_experts", mutates_args=())
def quantized_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor],
    formats: str,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    activation: str,
    gated: bool,
    global_experts: int | None,
) -> torch.Tensor:
    """Run one expert layer on plain quantised weights, those of w13 before those of w2 in each list."""
    # Imported here: the layer builds on this module.
    from tilecast.engine.functional import run_plain

    w13, w2 = (
        QuantizedStack(format=name, codes=codes[place], scales=scales[place], zeros=zeros[place] if zeros else None)
        for place, name in enumerate(formats.split("+"))
    )
    return run_plain(
        hidden, w13, w2, topk_ids, topk_weights, activation=activation, gated=gated, bias13=bias13, bias2=bias2,
        global_experts=global_experts,
    )  # fmt: skip


@quantized_experts.register_fake
def _(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor],
    formats: str,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    activation: str,
    gated: bool,
    global_experts: int | None,
) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("tilecast::route", mutates_args=())
def route(
    hidden: torch.Tensor, router_weight: torch.Tensor, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route as `tilecast.kernels.route` does: hidden [T, H] to ids int32 [T, k] and weights float32 [T, k]."""
    return kernels.route(hidden, router_weight, top_k, scoring=scoring, renormalize=renormalize)


@route.register_fake
def _(
    hidden: torch.Tensor, router_weight: torch.Tensor, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (hidden.shape[0], top_k)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=torch.float32)
