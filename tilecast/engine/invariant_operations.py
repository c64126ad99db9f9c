"""Torch's operations, sorted by what is known of their bits.

`MOVES` move or compare values; `EXACT` round each result once, as IEEE 754 says, or take integers; `MEASURED` are
elementwise ones of which a test holds that neither the number of elements nor strides change a bit. The others that
models use have forms of their own (`invariant_forms.py`). An operation in none of these is not covered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tilecast.engine.invariant_forms import REPLACEMENTS

PASSES, COMPOSITE, REPLACED, UNKNOWN = "passes", "composite", "replaced", "unknown"

MOVES = frozenset(
    """alias view _unsafe_view _reshape_alias reshape expand expand_as permute transpose t slice select unsqueeze
    squeeze split split_with_sizes chunk unbind narrow detach clone contiguous copy _to_copy cat stack index
    _unsafe_index index_select index_put _index_put_impl index_copy index_fill gather take take_along_dim repeat
    repeat_interleave roll flip tril triu where masked_fill masked_scatter masked_select nonzero embedding empty
    empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones full
    full_like new_full fill zero arange scalar_tensor lift_fresh lift_fresh_copy lift as_strided constant_pad_nd
    unfold _local_scalar_dense item equal set resize diagonal diag_embed eye tril_indices triu_indices slice_scatter
    select_scatter is_pinned record_stream _pin_memory sym_size sym_stride sym_numel movedim swapaxes view_as_real
    view_as_complex complex real imag one_hot bucketize searchsorted scatter is_nonzero
    _has_compatible_shallow_copy_type _assert_async _assert_tensor_metadata broadcast_tensors view_as resolve_conj
    resolve_neg _conj_physical unsafe_split unsafe_chunk meshgrid hstack vstack""".split()  # noqa: SIM905
)
EXACT = frozenset(
    """add sub rsub mul div neg abs reciprocal maximum minimum clamp clamp_min clamp_max relu eq ne lt le gt ge
    logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ any all amax amin max min
    argmax argmin topk sort argsort isin isnan isinf isfinite isneginf floor ceil round trunc sign sgn remainder fmod
    floor_divide bincount histc unique square unique_dim _unique2 unique_consecutive unique_dim_consecutive
    heaviside leaky_relu threshold hardtanh relu6 bitwise_count nan_to_num fmin fmax""".split()  # noqa: SIM905
)
MEASURED = frozenset(("exp", "expm1", "log", "log1p", "tanh", "erf", "sin", "cos", "pow", "cumsum"))
POWERS = (-2, -1, 0.5, 1, 2, 3)
"""Exponents for which torch multiplies or takes roots; others give other bits where an element lies elsewhere."""


COLLECTIVES = ("c10d", "_c10d_functional")
COLLECTIVE_MOVES = frozenset(
    """all_gather_into_tensor allgather _allgather_base broadcast gather scatter all_to_all_single alltoall
    alltoall_base wait_tensor _wrap_tensor_autograd barrier send recv""".split()  # noqa: SIM905
)
SUMS_OVER_RANKS = frozenset(
    ("all_reduce", "allreduce", "reduce_scatter_tensor", "reduce_scatter", "_reduce_scatter_base")
)
"""Collectives that add, in an order of their own; between two ranks there is but one."""


def name_of(func: Any) -> str:
    """Return the name that `uncovered` has an overload under: `aten::conv1d`."""
    return str(func.name()).split(".")[0]


def kind_of(func: Any) -> str:
    """Return what is to be done with an overload."""
    space, _, name = name_of(func).partition("::")
    if space in ("tilecast", "prim", "prims", "profiler"):
        return PASSES
    if space in COLLECTIVES and _base(name) in COLLECTIVE_MOVES:
        return PASSES
    if space != "aten":
        return UNKNOWN
    if func.overloadpacket in REPLACEMENTS:
        return REPLACED
    base = _base(name)
    if base in LOOKED_AT or "reduce" in func._overloadname:
        return UNKNOWN
    if base in MOVES or base in EXACT or func.is_view:
        return PASSES
    decomposes = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return COMPOSITE if decomposes and base not in MEASURED else UNKNOWN


def _base(name: str) -> str:
    return name if name.startswith("__") else name.rstrip("_")


def matters(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that has no invariant form may depend on the batch for these operands."""
    space, _, name = name_of(func).partition("::")
    name = _base(name)
    if space in COLLECTIVES and name in SUMS_OVER_RANKS:
        # One sum of two numbers has one result; the order of more depends on the message's size.
        return dist.get_world_size() > 2
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    floats = [t for t in tensors if t.dtype.is_floating_point or t.dtype.is_complex]
    if name in ("add", "sub", "rsub"):
        # Another alpha multiplies and adds in one step, fused or not by where the element lies.
        return bool(floats) and kwargs.get("alpha", 1) != 1
    if name in TWO_WAYS_IF_COMPLEX:
        return any(t.is_complex() for t in floats)
    if name in ("index_put", "_index_put_impl"):
        return bool(floats) and bool(kwargs.get("accumulate", len(args) > 3 and args[3]))
    if name == "topk":
        return any(t.device.type != "cpu" for t in tensors)
    if name == "pow" and (
        len(args) < 2
        or not isinstance(args[0], torch.Tensor)
        or isinstance(args[1], torch.Tensor)
        or args[1] not in POWERS
    ):
        return bool(floats)
    if name in MEASURED and tensors and "reduce" not in func._overloadname:
        return any(t.device.type != "cpu" or t.is_complex() for t in floats)
    # Sums of integers are exact in any order.
    return bool(floats) or not tensors or name in RANDOM


TWO_WAYS_IF_COMPLEX = frozenset(("mul", "div", "sgn"))
"""Operations that torch computes in one way in whole vectors of complex numbers, and in another in what is left."""

LOOKED_AT = frozenset(("add", "sub", "rsub", "div", "sgn", "index_put", "_index_put_impl", "topk"))
"""Operations that `matters` judges by their operands."""

RANDOM = frozenset(
    ("multinomial", "bernoulli", "normal", "uniform", "exponential", "random", "rand", "randn", "randint", "randperm")
)
