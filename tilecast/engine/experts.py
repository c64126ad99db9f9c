"""The expert layer itself: prepared experts, and the whole MoE block.

One call is: look the token count up in the table, sort the routed slots by expert, launch the up and the down
kernel. Outputs are fresh tensors each time, so that a caller may change them in place. Under `torch.compile` a call
is one operator of the graph (`op.py`); everything else is as without it.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from tilecast.engine import op, recording
from tilecast.engine import runtime as runtime_module
from tilecast.engine.at_once import AtOnce
from tilecast.engine.operands import check_device, check_inputs, layer_of, place_of, seen
from tilecast.engine.table_index import Entry
from tilecast.engine.table_runtime import Runtime
from tilecast.errors import InputError
from tilecast.kernels import route, sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.routing import SCORINGS
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel
from tilecast.kernels.stacks import Weights, detached
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

    __slots__ = ("__weakref__", "_at_once", "_down", "_dtype", "_handle", "_plain", "_up", "layer", "runtime")

    def __init__(self, *, layer: ExpertLayer, runtime: Runtime, up: GemmWeights, down: GemmWeights) -> None:
        """Take packed weights; `prepare_experts` makes them."""
        self.layer = layer
        self.runtime = runtime
        self._up = up
        self._down = down
        self._dtype = TORCH_DTYPES[layer.dtype]
        self._at_once = AtOnce(layer, (up, down))
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
        if not torch.compiler.is_dynamo_compiling():
            done = self._at_once.run(hidden, topk_ids, topk_weights, out_dtype or self._dtype)
            if done is not None:
                return done
        if torch.compiler.is_compiling():
            return self._compiled(hidden, topk_ids, topk_weights, out_dtype or self._dtype)
        layer = self.layer
        rows, ids, scales = check_inputs(layer, hidden, topk_ids, topk_weights)
        if out_dtype is None:
            out_dtype = self._dtype
        elif out_dtype is not torch.float32 and out_dtype is not self._dtype:
            raise InputError(f"out_dtype is {out_dtype}, expected {self._dtype} (the layer's dtype) or torch.float32")
        if rows.shape[0] == 0:
            return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
        entry = self.runtime.lookup(layer, rows.shape[0])
        out = launch(layer, entry, self._up, self._down, rows, ids, scales, out_dtype)
        if rows.is_cpu:
            missed = self.runtime.missed(layer, rows.shape[0])
            self._at_once.learn(hidden, topk_ids, topk_weights, out_dtype, entry, missed)
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
    for weights in (w13, w2):
        if isinstance(weights, QuantizedStack):
            weights.check_values()
    chosen = runtime or runtime_module.current(w13.device.type)
    if policy is not None:
        chosen = chosen.with_policy(policy)
    check_device(w13, chosen)
    anchor = chosen.anchor(layer)
    bias = (bias13, bias2) if bias13 is not None and bias2 is not None else (None, None)
    up = stored_weights(layer.up, w13, bias[0], anchor.up_kernel, anchor.up)
    down = stored_weights(layer.down, w2, bias[1], anchor.down_kernel, anchor.down)
    return PreparedExperts(layer=layer, runtime=chosen, up=up, down=down)


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


def launch(
    layer: ExpertLayer,
    entry: Entry,
    up: GemmWeights,
    down: GemmWeights,
    rows: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launch an entry's kernels on checked rows [T, H], ids and scales [T, k]; the result is fresh: [T, H]."""
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


def as_given(gemm: ExpertGemm, data: Weights, bias: torch.Tensor | None) -> GemmWeights:
    """Return weights in the plain layout, on the memory that they came in."""
    return GemmWeights(gemm=gemm, layout=PLAIN, data=detached(data), bias=None if bias is None else bias.detach())


def stored_weights(
    gemm: ExpertGemm, data: Weights, bias: torch.Tensor | None, kernel: Kernel, config: TileConfig
) -> GemmWeights:
    """Return plain weights stored as `config` of `kernel` reads them."""
    plain = as_given(gemm, data, bias)
    layout = kernel.layout(gemm, config)
    return plain if layout == PLAIN else kernel.pack(plain, layout)
