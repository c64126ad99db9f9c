"""Quantised checkpoints: what a config says of its weights, and stacks of experts read from the files as they are.

AWQ, compressed-tensors (integers, packed or not, and fp8) and fp8 as DeepSeek and Qwen store it, one linear layer for
each expert's projection. Whatever else of a checkpoint is quantised (attention, shared experts) is dequantised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from tilecast.engine.quantized_rows import PARTS, Recipe, base_of, check_rows, form_for, read_rows, shape_of
from tilecast.engine.tensor_files import Index, OnDemand, TensorFiles
from tilecast.errors import ModelError
from tilecast.kernels.formats import CODE_DTYPES, QuantizedStack
from tilecast.kernels.scales import scale_shape
from tilecast.models.quantization import METHODS, Stored, read_quantization
from tilecast.models.sharding import check_cut
from tilecast.problem import ExpertGemm, ExpertLayer, weight_format

EXPERT = re.compile(r"(?P<block>.*\blayers\.(?P<layer>\d+)\..*(?<!shared_)experts)\.(?P<expert>\d+)\.(?P<name>\w+)")
"""The name of a linear layer that is one projection of one expert."""
ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

UNUSED = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
"""Scales of activations and of the cache, which stay in the model's dtype here."""
ONE_BYTE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank holds of a layer's experts: which of them, and which columns of I, of which `tp` ranks hold parts."""

    experts: range
    columns: range
    tp: int = 1


@dataclass(kw_only=True)
class Contents:
    """A checkpoint's tensors sorted: base names with their parts' keys.

    experts: by layer, then by (expert, role). linears: by base name. plain: what is as transformers reads it.
    """

    experts: dict[int, dict[tuple[int, str], dict[str, str]]] = field(default_factory=dict)
    linears: dict[str, dict[str, str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)


def recipe_of(config: Mapping[str, Any], source: str = "") -> Recipe | None:
    """Return how a config.json says that weights are quantised; None if they are not, or in a way left to transformers.

    Raises ModelError, which names the `source`, for what neither reads rightly.
    """
    try:
        return _recipe_of(config)
    except ModelError as error:
        raise ModelError(f"{source}: {error}" if source else str(error)) from error


def _recipe_of(config: Mapping[str, Any]) -> Recipe | None:
    nested = config.get("text_config")
    found = config.get("quantization_config")
    if found is None and isinstance(nested, Mapping):
        found = nested.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ModelError(f"field quantization_config is {found!r:.40}, expected an object")
    if str(found.get("quant_method")) in METHODS:
        return _recipe(found, read_quantization(found))
    if found.get("quant_method") in ("gptq", "autoround", "auto-round"):
        raise ModelError(
            f"weights are quantised by {found['quant_method']}, whose experts Tilecast does not read; take an AWQ, "
            "compressed-tensors or fp8 checkpoint, or make one with tilecast quantize"
        )
    return None


def contents_of(files: TensorFiles) -> Contents:
    """Sort a checkpoint's tensors. Raises ModelError for one that is quantised in no layout known here."""
    grouped: dict[str, dict[str, str]] = {}
    for key in files:
        base, _, part = key.rpartition(".")
        grouped.setdefault(base, {})[part] = key
    packed = {part for parts in PARTS.values() for part in parts} - {"weight"} | {"g_idx", "weight_g_idx"}
    found = Contents()
    for base, parts in grouped.items():
        weight = parts.get("weight")
        quantized = bool(packed & parts.keys()) or (weight is not None and files.place(weight).dtype in ONE_BYTE)
        match = EXPERT.fullmatch(base)
        own = {part: key for part, key in parts.items() if part in packed or part == "weight"} if quantized else {}
        if own and match and match["name"] in ROLES:
            of_layer = found.experts.setdefault(int(match["layer"]), {})
            place = (int(match["expert"]), ROLES[match["name"]])
            if place in of_layer:
                raise ModelError(f"{base}: layer {match['layer']} has expert {place[0]}'s {place[1]} projection twice")
            of_layer[place] = own
        elif own:
            found.linears[base] = own
        for part, key in parts.items():
            if part in own or part in UNUSED:
                continue
            if files.place(key).dtype in ONE_BYTE and files.place(key).dtype is not torch.uint8:
                raise ModelError(f"{key} is {files.place(key).dtype}, in no layout of quantised weights known here")
            found.plain.append(key)
    return found


def dense_weight(files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe) -> OnDemand:
    """Return a quantised linear layer's weight [N, K] in float32, read and dequantised when it is wanted.

    Raises ModelError for tensors that are missing or of another shape.
    """
    shape = shape_of(files, base, parts, recipe)
    form = form_for(files, base, parts, recipe, shape[1])
    layer = ExpertLayer(
        hidden=shape[0], intermediate=shape[1], experts=1, top_k=1, activation="identity", gated=False,
        weight_format=form,
    )  # fmt: skip
    check_rows(files, base, parts, recipe, shape, form)

    def part(index: Index) -> torch.Tensor:
        rows = read_rows(files, base, parts, recipe, shape, form)
        codes, scales, zeros = (None if part is None else part[None].contiguous() for part in rows)
        assert codes is not None and scales is not None
        stack = QuantizedStack(format=form, codes=codes, scales=scales, zeros=zeros)
        found = stack.dequantized(layer.down, 0, torch.float32)
        return found if index is ... else found[index].clone()

    return OnDemand(shape, torch.float32, part)


def read_stacks(
    files: TensorFiles, found: Mapping[tuple[int, str], Mapping[str, str]], recipe: Recipe, layer: ExpertLayer,
    share: Share,
) -> tuple[QuantizedStack, QuantizedStack]:  # fmt: skip
    """Return a rank's share of w13 [E, 2I or I, H] and w2 [E, H, I] of the whole `layer` that `check_layer` gave.

    Only the share is read from the files, and one projection of one expert is in memory besides the stacks. Raises
    ModelError.
    """
    mine = replace(layer, experts=len(share.experts), intermediate=len(share.columns))
    roles = _roles(layer.gated)
    return (
        _read_stack(files, found, recipe, layer.up, mine.up, share, roles[:-1]),
        _read_stack(files, found, recipe, layer.down, mine.down, share, roles[-1:]),
    )


def check_layer(
    files: TensorFiles, found: Mapping[tuple[int, str], Mapping[str, str]], recipe: Recipe, *, hidden: int,
    intermediate: int, experts: int, gated: bool, what: str,
) -> ExpertLayer:  # fmt: skip
    """Return the whole layer, `what`, that the tensors named by `found` make, going by the files' headers alone.

    Every rank comes to the same result, whatever its share. Raises ModelError for tensors that are missing, too many
    or of another shape.
    """
    roles = _roles(gated)
    wanted = {(expert, role) for expert in range(experts) for role in roles}
    if wanted != found.keys():
        expert, role = min(wanted ^ found.keys())
        lacks = "lacks" if (expert, role) in wanted else "has, and the model does not,"
        raise ModelError(f"{files.folder} {lacks} expert {expert}'s {role} projection in {what}")
    first = found[0, "down"]
    form = form_for(files, base_of(first), first, recipe, hidden, intermediate)
    layer = ExpertLayer(
        hidden=hidden, intermediate=intermediate, experts=experts, top_k=1, gated=gated, weight_format=form,
        activation="silu" if gated else "identity",
    )  # fmt: skip
    seen: set[object] = set()
    for (_, role), parts in found.items():
        shape = (hidden, intermediate) if role == "down" else (intermediate, hidden)
        # Experts are many, and alike.
        kind = (shape, frozenset((part, files.place(key)[1:3]) for part, key in parts.items()))
        if kind not in seen:
            check_rows(files, base_of(parts), parts, recipe, shape, form)
            seen.add(kind)
    return layer


def check_share(layer: ExpertLayer, recipe: Recipe, share: Share) -> None:
    """Raise ModelError where ranks would cut I inside a group, a block or a packed word, or hold nothing of it."""
    check_cut(layer, share.tp, word=recipe.word)
    if not share.columns:
        raise ModelError(f"tp={share.tp} leaves a rank none of the {layer.intermediate} columns of I; use a smaller tp")


def _roles(gated: bool) -> tuple[str, ...]:
    return ("gate", "up", "down") if gated else ("up", "down")


def _read_stack(
    files: TensorFiles, found: Mapping[tuple[int, str], Mapping[str, str]], recipe: Recipe, whole: ExpertGemm,
    gemm: ExpertGemm, share: Share, roles: Sequence[str],
) -> QuantizedStack:  # fmt: skip
    """Return a rank's part, the weights of `gemm`, of those of the `whole` one: I is its N, or its K if it is down."""
    form = weight_format(gemm.layer.weight_format)
    shape, (scale_count, groups) = (whole.n // len(roles), whole.k), scale_shape(gemm)
    each, width = scale_count // len(roles), gemm.n // len(roles)
    ranges = (None, share.columns) if whole.name == "down" else (share.columns, None)
    # Of all experts, so that ranks agree; what is narrower is then said exactly.
    scaled = [part for (_, role), parts in found.items() if role in roles for part in _scale_dtypes(files, parts)]
    dtype = torch.float32 if form.kind == "fp8" else reduce(torch.promote_types, scaled)
    codes = torch.empty((gemm.layer.experts, gemm.n, gemm.k // form.codes_per_byte), dtype=CODE_DTYPES[form.kind])
    scales = torch.empty((gemm.layer.experts, scale_count, groups), dtype=dtype)
    zeros = torch.empty((gemm.layer.experts, gemm.n, groups), dtype=torch.uint8) if form.kind == "awq" else None
    for place, expert in enumerate(share.experts):
        for number, role in enumerate(roles):
            parts = found[expert, role]
            rows = read_rows(files, base_of(parts), parts, recipe, shape, gemm.layer.weight_format, *ranges)
            here = slice(number * width, (number + 1) * width)
            codes.view(torch.uint8)[place, here] = rows.codes.view(torch.uint8)
            scales[place, number * each : (number + 1) * each] = rows.scales
            if zeros is not None and rows.zeros is not None:
                zeros[place, here] = rows.zeros
    return QuantizedStack(format=gemm.layer.weight_format, codes=codes, scales=scales, zeros=zeros)


def _scale_dtypes(files: TensorFiles, parts: Mapping[str, str]) -> list[torch.dtype]:
    return [files.place(key).dtype for part, key in parts.items() if part in ("scales", "weight_scale")]


def _recipe(found: Mapping[str, Any], said: Stored) -> Recipe:
    """Return how tensors of the weights that a config says it has are laid out. Raises ModelError."""
    kind, _, shared = said.format.partition("_")
    if said.method == "awq":
        return Recipe(stored="awq", kind=kind, group=weight_format(said.format).group, bits=4)
    if kind == "fp8":
        # fp8's own configs tell one scale for a tensor from one for a row in no way.
        scaled = "" if said.method == "fp8" and shared == "tensor" else shared
        return Recipe(stored="fp8", kind="fp8", scaled=scaled)
    layout = found.get("format") or next(iter(found["config_groups"].values())).get("format")
    if layout == "pack-quantized":
        return Recipe(stored="packed", kind=kind, group=said.group, bits=8 if kind == "int8" else 4)
    if layout in ("int-quantized", "naive-quantized") and kind == "int8":
        return Recipe(stored="int8", kind="int8", group=said.group)
    raise ModelError(
        f"compressed-tensors has {said.format} weights in format {layout!r:.40}, expected pack-quantized, or "
        "int-quantized for int8"
    )
