"""Linear attention, state spaces and short convolutions token by token, for models that keep a state of the past.

transformers sums over chunks of a prompt where it has many tokens and over the state where it has one: other sums, so
other bits for other cuts, padding and batches. Inside of `invariant()` both calls run the same recurrence instead, in
float32, of which every step depends on one token and the state before it alone. Outside, and on other devices than
CPUs, transformers' own functions run as they are.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tilecast.engine.invariant import note, outside, taking_over

OFFERED = "_tilecast_offered"
"""The attribute of what stands in for a function of transformers, and of a mixer whose state is handed on."""
KEEPS = frozenset(("update_recurrent_state", "set_linear_cache"))
"""What layers call, one or the other, that keep a state of the past in transformers' cache."""
EPS = 1e-6
"""What transformers adds to the squares of queries and keys before it divides by their norm."""
NO_LIMITS = (0.0, float("inf"))

_threads = threading.local()


def offer_recurrent(model: torch.nn.Module) -> None:
    """Have a model's recurrent layers run token by token inside of `invariant()`. Safe to call again."""
    for module, names, found in _recurrent_layers(model):
        for name in names & FORMS.keys():
            if not hasattr(found[name], OFFERED):
                found[name] = _standing_in(found[name], FORMS[name])
        if names & FORMS.keys() and OFFERED not in module.__dict__:
            module.__dict__[OFFERED] = module.register_forward_pre_hook(_tell_layer, with_kwargs=True)


def without_form(model: torch.nn.Module) -> set[str]:
    """Return the classes of a model's layers that keep a state in a way that there is no form for."""
    return {type(module).__name__ for module, names, _ in _recurrent_layers(model) if not names & FORMS.keys()}


def _recurrent_layers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, set[str], dict[str, Any]]]:
    """Yield each such layer with the names that its forward uses and the namespace that it finds them in."""
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is not None and KEEPS.intersection(code.co_names):
            yield module, set(code.co_names), forward.__globals__


def _standing_in(theirs: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not taking_over():
            return theirs(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            note(theirs.__name__)
            return theirs(*args, **kwargs)
        known = {name: kwargs[name] for name in kwargs if name in signature.parameters}
        bound = signature.bind(*args, **known)
        bound.apply_defaults()
        with outside():  # what is done there is exact, or a sum or exp of a kind that invariant() passes
            return form(**bound.arguments)

    setattr(function, OFFERED, theirs)
    return function


def _tell_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note what a layer does not give its functions: the state to its scan, limits of step sizes to its single step."""
    cache = kwargs.get("cache_params", args[1] if len(args) > 1 else None)
    _threads.state = cache.get_recurrent_state(module.layer_idx) if cache is not None and taking_over() else None
    _threads.limits = getattr(module, "time_step_limit", None)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()


# The gated delta rule --------------------------------------------------------------------------------------------


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / ((rows * rows).sum(-1, keepdim=True) + EPS).sqrt()


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (result [B, T, Hv, V], state [B, Hv, K, V] or None): query, key [B, T, Hk, K], g and beta [B, T, Hv]."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (_float32(x.repeat_interleave(repeats, dim=2)) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    query = query * query.shape[-1] ** -0.5
    values, beta, decay = _float32(value), _float32(beta), _float32(g).exp()
    batch, tokens, heads, width = values.shape
    # Transposed, so that what is summed over lies together.
    state = values.new_zeros(batch, heads, width, key.shape[-1])
    if initial_state is not None:
        state = _float32(initial_state.transpose(-1, -2))
    out = torch.empty_like(values)
    for token in range(tokens):
        state = state * decay[:, token, :, None, None]
        now = key[:, token, :, None]
        delta = (values[:, token] - (state * now).sum(-1)) * beta[:, token, :, None]
        state = state + delta[..., None] * now
        out[:, token] = (state * query[:, token, :, None]).sum(-1)
    return out.to(value.dtype), state.transpose(-1, -2).contiguous() if output_final_state else None


# State spaces -------------------------------------------------------------------------------------------------------


def _step_sizes(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """Return float32 step sizes: theirs are rounded to the model's dtype on the way."""
    sizes = _float32(dt) if bias is None else _float32(dt) + bias.float()
    return torch.where(sizes > 20, sizes, sizes.clamp(max=20).exp().log1p()) if softplus else sizes


def _gated(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    if gate is None:
        return out
    gate = _float32(gate)
    return out * (gate / ((-gate).exp() + 1))


def _recurrence(
    rows: torch.Tensor, sizes: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result, the state after it): S ← exp(size · a) · S + size · b · row, result c · S.

    rows, sizes: [B, T, …]; b, c: [B, T, … or 1, N]; a: […, N]; state: [B, …, N]; all float32.
    """
    out = torch.empty_like(rows)
    for token in range(rows.shape[1]):
        size = sizes[:, token, ..., None]
        state = (size * a).exp() * state + size * b[:, token] * rows[:, token, ..., None]
        out[:, token] = (state * c[:, token]).sum(-1)
    return out, state


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Any:
    """Return the result [B, I, T], and the state [B, I, N] if asked for; dt and z as hidden_states, B and C [B, N, T].

    Names, here and below, are transformers' own. A prompt that goes on begins with the state that the layer's cache
    has: theirs begins with an empty one.
    """
    known, _threads.state = getattr(_threads, "state", None), None
    rows, b, c = (_float32(x.transpose(1, 2)) for x in (hidden_states, B, C))
    sizes = _step_sizes(dt.transpose(1, 2), delta_bias, delta_softplus)
    state = rows.new_zeros(rows.shape[0], *A.shape) if known is None else known.float()
    out, state = _recurrence(rows, sizes, A.float(), b[:, :, None], c[:, :, None], state)
    out = out if D is None else out + rows * D.float()
    out = _gated(out, None if z is None else z.transpose(1, 2)).to(hidden_states.dtype).transpose(1, 2)
    return (out, state) if return_last_state else out


def _selective_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return the result [B, I] of one token, its state [B, I, N] changed in place: hidden_states, dt, z [B, I]."""
    _threads.state = state
    one = [None if x is None else x[..., None] for x in (hidden_states, dt, B, C, z)]
    rows, sizes, b, c, gate = one
    assert rows is not None and sizes is not None and b is not None and c is not None
    out, after = _selective_scan(rows, sizes, A, b, c, D, gate, dt_bias, dt_softplus, return_last_state=True)
    state.copy_(after)
    return torch.as_tensor(out)[..., 0]


def _chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMITS,
    return_final_states: bool = False,
    z: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Return the result [B, T, H, P], and the state [B, H, P, N] if asked for: dt [B, T, H], B and C [B, T, G, N]."""
    batch, _, heads, width = hidden_states.shape
    rows = _float32(hidden_states)
    b, c = (_float32(x.repeat_interleave(heads // x.shape[2], dim=2))[:, :, :, None] for x in (B, C))
    sizes = _step_sizes(dt, dt_bias, dt_softplus).clamp(min=dt_limit[0], max=dt_limit[1])
    state = rows.new_zeros(batch, heads, width, B.shape[-1]) if initial_states is None else initial_states.float()
    sizes = sizes[..., None].expand(rows.shape)
    out, state = _recurrence(rows, sizes, A.float()[:, None, None], b, c, state)
    out = _gated(out if D is None else out + rows * D.float()[:, None], z)
    return (out, state) if return_final_states else out


def _chunk_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return the result [B, H, P] of one token, its state changed in place; dt, A, D and dt_bias come spread over P."""
    limits = getattr(_threads, "limits", None) or NO_LIMITS
    out, after = _chunk_scan(
        hidden_states[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], None if D is None else D[:, 0],
        None if dt_bias is None else dt_bias[:, 0], state, dt_softplus, limits, return_final_states=True,
        z=None if z is None else z[:, None],
    )  # fmt: skip
    state.copy_(after)
    return torch.as_tensor(out)[:, 0]


FORMS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _selective_update,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _chunk_update,
}
"""Forms of transformers' functions, by the names that its layers call them by."""
