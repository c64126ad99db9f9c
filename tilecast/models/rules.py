"""What a family's entry is made of: which layers are sparse, how its router works, what its shared experts are.

Sizes never have a default; switches that older files leave out have the default of the family's own
configuration class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilecast.models.fields import Fields, Names
from tilecast.models.model import Router

Sparse = Callable[[Fields, int], list[bool]]
"""(fields, number of layers) -> for each layer, whether it has routed experts."""
RouterOf = Callable[[Fields], Router]
"""fields -> the facts about the router."""
SharedOf = Callable[[Fields], int]
"""fields -> total width of the shared experts, 0 for none."""

HIDDEN: Names = ("hidden_size",)
LAYERS: Names = ("num_hidden_layers",)
TOP_K: Names = ("num_experts_per_tok",)

MAX_LAYERS = 10_000
KINDS = "ME*-"
"""A letter for each kind of layer in older files of Nemotron-H; E has routed experts."""

SPARSEMIXER = "sparsemixer picks experts one after another"
SELECTION_BIAS = "a bias per expert shifts the selection, not the weights"
LOGIT_BIAS = "the router has a bias"
EXPERT_SCALES = "a scale per expert multiplies its weights"
SHARED_SINK = "shared experts are scored with the chosen ones, and share their sum"
CARRIED_STATE = "a network scores, with a state that layers hand on, and tokens may skip all experts"
SQRT_SOFTPLUS = "scores are roots of softplus, and the first layers choose by token id"
SCALES_INPUT = "the routing weight multiplies the experts' input instead of their output"


def every_layer(fields: Fields, layers: int) -> list[bool]:
    """Every decoder layer has routed experts."""
    return [True] * layers


def every_layer_from(name: str, default: int) -> Sparse:
    """Layers from the index in field `name` on have routed experts, those before are dense."""

    def sparse(fields: Fields, layers: int) -> list[bool]:
        first = fields.integer(name, default=default, low=0)
        # DeepSeek's own code also has a stride here; transformers ignores it, no published file uses one.
        if fields.integer("moe_layer_freq", default=1) != 1:
            raise fields.error(f"field moe_layer_freq is {fields.get('moe_layer_freq')}, only 1 is supported")
        return [layer >= first for layer in range(layers)]

    return sparse


def first_dense(count: int) -> Sparse:
    """The first `count` layers are dense, by the family's own code."""
    return lambda fields, layers: [layer >= count for layer in range(layers)]


def flagged_layers(name: str) -> Sparse:
    """Every layer has routed experts if the flag in field `name` is set, none otherwise."""
    return lambda fields, layers: [fields.flag(name, default=False)] * layers


def listed_layers(name: str, sparse: Sparse) -> Sparse:
    """Layers that the list in field `name` calls sparse; without a list as `sparse` says."""

    def listed(fields: Fields, layers: int) -> list[bool]:
        kinds = fields.get(name)
        if kinds is None:
            return sparse(fields, layers)
        if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sparse", "dense"}:
            raise fields.error(f"field {name} is {kinds!r:.60}, expected sparse or dense for each of {layers} layers")
        return [kind == "sparse" for kind in kinds]

    return listed


def first_k_dense(default: int) -> Sparse:
    """Layers that mlp_layer_types calls sparse; without that list all but the first first_k_dense_replace."""
    return listed_layers("mlp_layer_types", every_layer_from("first_k_dense_replace", default=default))


def nemotron_kinds(fields: Fields, layers: int) -> list[bool]:
    """The layers whose kind is `moe`, or the letter E."""
    kinds = fields.get("layers_block_type", "hybrid_override_pattern")
    return [kind in ("moe", "E") for kind in kinds]


def flint_layers(fields: Fields, layers: int) -> list[bool]:
    """As of Qwen; where mlp_only_layers is not there the first two layers are dense."""
    dense = [0, 1] if fields.get("mlp_only_layers") is None else []
    return [sparse and layer not in dense for layer, sparse in enumerate(qwen_layers(fields, layers))]


def qwen_layers(fields: Fields, layers: int) -> list[bool]:
    """Every decoder_sparse_step-th layer that mlp_only_layers does not list."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = set(fields.indices("mlp_only_layers") or [])
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]


def jamba_layers(fields: Fields, layers: int) -> list[bool]:
    """Layers at expert_layer_offset in each expert_layer_period; one expert is a dense layer."""
    period = fields.integer("expert_layer_period", default=2)
    offset = fields.integer("expert_layer_offset", default=1, low=0)
    several = fields.integer("num_experts") > 1
    return [several and layer % period == offset for layer in range(layers)]


def ernie_layers(fields: Fields, layers: int) -> list[bool]:
    """Every moe_layer_interval-th layer from moe_layer_start_index to moe_layer_end_index (-1: the last)."""
    start = fields.integer("moe_layer_start_index", default=1, low=0)
    end = fields.integer("moe_layer_end_index", default=-1, low=-1)
    step = fields.integer("moe_layer_interval", default=1)
    last = layers - 1 if end == -1 else end
    return [(layer + 1) % step == 0 and start <= layer <= last for layer in range(layers)]


def llama4_layers(fields: Fields, layers: int) -> list[bool]:
    """The layers in moe_layers, or every interleave_moe_layer_step-th."""
    listed = fields.indices("moe_layers")
    step = fields.integer("interleave_moe_layer_step", default=1)
    chosen = set(range(step - 1, layers, step) if listed is None else listed)
    return [layer in chosen for layer in range(layers)]


def softmax_router(renormalize: bool | None = None, default: bool = False, extras: tuple[str, ...] = ()) -> RouterOf:
    """Softmax; renormalised as given, or as norm_topk_prob says with the family's `default`."""

    def router(fields: Fields) -> Router:
        chosen = fields.flag("norm_topk_prob", default=default) if renormalize is None else renormalize
        return Router(scoring="softmax", renormalize=chosen, extras=extras)

    return router


def deepseek_v2_router(fields: Fields) -> Router:
    """Softmax, scaled, optionally limited to groups; norm_topk_prob is not read by the family's router."""
    method = fields.text("topk_method", default="greedy")
    scale = fields.number("routed_scaling_factor", default=1.0)
    if method == "greedy":
        return Router(scoring="softmax", renormalize=False, scale=scale)
    if method != "group_limited_greedy":
        raise fields.error(f"field topk_method is {method!r}, expected greedy or group_limited_greedy")
    groups, top_groups = fields.integer("n_group"), fields.integer("topk_group")
    return Router(scoring="softmax", renormalize=False, scale=scale, groups=groups, top_groups=top_groups)


def sigmoid_router(
    renormalize: bool, scale: float, groups: int, top_groups: int, extras: tuple[str, ...] = (SELECTION_BIAS,)
) -> RouterOf:
    """Sigmoid with DeepSeek-V3's fields, the arguments being the family's defaults."""

    def router(fields: Fields) -> Router:
        return Router(
            scoring="sigmoid",
            renormalize=fields.flag("norm_topk_prob", "moe_renormalize", default=renormalize),
            scale=fields.number("routed_scaling_factor", default=scale),
            groups=fields.integer("n_group", "num_expert_group", default=groups),
            top_groups=fields.integer("topk_group", default=top_groups),
            extras=extras,
        )

    return router


def scaled_sigmoid_router(name: str, default: float, extras: tuple[str, ...] = (SELECTION_BIAS,)) -> RouterOf:
    """Sigmoid, by default with a selection bias, renormalised, times field `name`."""

    def router(fields: Fields) -> Router:
        return Router(scoring="sigmoid", scale=fields.number(name, default=default), extras=extras)

    return router


def cohere2_router(fields: Fields) -> Router:
    """Softmax over the chosen, which is softmax over all of them, renormalised; or sigmoid."""
    scoring = fields.text("expert_selection_fn", default="softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise fields.error(f"field expert_selection_fn is {scoring!r}, expected softmax or sigmoid")
    return Router(scoring=scoring, renormalize=scoring == "softmax" or fields.flag("norm_topk_prob", default=True))


def lfm2_router(fields: Fields) -> Router:
    """Sigmoid; the selection bias can be switched off."""
    biased = fields.flag("use_expert_bias", default=True)
    return Router(
        scoring="sigmoid",
        renormalize=fields.flag("norm_topk_prob", default=True),
        scale=fields.number("routed_scaling_factor", default=1.0),
        extras=(SELECTION_BIAS,) if biased else (),
    )


def dbrx_router(fields: Fields) -> Router:
    """Softmax; divided by the p-norm that moe_normalize_expert_weights names, p = 1 being the sum; null is none."""
    name = "ffn_config.moe_normalize_expert_weights"
    if fields.is_null(name):
        return Router(scoring="softmax", renormalize=False)
    norm = fields.number(name, default=1.0)
    extras = () if norm == 1.0 else (f"weights are divided by their {norm:g}-norm",)
    return Router(scoring="softmax", renormalize=norm == 1.0, extras=extras)


def fixed_router(router: Router) -> RouterOf:
    """A router that no field changes."""
    return lambda fields: router


def no_shared(fields: Fields) -> int:
    """The family has no shared experts."""
    return 0


def shared_width(name: str) -> SharedOf:
    """Field `name` is the shared experts' total width; absent is none."""
    return lambda fields: fields.integer(name, default=0, low=0)


def shared_count(name: str, width: str, other: str | None = None) -> SharedOf:
    """Field `name`, or `other`, counts shared experts, each as wide as field `width` says."""
    names = (name,) if other is None else (name, other)
    return lambda fields: fields.integer(*names, default=0, low=0) * fields.integer(width)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where one family's config.json says what an expert layer needs.

    `hidden`, `intermediate`, `experts`, `top_k` and `layers` name integer fields; `per_layer` the ones of them
    that may be lists with an entry per layer. `activation` names a field, or `fixed_activation` the activation
    itself. `constants` are fields whose value the kernels hard-code. `layers` may name a list, or a text of letters,
    with an entry per layer. `narrow` names the experts' own hidden size, where a file has one. `wrapper` is the
    model_type of a file that holds this family's fields under `text_config`. With `own_gate` no kernel has what
    the family's experts do between their GEMMs.
    """

    architectures: tuple[str, ...]
    intermediate: Names
    experts: Names
    router: RouterOf
    hidden: Names = HIDDEN
    top_k: Names = TOP_K
    layers: Names = LAYERS
    per_layer: tuple[str, ...] = ()
    sparse: Sparse = every_layer
    shared: SharedOf = no_shared
    activation: Names = ("hidden_act",)
    fixed_activation: str = ""
    gated: bool = True
    bias: bool = False
    own_gate: bool = False
    constants: tuple[tuple[str, float], ...] = ()
    narrow: Names = ()
    wrapper: str = ""
    note: str = ""

    @property
    def sizes(self) -> tuple[Names, ...]:
        """The integer fields that must be there."""
        return self.hidden, self.intermediate, self.experts, self.top_k, self.layers

    def count(self, fields: Fields) -> int:
        """Return the number of decoder layers. Raises ModelError."""
        value = fields.get(*self.layers)
        kinds = isinstance(value, list) or (isinstance(value, str) and value and set(value) <= set(KINDS))
        if not kinds:
            return fields.integer(*self.layers, high=MAX_LAYERS)
        if not 1 <= len(value) <= MAX_LAYERS:
            raise fields.error(f"field {self.layers[0]} has {len(value)} entries, expected 1 to {MAX_LAYERS}")
        return len(value)

    def width(self, fields: Fields) -> int:
        """Return the hidden size that the experts see. Raises ModelError."""
        own = fields.integer(*self.hidden)
        return fields.integer(*self.narrow, default=own) if self.narrow else own
