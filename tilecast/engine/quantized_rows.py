"""The tensors of one quantised linear layer as a checkpoint stores them, and the rows of a stack that they make.

A layer of N outputs and K inputs is checked by the files' headers alone, and read whole or for ranges of N and K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tilecast.engine.tensor_files import TensorFiles
from tilecast.errors import InputError, ModelError
from tilecast.kernels.awq import CODES_PER_WORD, AwqTensors, Rows, check_awq, rows_of_awq
from tilecast.kernels.compressed import BLOCK, rows_of_fp8, rows_of_int8, rows_of_packed, stored_group
from tilecast.problem import weight_format

PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "int8": ("weight", "weight_scale"),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"),
}
"""The tensors of a linear layer, by how it is stored."""


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


def base_of(parts: Mapping[str, str]) -> str:
    """Return the name of the linear layer whose parts have these keys."""
    return next(iter(parts.values())).rpartition(".")[0]


def shape_of(files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe) -> tuple[int, int]:
    """Return N and K of a linear layer, as its codes say. Raises ModelError."""
    name = PARTS[recipe.stored][0]
    if name not in parts:
        raise _lacks(files, base, parts, f"no {name}")
    shape = files.place(parts[name]).shape
    if len(shape) != 2:
        raise ModelError(f"{files.folder}: {parts[name]} is {shape}, expected two dimensions")
    if recipe.stored == "awq":
        return shape[1] * 8, shape[0]
    return (shape[0], shape[1] * 32 // recipe.bits) if recipe.stored == "packed" else (shape[0], shape[1])


def form_for(files: TensorFiles, base: str, parts: Mapping[str, str], recipe: Recipe, *widths: int) -> str:
    """Return the weight format that holds a recipe's weights of `widths` inputs; `parts` are those of one of them."""
    if recipe.kind == "fp8":
        scale = files.place(_scale_key(files, base, parts)).shape
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
            raise _lacks(files, base, parts, f"no {part}")
    if recipe.stored != "awq":
        _scale_key(files, base, parts)
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


def _scale_key(files: TensorFiles, base: str, parts: Mapping[str, str]) -> str:
    for part in ("weight_scale_inv", "weight_scale"):
        if part in parts:
            return parts[part]
    raise _lacks(files, base, parts, "neither weight_scale_inv nor weight_scale")


def _lacks(files: TensorFiles, base: str, parts: Mapping[str, str], what: str) -> ModelError:
    """Return the error for a missing tensor; what is there shows a config that names another format."""
    return ModelError(f"{files.folder}: {base} has {what}, expected beside {', '.join(sorted(parts))}")
