"""The expert layer itself: prepared experts, the functional form on plain weights, and the whole MoE block.

One call is: look the token count up in the table, sort the routed slots by expert, launch the up and the down
kernel. Outputs are fresh tensors each time, so that a caller may change them in place.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilecast.engine import runtime as runtime_module
from tilecast.engine.runtime import MAX_MISSES, Entry, Runtime
from tilecast.errors import DeviceError, InputError
from tilecast.kernels import sort_slots
from tilecast.kernels.routing import SCORINGS, route
from tilecast.kernels.spec import PLAIN, TORCH_DTYPES, GemmWeights, Kernel, numerics_class
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, check_int, check_name

logger = logging.getLogger(__name__)

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class PreparedExperts:
    """One layer's experts, with the weights stored as the table's configs want them.

    Call it with hidden [..., H], topk_ids (integers [..., k]) and topk_weights (any float dtype [..., k]); it
    returns a fresh tensor [..., H] in the weights' dtype, or in float32, not rounded, with
    `out_dtype=torch.float32` (a rank's partial sum). Ids outside 0 to E-1 are absent and count as zero.
    It keeps the table that was in use when it was made, since its weights are stored for that one.
    """

    __slots__ = ("_down", "_dtype", "_up", "layer", "runtime")

    def __init__(self, *, layer: ExpertLayer, runtime: Runtime, up: GemmWeights, down: GemmWeights) -> None:
        """Take packed weights; `prepare_experts` makes them."""
        self.layer = layer
        self.runtime = runtime
        self._up = up
        self._down = down
        self._dtype = TORCH_DTYPES[layer.dtype]

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
        rows, ids, scales = check_inputs(layer, hidden, topk_ids, topk_weights)
        if out_dtype is None:
            out_dtype = self._dtype
        elif out_dtype is not torch.float32 and out_dtype is not self._dtype:
            raise InputError(f"out_dtype is {out_dtype}, expected {self._dtype} (the weights' dtype) or torch.float32")
        if rows.shape[0] == 0:
            return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
        entry = self.runtime.lookup(layer, rows.shape[0])
        out = _run(layer, entry, self._up, self._down, rows, ids, scales, out_dtype)
        return out if hidden.dim() == 2 else out.view(hidden.shape)


def prepare_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
    policy: str | None = None,
    runtime: Runtime | None = None,
) -> PreparedExperts:
    """Store one layer's weights as its decisions want them and return the callable layer.

    w13 is [E, 2I, H] (gate rows before up rows; [E, I, H] if not gated), w2 [E, H, I], both contiguous and of one
    dtype (float32, bfloat16 or float16); bias13 [E, 2I or I] and bias2 [E, H], both or none. `global_experts` is
    what the router chooses among if these are one rank's share. Where the layout is another than the plain one
    the weights are copied, and the caller may drop the originals; the plain layout shares their memory.
    `policy` overrides that of the table in use; `runtime` gives another table than the one in use.
    Raises InputError for weights that do not fit, DeviceError if no kernel here can run the layer.
    """
    layer = layer_of(
        w13, w2, top_k=top_k, activation=activation, gated=gated, bias13=bias13, bias2=bias2,
        global_experts=global_experts,
    )  # fmt: skip
    chosen = runtime or runtime_module.current()
    if policy is not None:
        chosen = chosen.with_policy(policy)
    _check_device(w13, chosen)
    anchor = chosen.anchor(layer)
    bias = (bias13, bias2) if bias13 is not None and bias2 is not None else (None, None)
    up = _stored(layer.up, w13, bias[0], anchor.up_kernel, anchor.up)
    down = _stored(layer.down, w2, bias[1], anchor.down_kernel, anchor.down)
    return PreparedExperts(layer=layer, runtime=chosen, up=up, down=down)


def fused_experts(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
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

    Operands as in `prepare_experts` and `PreparedExperts`; top-k is topk_ids' last dimension. Under
    `reproducible` the bits equal those of prepared experts. Where the table's config wants packed weights, one
    of the same numerics class that reads plain ones runs instead: prepare the experts to get the tuned speed.
    Raises InputError for operands that do not fit, CoverageError with miss=error.
    """
    if topk_ids.dim() == 0:
        raise InputError(f"topk_ids is {_seen(topk_ids)}, expected integers [..., k]")
    options = (topk_ids.shape[-1], activation, gated, global_experts)
    form: _Form | None = None
    if bias13 is None and bias2 is None:
        form = _forms.get(w13)  # type: ignore[no-untyped-call]
    if form is None or form.options != options or not form.fits(w13, w2):
        layer = layer_of(
            w13, w2, top_k=options[0], activation=activation, gated=gated, bias13=bias13, bias2=bias2,
            global_experts=global_experts,
        )  # fmt: skip
        form = _Form(options, layer, *(_plain(gemm, w, b) for gemm, w, b in _pairs(layer, w13, w2, bias13, bias2)))
        if bias13 is None:
            # Not with a bias: kernels may keep a converted copy, which a change in place would not reach.
            _forms[w13] = form
    runtime = runtime_module.current()
    _check_device(w13, runtime)
    rows, ids, scales = check_inputs(form.layer, hidden, topk_ids, topk_weights)
    if rows.shape[0] == 0:
        return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    entry = _plain_entry(runtime, form.layer, rows.shape[0])
    return _run(form.layer, entry, form.up, form.down, rows, ids, scales, hidden.dtype).view(hidden.shape)


class MoeBlock(torch.nn.Module):
    """A whole MoE block: router, top-k and experts; hidden [..., H] to a fresh [..., H].

    The weights are neither parameters nor buffers: `state_dict` is empty and `.to()` changes nothing, since
    packed weights keep the dtype and device that they were loaded in. Forward only.
    """

    def __init__(
        self,
        router_weight: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        top_k: int,
        scoring: str = "softmax",
        renormalize: bool = True,
        activation: str = "silu",
        gated: bool = True,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
        policy: str | None = None,
    ) -> None:
        """Prepare the experts. router_weight is [E, H] of any float dtype; the rest as in `prepare_experts`.

        `scoring` is `softmax` or `sigmoid`; `renormalize` divides the top-k weights by their sum. Raises
        InputError.
        """
        super().__init__()
        self.experts = prepare_experts(
            w13, w2, top_k=top_k, activation=activation, gated=gated, bias13=bias13, bias2=bias2, policy=policy
        )
        layer = self.experts.layer
        check_name("scoring", scoring, SCORINGS)
        if router_weight.shape != (layer.experts, layer.hidden) or not router_weight.dtype.is_floating_point:
            raise InputError(
                f"router_weight is {_seen(router_weight)}, expected floats {(layer.experts, layer.hidden)}"
            )
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
            raise InputError(f"hidden is {_seen(hidden)}, expected [..., {layer.hidden}]")
        rows = hidden.reshape(-1, layer.hidden)
        ids, weights = route(rows, self.router_weight, layer.top_k, scoring=self.scoring, renormalize=self.renormalize)
        return self.experts(rows, ids, weights).view(hidden.shape)


# Operands ---------------------------------------------------------------------------------------------------


def layer_of(
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    global_experts: int | None = None,
) -> ExpertLayer:
    """Return the layer that plain weights make, as `prepare_experts` takes them. Raises InputError."""
    if w13.dim() != 3 or w2.dim() != 3:
        raise InputError(
            f"w13 is {_seen(w13)} and w2 {_seen(w2)}, expected [E, {'2I' if gated else 'I'}, H] and [E, H, I]"
        )
    if w13.dtype not in DTYPE_NAMES or w2.dtype != w13.dtype:
        raise InputError(
            f"w13 is {w13.dtype} and w2 {w2.dtype}, expected one of {', '.join(DTYPE_NAMES.values())} for both"
        )
    experts, hidden, intermediate = w2.shape
    wanted = (experts, intermediate * (2 if gated else 1), hidden)
    if w13.shape != wanted:
        raise InputError(f"w13 is {_seen(w13)}, expected {wanted} to fit w2 {tuple(w2.shape)} with gated={gated}")
    if (bias13 is None) != (bias2 is None):
        raise InputError("one of bias13 and bias2 is given, expected both or none; pass zeros for the other")
    for name, bias, shape in (("bias13", bias13, wanted[:2]), ("bias2", bias2, (experts, hidden))):
        if bias is not None and (bias.shape != shape or not bias.dtype.is_floating_point):
            raise InputError(f"{name} is {_seen(bias)}, expected floats {shape}")
    for name, tensor in (("w13", w13), ("w2", w2), ("bias13", bias13), ("bias2", bias2)):
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(f"{name} {tuple(tensor.shape)} is not contiguous; pass {name}.contiguous()")
        if tensor is not None and tensor.device != w13.device:
            raise InputError(f"{name} is on {tensor.device}, expected {w13.device} like w13")
    check_int("top-k", top_k, 1)
    return ExpertLayer(
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        dtype=DTYPE_NAMES[w13.dtype],
        activation=activation,
        gated=gated,
        bias=bias13 is not None,
        global_experts=experts if global_experts is None else global_experts,
    )


def check_inputs(
    layer: ExpertLayer, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return contiguous hidden [T, H], ids [T, k] and float32 weights [T, k]. Raises InputError."""
    width, top_k = layer.hidden, layer.top_k
    if hidden.dtype is not TORCH_DTYPES[layer.dtype]:
        raise InputError(f"hidden is {hidden.dtype}, expected {TORCH_DTYPES[layer.dtype]} like the weights")
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        raise InputError(f"hidden is {_seen(hidden)}, expected [..., {width}] to fit the weights")
    rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, width)
    wanted = (rows.shape[0], top_k)
    ids = topk_ids if topk_ids.dim() == 2 else topk_ids.reshape(-1, topk_ids.shape[-1] if topk_ids.dim() else 1)
    scales = topk_weights if topk_weights.dim() == 2 else topk_weights.reshape(-1, *topk_weights.shape[-1:])
    if ids.shape != wanted or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"topk_ids is {_seen(topk_ids)}, expected int32 or int64 {wanted} to fit hidden")
    if scales.shape != wanted or not scales.dtype.is_floating_point:
        raise InputError(f"topk_weights is {_seen(topk_weights)}, expected floats {wanted} to fit hidden")
    if not hidden.device == topk_ids.device == topk_weights.device:
        seen = f"hidden is on {hidden.device}, topk_ids on {topk_ids.device}, topk_weights on {topk_weights.device}"
        raise InputError(f"{seen}, expected one device")
    if hidden.requires_grad and torch.is_grad_enabled():
        raise InputError("hidden requires grad, but expert layers are forward only; run under torch.inference_mode()")
    if scales.requires_grad:
        scales = scales.detach()
    return rows.contiguous(), ids, scales.to(torch.float32).contiguous()


def _seen(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_device(weights: torch.Tensor, runtime: Runtime) -> None:
    kind = runtime.environment.device_kind
    if weights.device.type != kind:
        raise DeviceError(f"the weights are on {weights.device}, but the table in use is for {kind}; move them there")


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
    layout = sort_slots(ids, layer.experts)
    tokens, top_k = ids.shape
    intermediate = torch.empty((tokens * top_k, layer.intermediate), dtype=rows.dtype, device=rows.device)
    out = torch.empty((tokens, layer.hidden), dtype=out_dtype, device=rows.device)
    entry.up_kernel.up(entry.up, rows, up, layout, intermediate)
    entry.down_kernel.down(entry.down, intermediate, down, layout, scales, out)
    return out


def _plain(gemm: ExpertGemm, data: torch.Tensor, bias: torch.Tensor | None) -> GemmWeights:
    return GemmWeights(gemm=gemm, layout=PLAIN, data=data.detach(), bias=None if bias is None else bias.detach())


def _stored(
    gemm: ExpertGemm, data: torch.Tensor, bias: torch.Tensor | None, kernel: Kernel, config: TileConfig
) -> GemmWeights:
    plain = _plain(gemm, data, bias)
    layout = kernel.layout(gemm, config)
    return plain if layout == PLAIN else kernel.pack(plain, layout)


def _pairs(
    layer: ExpertLayer,
    w13: torch.Tensor,
    w2: torch.Tensor,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
) -> tuple[tuple[ExpertGemm, torch.Tensor, torch.Tensor | None], ...]:
    return (layer.up, w13, bias13), (layer.down, w2, bias2)


class _Form(NamedTuple):
    """What the functional form keeps per w13 tensor, so that validation happens once."""

    options: tuple[int, str, bool, int | None]
    layer: ExpertLayer
    up: GemmWeights
    down: GemmWeights

    def fits(self, w13: torch.Tensor, w2: torch.Tensor) -> bool:
        """Whether these are still the tensors that were validated: same memory, shape and dtype."""
        known13, known2 = self.up.data, self.down.data
        return bool(
            w13.data_ptr() == known13.data_ptr()
            and w2.data_ptr() == known2.data_ptr()
            and w13.shape == known13.shape
            and w2.shape == known2.shape
            and w13.dtype == known13.dtype
            and w2.dtype == known2.dtype
            and w13.is_contiguous()
            and w2.is_contiguous()
        )


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
    """Return a config close to `config` that reads plain weights, of the same numerics class if there is one."""
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
            if registry.invalid(gemm, candidate, here) is not None or other.layout(gemm, candidate) != PLAIN:
                continue
            if numerics_class(other, gemm, candidate, here) == wanted:
                return other, candidate
            fallback = fallback or (other, candidate)
    if fallback is None:
        raise DeviceError(f"no kernel here reads plain weights of {gemm.layer.label}; use prepare_experts")
    logger.warning("plain weights of %s run in another numerics class than prepared ones", gemm.layer.label)
    return fallback
