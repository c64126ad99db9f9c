"""One parsed config.json -> Model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilecast.errors import InputError, ModelError
from tilecast.models.families import FAMILIES
from tilecast.models.fields import Fields
from tilecast.models.model import LayerGroup, Model, indices_text
from tilecast.models.rules import Family
from tilecast.problem import DTYPES, ExpertLayer

MAX_LAYERS = 10_000
DTYPE_NAMES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    **{name: name for name in DTYPES},
}  # fmt: skip
"""torch's names of dtypes, and Tilecast's own."""

ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""transformers' names of activations; the four tanh forms are the same function."""


def dtype_name(dtype: str, what: str) -> str:
    """Return Tilecast's name of a dtype, such as `bf16` for `bfloat16`. Raises ModelError."""
    name = DTYPE_NAMES.get(dtype.removeprefix("torch.").lower())
    if name is None:
        raise ModelError(f"{what}: dtype is {dtype!r}, expected one of {', '.join(DTYPE_NAMES)}")
    return name


def read_config(config: Mapping[str, Any], *, name: str, source: str, dtype: str | None = None) -> Model:
    """Return the model that a parsed config.json describes.

    `name` and `source` are kept as they are; `dtype` overrides the file's. Raises ModelError.
    """
    what = name if source == "preset" else source
    model_type, family, inner = _identify(config, what)
    fields = Fields(inner, what)
    notes = [family.note] if family.note else []
    layer_dtype = _dtype(Fields(config, what), fields, dtype, notes)
    groups, dense = _layers(fields, family, layer_dtype)
    if not groups:
        raise fields.error(f"family {model_type}: none of its {dense} layers has routed experts")
    shared = family.shared(fields)
    if shared:
        notes.append(f"shared experts of total width {shared} run beside the expert layer and are not tuned")
    return Model(
        name=name,
        source=source,
        family=model_type,
        layers=groups,
        router=family.router(fields),
        dense_layers=dense,
        shared_intermediate=shared,
        notes=tuple(notes),
    )


def _identify(config: Mapping[str, Any], what: str) -> tuple[str, Family, Mapping[str, Any]]:
    """Return the family's name and entry, and the object that holds its fields."""
    wrappers = {family.wrapper: name for name, family in FAMILIES.items() if family.wrapper}
    classes = {cls: name for name, family in FAMILIES.items() for cls in family.architectures}
    seen, architectures = config.get("model_type"), config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    by_class = classes.get(first) if isinstance(first, str) else None
    name = wrappers.get(seen, seen) if isinstance(seen, str) else by_class if seen is None else None
    if name not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *wrappers}))
        raise ModelError(
            f"{what}: field model_type is {seen!r:.80} and architectures {architectures!r:.80}, no MoE family that "
            f"Tilecast knows; known: {known}; any layer can be given as a spec such as E=8,H=4096,I=14336,k=2"
        )
    if by_class is not None and by_class != name:
        raise ModelError(
            f"{what}: model_type {seen!r} does not fit architectures {architectures!r} (family {by_class})"
        )
    family = FAMILIES[name]
    if family.wrapper and seen != name:
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise ModelError(f"{what}: field text_config is {inner!r:.40}, expected an object with {name}'s fields")
        return name, family, inner
    return name, family, config


def _dtype(outer: Fields, inner: Fields, given: str | None, notes: list[str]) -> str:
    stored = outer.get("quantization_config") or inner.get("quantization_config")
    if stored is not None:
        method = stored.get("quant_method", "unnamed") if isinstance(stored, Mapping) else stored
        if given is None:
            raise outer.error(
                f"weights are quantised ({method}) and only dense weights run so far; "
                "name the dtype they will be dequantised to, such as dtype bf16"
            )
        notes.append(f"the checkpoint is quantised ({method}); the layers are dense {dtype_name(given, outer.what)}")
    elif (published := outer.get("published_weights")) is not None:
        notes.append(f"weights are published as {published}; the layers are dense")
    if given is not None:
        return dtype_name(given, outer.what)
    for fields in (outer, inner):
        if fields.has("dtype", "torch_dtype"):
            return dtype_name(fields.text("dtype", "torch_dtype"), fields.what)
    return "bf16"


def _layers(fields: Fields, family: Family, dtype: str) -> tuple[tuple[LayerGroup, ...], int]:
    """Return the MoE layers, equal ones grouped, and the number of dense layers."""
    count = fields.integer(*family.layers, high=MAX_LAYERS)
    for constant, expected in family.constants:
        if (value := fields.number(constant, default=expected)) != expected:
            raise fields.error(f"field {constant} is {value}, only {expected} is supported")
    sizes = [_per_layer(fields, family, names, count) for names in (family.intermediate, family.experts, family.top_k)]
    hidden, activation = fields.integer(*family.hidden), _activation(fields, family)
    indices: dict[ExpertLayer, list[int]] = {}
    sparse = family.sparse(fields, count)
    for index in range(count):
        if not sparse[index]:
            continue
        intermediate, experts, top_k = (size[index] for size in sizes)
        try:
            layer = ExpertLayer(
                hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=dtype,
                activation=activation, gated=family.gated, bias=family.bias,
            )  # fmt: skip
        except InputError as error:
            raise fields.error(str(error)) from error
        indices.setdefault(layer, []).append(index)
    groups = [LayerGroup(layer=layer, count=len(at), indices=indices_text(at)) for layer, at in indices.items()]
    return tuple(groups), count - sum(sparse)


def _per_layer(fields: Fields, family: Family, names: tuple[str, ...], count: int) -> list[int]:
    if any(name in family.per_layer for name in names):
        return fields.integers(*names, layers=count)
    return [fields.integer(*names)] * count


def _activation(fields: Fields, family: Family) -> str:
    if family.fixed_activation:
        return family.fixed_activation
    seen = fields.text(*family.activation, default="silu")
    if seen not in ACTIVATION_NAMES:
        raise fields.error(
            f"field {family.activation[0]} is {seen!r}, expected one of {', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[seen]
