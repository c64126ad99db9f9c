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

from tilecast.engine.tensor_files import Index, OnDemand, TensorFiles
from tilecast.errors import InputError, ModelError
from tilecast.kernels.awq import CODES_PER_WORD, AwqTensors, Rows, check_awq, rows_of_awq
from tilecast.kernels.compressed import BLOCK, rows_of_fp8, rows_of_int8, rows_of_packed, stored_group
from tilecast.kernels.formats import CODE_DTYPES, QuantizedStack, scale_shape
from tilecast.models.quantization import METHODS, Stored, read_quantization
from tilecast.models.sharding import check_cut
from tilecast.problem import ExpertGemm, ExpertLayer, weight_format

EXPERT = re.compile(r"(?P<block>.*\blayers\.(?P<layer>\d+)\..*(?<!shared_)experts)\.(?P<expert>\d+)\.(?P<name>\w+)")
"""The name of a linear layer that is one projection of one expert."""
ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "int8": ("weight", "weight_scale"),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"),
}
"""The tensors of a linear layer, by how it is stored."""
UNUSED = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
"""Scales of activations and of the cache, which stay in the model's dtype here."""
ONE_BYTE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint's linear layers are quantised.

    stored: a key of PARTS. kind: the weight format's. group: elements of K that share a scale, 0 for all. bits: of an
    integer code. scaled: what shares a scale of fp8, `block128`, `channel` or `tensor`; empty where tensors tell.
    """

    stored: str
    kind: str
    group: int = 0
    bits: int = 8
    scaled: str = ""

    @property
    def word(self) -> int:
        """How many codes a packed word holds, 1 where codes are not packed."""
        return 32 // self.bits if self.stored in ("awq", "packed") else 1


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


def recipe_of(config: Mapping[str, Any]) -> Recipe | None:
    """Return how a config.json says that weights are quantised; None if they are not, or in a way left to transformers.

    Raises ModelError for what neither reads rightly.
    """
    nested = config.get("text_config")
    found = config.get("quantization_config")
    if found is None and isinstance(nested, Mapping):
        found = nested.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
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
    shape = _shape_of(files, base, parts, recipe)
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


def base_of(parts: Mapping[str, str]) -> str:
    """Return the name of the linear layer whose parts have these keys."""
    return next(iter(parts.values())).rpartition(".")[0]


def _roles(gated: bool) -> tuple[str, ...]:
    return ("gate", "up", "down") if gated else ("up", "down")


def form_for(files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe, *widths: int) -> str:
    """Return the weight format that holds a recipe's weights of `widths` inputs; `parts` are those of one of them."""
    if recipe.kind == "fp8":
        scale = files.place(_scale_key(base, parts)).shape
        return f"fp8_{recipe.scaled or ('tensor' if scale in ((), (1,), (1, 1)) else 'channel')}"
    if recipe.stored == "awq":
        return f"awq_g{recipe.group}"
    if recipe.kind == "int8" and not recipe.group:
        return "int8_channel"
    try:
        return f"{recipe.kind}_g{stored_group(recipe.group, *widths)}"
    except InputError as error:
        raise ModelError(f"{base}: {error}") from error


def read_rows(
    files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe, shape: tuple[int, int], form: str,
    rows: range | None = None, columns: range | None = None,
) -> Rows:  # fmt: skip
    """Return one linear layer's weight [N, K], or ranges of its rows and of K, as rows of a stack in `form`.

    Ranges begin where groups, blocks and packed words do, or at 0. Raises ModelError.
    """
    rows, columns = rows or range(shape[0]), columns or range(shape[1])
    said = files.read(parts["weight_shape"]).tolist() if "weight_shape" in parts else [*shape]
    if said != [*shape]:
        raise ModelError(f"{parts['weight_shape']} says {said}, expected {[*shape]} for this model")
    read = {}
    for part, key in parts.items():
        if part != "weight_shape":
            read[part] = files.read(key, *_stored_ranges(part, recipe, form, shape, rows, columns))
    group, own = recipe.group, weight_format(form).group
    if group != own and group and len(columns) < shape[1]:
        # A longer group may be cut where one of `form` ends: its scale is said for each of those.
        groups = torch.arange(columns.start, columns.stop, own) // group - columns.start // group
        scales = ("weight_scale", "weight_zero_point")
        read |= {part: read[part].index_select(1, groups) for part in scales if part in read}
        group = own
    found = _rows(read, base, recipe, (len(rows), len(columns)), group, form)
    check_values(parts, found, read)
    return found


def check_rows(
    files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe, shape: tuple[int, int], form: str
) -> None:
    """Raise ModelError unless a linear layer's tensors have the shapes and dtypes of a weight [N, K] in `form`."""
    if {"g_idx", "weight_g_idx"} & parts.keys():
        raise ModelError(f"{base} has its inputs in an order of its own (activation order), which is not supported")
    optional = ("weight_zero_point", "weight_shape", "weight_scale_inv", "weight_scale")
    for part in PARTS[recipe.stored]:
        if part not in parts and part not in optional:
            raise ModelError(f"{files.folder}: {base} has no {part}")
    if recipe.stored != "awq":
        _scale_key(base, parts)
    places = {part: files.place(key) for part, key in parts.items()}
    # What would be done with the tensors, done with their shapes.
    bare = {part: torch.empty(place.shape, dtype=place.dtype, device="meta") for part, place in places.items()}
    _rows(bare, f"{files.folder}: {base}", recipe, shape, recipe.group, form)


def check_values(parts: Mapping[str, str], found: Rows, read: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError, naming the tensor, for scales that no quantiser makes: NaN, infinite or negative."""
    if bool((found.scales.isfinite() & (found.scales >= 0)).all()):
        return
    key = next(parts[part] for part in ("scales", "weight_scale_inv", "weight_scale") if part in read)
    bad = found.scales[~(found.scales.isfinite() & (found.scales >= 0))].flatten()
    raise ModelError(f"{key} holds {float(bad[0]):g}, expected scales that are finite and not negative")


def _rows(
    read: Mapping[str, torch.Tensor], base: str, recipe: Recipe, shape: tuple[int, int], group: int, form: str
) -> Rows:
    """Return what the tensors of a weight [N, K], or of a part of one, stand for. Raises ModelError."""
    try:
        if recipe.stored == "awq":
            tensors = AwqTensors(read["qweight"], read["qzeros"], read["scales"])
            check_awq(tensors, shape, recipe.group, base)
            return rows_of_awq(tensors)
        scale = read["weight_scale_inv" if "weight_scale_inv" in read else "weight_scale"]
        if recipe.stored == "fp8":
            return rows_of_fp8(read["weight"], scale, shape=shape, form=form, what=base)
        if recipe.stored == "int8":
            return rows_of_int8(read["weight"], scale, shape=shape, group=group, form=form, what=base)
        return rows_of_packed(
            read["weight_packed"], scale, read.get("weight_zero_point"), shape=shape, group=group, form=form, what=base
        )
    except InputError as error:
        raise ModelError(str(error)) from error


def _stored_ranges(
    part: str, recipe: Recipe, form: str, shape: tuple[int, int], rows: range, columns: range
) -> tuple[range | None, range | None]:
    """Return which rows and columns of a stored tensor hold ranges of N and K of a weight [N, K]; None for all."""
    per_row, per_column = _per_element(part, recipe, form)
    of_n = None if not per_row or len(rows) == shape[0] else _over(rows, per_row)
    of_k = None if not per_column or len(columns) == shape[1] else _over(columns, per_column)
    return (of_k, of_n) if recipe.stored == "awq" else (of_n, of_k)


def _per_element(part: str, recipe: Recipe, form: str) -> tuple[int, int]:
    """Return for how many rows of N, and elements of K, one element of a stored tensor stands; 0 for all."""
    word = recipe.word
    if part in ("qweight", "weight_packed", "weight"):
        return (CODES_PER_WORD, 1) if part == "qweight" else (1, word)
    if recipe.stored == "fp8":
        return {"fp8_block128": (BLOCK, BLOCK), "fp8_channel": (1, 0), "fp8_tensor": (0, 0)}[form]
    return (1 if part in ("scales", "weight_scale") else word), recipe.group


def _over(places: range, each: int) -> range:
    """Return the numbers of the blocks of `each` places that a range lies in."""
    return range(places.start // each, -(-places.stop // each))


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


def _scale_key(base: str, parts: Mapping[str, str]) -> str:
    for part in ("weight_scale_inv", "weight_scale"):
        if part in parts:
            return parts[part]
    raise ModelError(f"{base} has no weight_scale")


def _shape_of(files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe) -> tuple[int, int]:
    name = PARTS[recipe.stored][0]
    if name not in parts:
        raise ModelError(f"{files.folder}: {base} has no {name}")
    shape = files.place(parts[name]).shape
    if len(shape) != 2:
        raise ModelError(f"{files.folder}: {parts[name]} is {shape}, expected two dimensions")
    if recipe.stored == "awq":
        return shape[1] * 8, shape[0]
    return (shape[0], shape[1] * 32 // recipe.bits) if recipe.stored == "packed" else (shape[0], shape[1])


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
