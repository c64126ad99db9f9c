"""The expert layer itself: prepared experts, the functional form on plain weights, and the whole MoE block.

One call is: look the token count up in the table, sort the routed slots by expert, launch the up and the down
kernel. Outputs are fresh tensors each time, so that a caller may change them in place. Under `torch.compile` a call
is one operator of the graph (`op.py`); everything else is as without it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilecast.engine import op, recording
from tilecast.engine import runtime as runtime_module
from tilecast.engine.operands import check_device, check_inputs, layer_of, place_of, seen
from tilecast.engine.runtime import MAX_MISSES, Runtime
from tilecast.engine.table_index import Entry
from tilecast.errors import DeviceError, InputError
from tilecast.kernels import route, sort_slots
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.routing import SCORINGS
from tilecast.kernels.spec import PLAIN, TORCH_DTYPES, GemmWeights, Kernel, numerics_class
from tilecast.kernels.stacks import Weights, detached, tensors_of
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, check_name

logger = logging.getLogger(__name__)


class PreparedExperts:
    """One layer's experts, with the weights stored as the table's configs want them.

    Call it with hidden [..., H], topk_ids (integers [..., k]) and topk_weights (any float dtype [..., k]); it
    returns a fresh tensor [..., H] in the layer's dtype, or in float32, not rounded, with
    `out_dtype=torch.float32` (a rank's partial sum). Ids outside 0 to E-1 are absent and count as zero.
    It keeps the table that was in use when it was made, since its weights are stored for that one. What was
    compiled with it (`torch.compile`) can run as long as it lives.
    """

    __slots__ = ("__weakref__", "_down", "_dtype", "_handle", "_plain", "_up", "layer", "runtime")

    def __init__(self, *, layer: ExpertLayer, runtime: Runtime, up: GemmWeights, down: GemmWeights) -> None:
        """Take packed weights; `prepare_experts` makes them."""
        self.layer = layer
        self.runtime = runtime
        self._up = up
        self._down = down
        self._dtype = TORCH_DTYPES[layer.dtype]
        # Compiled code finds packed and quantised weights by the handle of these experts; plain dense ones it gets as
        # tensors, so that layers which differ in nothing else share one compiled graph.
        self._plain = up.layout == down.layout == PLAIN and layer.weight_format == "dense"
        self._handle = op.handle_of(runtime if self._plain else self)
        if self._plain:
            op.remember(up.data, self)

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run the layer. Raises InputError for operands that do not fit it, CoverageError with miss=error."""
        layer = self.layer
        if torch.compiler.is_compiling():
            return self._compiled(hidden, topk_ids, topk_weights, out_dtype or self._dtype)
        rows, ids, scales = check_inputs(layer, hidden, topk_ids, topk_weights)
        if out_dtype is None:
            out_dtype = self._dtype
        elif out_dtype is not torch.float32 and out_dtype is not self._dtype:
            raise InputError(f"out_dtype is {out_dtype}, expected {self._dtype} (the layer's dtype) or torch.float32")
        if rows.shape[0] == 0:
            return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
        entry = self.runtime.lookup(layer, rows.shape[0])
        out = _run(layer, entry, self._up, self._down, rows, ids, scales, out_dtype)
        return out if hidden.dim() == 2 else out.view(hidden.shape)

    def unpacked(self) -> tuple[GemmWeights, GemmWeights]:
        """Return the weights of up and down in the plain layout, bit for bit as they were given."""
        anchor = self.runtime.anchor(self.layer)
        up = self._up if self._up.layout == PLAIN else anchor.up_kernel.unpack(self._up)
        return up, self._down if self._down.layout == PLAIN else anchor.down_kernel.unpack(self._down)

    def with_top_k(self, top_k: int) -> PreparedExperts | None:
        """Return the same experts for calls with another number of slots a token, sharing memory.

        None where the table wants that layer's weights stored otherwise. Raises InputError for a top-k that is
        impossible.
        """
        layer = replace(self.layer, top_k=top_k, global_experts=max(self.layer.global_experts, top_k))
        anchor = self.runtime.anchor(layer)
        stored = (anchor.up_kernel.layout(layer.up, anchor.up), anchor.down_kernel.layout(layer.down, anchor.down))
        if stored != (self._up.layout, self._down.layout):
            return None
        up, down = (replace(w, gemm=g, plans={}) for w, g in zip((self._up, self._down), layer.gemms, strict=True))
        return PreparedExperts(layer=layer, runtime=self.runtime, up=up, down=down)

    @property
    def packed(self) -> bool:
        """Whether the weights are stored in another way than they were given, and so on memory of their own."""
        return self._up.layout != PLAIN and self._down.layout != PLAIN

    def _compiled(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out_dtype: torch.dtype
    ) -> torch.Tensor:
        layer, up, down = self.layer, self._up, self._down
        plain = (up.data, down.data, up.bias, down.bias) if self._plain else (None, None, None, None)
        return op.call(
            hidden, topk_ids, topk_weights, *plain, handle=self._handle, activation=layer.activation,
            gated=layer.gated, global_experts=layer.global_experts, out_dtype=out_dtype,
        )  # fmt: skip


def prepare_experts(
    w13: Weights,
    w2: Weights,
    *,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
    dtype: torch.dtype | None = None,
    policy: str | None = None,
    runtime: Runtime | None = None,
) -> PreparedExperts:
    """Store one layer's weights as its decisions want them and return the callable layer.

    w13 is [E, 2I, H] (gate rows before up rows; [E, I, H] if not gated), w2 [E, H, I], both contiguous and of one
    dtype (float32, bfloat16 or float16), or both `QuantizedStack`s of one format, with `dtype` that of the hidden
    states; bias13 [E, 2I or I] and bias2 [E, H], both or none. `global_experts` is what the router chooses among if
    these are one rank's share. Where the layout is another than the plain one the weights are copied, and the caller
    may drop the originals; the plain layout shares their memory. `policy` overrides that of the table in use;
    `runtime` gives another table than the one in use.
    Raises InputError for weights that do not fit, DeviceError if no kernel here can run the layer.
    """
    layer = layer_of(
        w13, w2, top_k=top_k, activation=activation, gated=gated, bias13=bias13, bias2=bias2,
        global_experts=global_experts, dtype=dtype,
    )  # fmt: skip
    chosen = runtime or runtime_module.current(w13.device.type)
    if policy is not None:
        chosen = chosen.with_policy(policy)
    check_device(w13, chosen)
    anchor = chosen.anchor(layer)
    bias = (bias13, bias2) if bias13 is not None and bias2 is not None else (None, None)
    up = stored_weights(layer.up, w13, bias[0], anchor.up_kernel, anchor.up)
    down = stored_weights(layer.down, w2, bias[1], anchor.down_kernel, anchor.down)
    return PreparedExperts(layer=layer, runtime=chosen, up=up, down=down)


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
        form = _forms.get(tensors_of(w13)[0])  # type: ignore[no-untyped-call]
    if form is None or form.options != options or not form.fits(w13, w2):
        layer = layer_of(
            w13, w2, top_k=options[0], activation=activation, gated=gated, bias13=bias13, bias2=bias2,
            global_experts=global_experts, dtype=dtype,
        )  # fmt: skip
        form = _Form(options, layer, *(_plain(gemm, w, b) for gemm, w, b in _pairs(layer, w13, w2, bias13, bias2)))
        if bias13 is None:
            # Not with a bias: kernels may keep a converted copy, which a change in place would not reach.
            _forms[tensors_of(w13)[0]] = form
    chosen = runtime or runtime_module.current(w13.device.type)
    check_device(w13, chosen)
    rows, ids, scales = check_inputs(form.layer, hidden, topk_ids, topk_weights)
    out_dtype = out_dtype or hidden.dtype
    if rows.shape[0] == 0:
        return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
    entry = _plain_entry(chosen, form.layer, rows.shape[0])
    return _run(form.layer, entry, form.up, form.down, rows, ids, scales, out_dtype).view(hidden.shape)


class MoeBlock(torch.nn.Module):
    """A whole MoE block: router, top-k and experts; hidden [..., H] to a fresh [..., H].

    The weights are neither parameters nor buffers: `state_dict` is empty and `.to()` changes nothing, since
    packed weights keep the dtype and device that they were loaded in. Forward only.
    """

    def __init__(
        self,
        router_weight: torch.Tensor,
        w13: Weights,
        w2: Weights,
        *,
        top_k: int,
        scoring: str = "softmax",
        renormalize: bool = True,
        activation: str = "silu",
        gated: bool = True,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        policy: str | None = None,
    ) -> None:
        """Prepare the experts. router_weight is [E, H] of any float dtype; the rest as in `prepare_experts`.

        `scoring` is `softmax` or `sigmoid`; `renormalize` divides the top-k weights by their sum. Raises
        InputError.
        """
        super().__init__()
        self.experts = prepare_experts(
            w13, w2, top_k=top_k, activation=activation, gated=gated, bias13=bias13, bias2=bias2, dtype=dtype,
            policy=policy,
        )  # fmt: skip
        layer = self.experts.layer
        check_name("scoring", scoring, SCORINGS)
        if router_weight.shape != (layer.experts, layer.hidden) or not router_weight.dtype.is_floating_point:
            raise InputError(f"router_weight is {seen(router_weight)}, expected floats {(layer.experts, layer.hidden)}")
        self.scoring = scoring
        self.renormalize = renormalize
        # In a tuple, so that neither a Parameter is registered nor `.to()` rounds it.
        self._router = (router_weight.detach(),)

    @property
    def router_weight(self) -> torch.Tensor:
        """The router's weight [E, H]."""
        return self._router[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Route and run: hidden [..., H] to [..., H]. Raises InputError for another shape or dtype."""
        layer = self.experts.layer
        if hidden.dim() == 0 or hidden.shape[-1] != layer.hidden:
            raise InputError(f"hidden is {seen(hidden)}, expected [..., {layer.hidden}]")
        rows = hidden.reshape(-1, layer.hidden)
        chosen = op.route if torch.compiler.is_compiling() else route
        ids, weights = chosen(rows, self.router_weight, layer.top_k, scoring=self.scoring, renormalize=self.renormalize)
        return self.experts(rows, ids, weights).view(hidden.shape)


# Launching --------------------------------------------------------------------------------------------------


def _run(
    layer: ExpertLayer,
    entry: Entry,
    up: GemmWeights,
    down: GemmWeights,
    rows: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    recorder = recording.active()
    if recorder is not None:
        recorder.count(layer, ids, hit=entry.hit, place=place_of(up.data))
    layout = sort_slots(ids, layer.experts)
    tokens, top_k = ids.shape
    intermediate = torch.empty((tokens * top_k, layer.intermediate), dtype=rows.dtype, device=rows.device)
    out = torch.empty((tokens, layer.hidden), dtype=out_dtype, device=rows.device)
    entry.up_kernel.up(entry.up, rows, up, layout, intermediate)
    entry.down_kernel.down(entry.down, intermediate, down, layout, scales, out)
    return out


def _plain(gemm: ExpertGemm, data: Weights, bias: torch.Tensor | None) -> GemmWeights:
    return GemmWeights(gemm=gemm, layout=PLAIN, data=detached(data), bias=None if bias is None else bias.detach())


def stored_weights(
    gemm: ExpertGemm, data: Weights, bias: torch.Tensor | None, kernel: Kernel, config: TileConfig
) -> GemmWeights:
    """Return plain weights stored as `config` of `kernel` reads them."""
    plain = _plain(gemm, data, bias)
    layout = kernel.layout(gemm, config)
    return plain if layout == PLAIN else kernel.pack(plain, layout)


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


def _plain_entry(runtime: Runtime, layer: ExpertLayer, tokens: int) -> Entry:
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
