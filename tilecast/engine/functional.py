"""The functional form of the expert layer, on plain weights that nobody prepared.

Weights are checked once per w13 tensor, not at every call. Where the table's config wants packed weights, one of the
same numerics class that reads plain ones runs instead.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilecast.engine import op
from tilecast.engine import runtime as runtime_module
from tilecast.engine.experts import as_given, launch
from tilecast.engine.operands import check_device, check_inputs, layer_of, seen
from tilecast.engine.table_index import Entry
from tilecast.engine.table_runtime import MAX_MISSES, Runtime
from tilecast.errors import DeviceError, InputError
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel, numerics_class
from tilecast.kernels.stacks import Weights, tensors_of
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

logger = logging.getLogger(__name__)


def fused_experts(
    hidden: torch.Tensor,
    w13: Weights,
    w2: Weights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
) -> torch.Tensor:
    """Run one expert layer on plain weights and return a fresh tensor of hidden's shape and dtype.

    Operands as in `prepare_experts` and `PreparedExperts`; top-k is topk_ids' last dimension, and hidden's dtype that
    of a layer whose weights are quantised. Under
    `reproducible` the bits equal those of prepared experts. Where the table's config wants packed weights, one
    of the same numerics class that reads plain ones runs instead: prepare the experts to get the tuned speed.
    Raises InputError for operands that do not fit, CoverageError with miss=error.
    """
    if torch.compiler.is_compiling():
        if isinstance(w13, QuantizedStack) and isinstance(w2, QuantizedStack):
            return op.call_quantized(
                hidden, topk_ids, topk_weights, w13, w2, bias13, bias2, activation=activation, gated=gated,
                global_experts=global_experts,
            )  # fmt: skip
        assert isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor), "one weight format for both"
        return op.call(
            hidden, topk_ids, topk_weights, w13, w2, bias13, bias2, handle=op.IN_USE, activation=activation,
            gated=gated, global_experts=global_experts, out_dtype=hidden.dtype,
        )  # fmt: skip
    return run_plain(
        hidden, w13, w2, topk_ids, topk_weights, activation=activation, gated=gated, bias13=bias13, bias2=bias2,
        global_experts=global_experts,
    )  # fmt: skip


def run_plain(
    hidden: torch.Tensor,
    w13: Weights,
    w2: Weights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str,
    gated: bool,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    global_experts: int | None,
    runtime: Runtime | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Do what `fused_experts` says, outside of any compilation, by `runtime`'s table (None: that in use)."""
    if topk_ids.dim() == 0:
        raise InputError(f"topk_ids is {seen(topk_ids)}, expected integers [..., k]")
    dtype = hidden.dtype if isinstance(w13, QuantizedStack) else None
    options = (topk_ids.shape[-1], activation, gated, global_experts, dtype)
    form: _Form | None = None
    if bias13 is None and bias2 is None:
        form = _forms.get(tensors_of(w13)[0])
    if form is None or form.options != options or not form.fits(w13, w2):
        layer = layer_of(
            w13, w2, top_k=options[0], activation=activation, gated=gated, bias13=bias13, bias2=bias2,
            global_experts=global_experts, dtype=dtype,
        )  # fmt: skip
        form = _Form(options, layer, *(as_given(gemm, w, b) for gemm, w, b in _pairs(layer, w13, w2, bias13, bias2)))
        if bias13 is None:
            # Not with a bias: kernels may keep a converted copy, which a change in place would not reach.
            _forms[tensors_of(w13)[0]] = form
    chosen = runtime or runtime_module.current(w13.device.type)
    check_device(w13, chosen)
    rows, ids, scales = check_inputs(form.layer, hidden, topk_ids, topk_weights)
    out_dtype = out_dtype or hidden.dtype
    if rows.shape[0] == 0:
        return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
    entry = plain_entry(chosen, form.layer, rows.shape[0])
    return launch(form.layer, entry, form.up, form.down, rows, ids, scales, out_dtype).view(hidden.shape)


# Weights that were checked before -------------------------------------------------------------------------


def _pairs(
    layer: ExpertLayer,
    w13: Weights,
    w2: Weights,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
) -> tuple[tuple[ExpertGemm, Weights, torch.Tensor | None], ...]:
    return (layer.up, w13, bias13), (layer.down, w2, bias2)


class _Form(NamedTuple):
    """What the functional form keeps per w13 tensor (or codes), so that validation happens once."""

    options: tuple[int, str, bool, int | None, torch.dtype | None]
    layer: ExpertLayer
    up: GemmWeights
    down: GemmWeights

    def fits(self, w13: Weights, w2: Weights) -> bool:
        """Whether these are still the weights that were validated: same memory, shapes, dtypes and format."""
        if isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor):
            return _same(w13, self.up.data) and _same(w2, self.down.data)
        return _same_stack(w13, self.up.data) and _same_stack(w2, self.down.data)


def _same(tensor: torch.Tensor, known: object) -> bool:
    return bool(
        isinstance(known, torch.Tensor)
        and tensor.data_ptr() == known.data_ptr()
        and tensor.shape == known.shape
        and tensor.dtype == known.dtype
        and tensor.is_contiguous()
    )


def _same_stack(stack: Weights, known: object) -> bool:
    if not (isinstance(stack, QuantizedStack) and isinstance(known, QuantizedStack)) or stack.format != known.format:
        return False
    return all(_same(tensor, other) for tensor, other in zip(stack.tensors, known.tensors, strict=True))


_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Forms by w13; they hold detached views, so an entry goes when its w13 does, and w2's memory with it."""


def plain_entry(runtime: Runtime, layer: ExpertLayer, tokens: int) -> Entry:
    """Return the entry for (layer, tokens) with configs that read plain weights."""
    entry = runtime.lookup(layer, tokens)
    known = runtime.plain_entries.get(id(entry))
    if known is None:
        up_kernel, up = _plain_config(runtime, layer.up, entry.up_kernel, entry.up, tokens)
        down_kernel, down = _plain_config(runtime, layer.down, entry.down_kernel, entry.down, tokens)
        plain = Entry(
            up_kernel=up_kernel, up=up, down_kernel=down_kernel, down=down, bucket=entry.bucket, reason=entry.reason
        )
        if len(runtime.plain_entries) >= MAX_MISSES:
            runtime.plain_entries.clear()
        # Kept with the entry itself, so that its id cannot become another one's.
        known = runtime.plain_entries[id(entry)] = (entry, plain)
    return known[1]


def _plain_config(
    runtime: Runtime, gemm: ExpertGemm, kernel: Kernel, config: TileConfig, tokens: int
) -> tuple[Kernel, TileConfig]:
    """Return a config close to `config` that reads plain weights, of the same numerics class if there is one.

    It takes the intermediate in the same order, so that up and down still go together.
    """
    if kernel.layout(gemm, config) == PLAIN:
        return kernel, config
    here, registry = runtime.environment, runtime.registry
    wanted = numerics_class(kernel, gemm, config, here)
    tried: list[TileConfig] = []
    if any(name == "layout" for name, _ in config.params):
        plain = config.with_params(layout=PLAIN)
        tried = [kernel.default(gemm, tokens, here, like=plain), plain]
    fallback: tuple[Kernel, TileConfig] | None = None
    for other in (kernel, *(k for k in registry if k is not kernel)):
        for candidate in [*(tried if other is kernel else []), *other.space(gemm, tokens, here)]:
            if registry.invalid(gemm, candidate, here) is not None:
                continue
            # A default may be another kernel's than the one that gave it.
            own = registry[candidate.kernel]
            if own.layout(gemm, candidate) != PLAIN or own.order(gemm, candidate) != kernel.order(gemm, config):
                continue
            if numerics_class(own, gemm, candidate, here) == wanted:
                return own, candidate
            fallback = fallback or (own, candidate)
    if fallback is None:
        raise DeviceError(f"no kernel here reads plain weights of {gemm.layer.label}; use prepare_experts")
    logger.warning("plain weights of %s run in another numerics class than prepared ones", gemm.layer.label)
    return fallback
