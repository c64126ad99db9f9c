"""One parsed config.json -> Model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilecast.errors import InputError, ModelError
from tilecast.models.families import FAMILIES
from tilecast.models.fields import Fields
from tilecast.models.model import LayerGroup, Model, indices_text
from tilecast.models.quantization import Stored, read_quantization
from tilecast.models.rules import Family
from tilecast.problem import DTYPES, ExpertLayer

DTYPE_NAMES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    **{name: name for name in DTYPES},
}  # fmt: skip
"""torch's names of dtypes, and Tilecast's own."""

ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "drelu": "drelu",
}  # fmt: skip
"""transformers' names of activations; the four tanh forms are the same function."""

OTHER_ACTIVATIONS = (
    "gelu_10", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu6", "sigmoid",
    "sqrtsoftplus", "tanh", "xielu",
)  # fmt: skip
"""transformers' names of activations that no kernel has: the model's own code runs them, between the GEMMs."""


def dtype_name(dtype: str, what: str) -> str:
    """Return Tilecast's name of a dtype, such as `bf16` for `bfloat16`. Raises ModelError."""
    name = DTYPE_NAMES.get(dtype.removeprefix("torch.").lower())
    if name is None:
        raise ModelError(f"{what}: dtype is {dtype!r}, expected one of {', '.join(DTYPE_NAMES)}")
    return name


def read_config(
    config: Mapping[str, Any], *, name: str, source: str, dtype: str | None = None, weights: str | None = None
) -> Model:
    """Return the model that a parsed config.json describes.

    `name` and `source` are kept as they are; `dtype` overrides the file's, `weights` its weight format. Raises
    ModelError.
    """
    what = name if source == "preset" else source
    model_type, family, inner = _identify(config, what)
    fields = Fields(inner, what)
    notes = [family.note] if family.note else []
    outer = Fields(config, what)
    stored = _stored(outer, fields, dtype, weights, notes)
    groups, dense = _layers(fields, family, _dtype(outer, fields, dtype), stored)
    if any(group.own_code for group in groups):
        notes.append("no kernel has the experts' activation, so the model's own code runs it between two layers' GEMMs")
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


def _stored(outer: Fields, inner: Fields, dtype: str | None, weights: str | None, notes: list[str]) -> Stored | None:
    """Return how experts' weights are stored, None where they are dense; adds what a reader should know to `notes`."""
    found = outer.get("quantization_config") or inner.get("quantization_config")
    if weights is not None:
        if found is not None:
            method = found.get("quant_method", "unnamed") if isinstance(found, Mapping) else found
            notes.append(f"the checkpoint is quantised ({method!s:.40}); the layers are {weights} as asked for")
        return None if weights == "dense" else Stored(method="as asked for", format=weights)
    if found is None:
        if (published := outer.get("published_weights")) is not None:
            notes.append(f"weights are published as {published}; the layers are dense")
        return None
    try:
        stored = read_quantization(found)
    except ModelError as error:
        if dtype is None:
            raise outer.error(f"{error}; or name the dtype, such as bf16, to take the layers as dense") from error
        notes.append(f"{error}; the layers are dense {dtype_name(dtype, outer.what)}")
        return None
    notes.append(f"experts are stored quantised ({stored.method}){f'; {stored.note}' if stored.note else ''}")
    return stored


def _dtype(outer: Fields, inner: Fields, given: str | None) -> str:
    if given is not None:
        return dtype_name(given, outer.what)
    for fields in (outer, inner):
        if fields.has("dtype", "torch_dtype"):
            return dtype_name(fields.text("dtype", "torch_dtype"), fields.what)
    return "bf16"


def _layers(fields: Fields, family: Family, dtype: str, stored: Stored | None) -> tuple[tuple[LayerGroup, ...], int]:
    """Return the MoE layers, equal ones grouped, and the number of dense layers."""
    count = family.count(fields)
    own_code = any(fields.number(constant, default=known) != known for constant, known in family.constants)
    sizes = [_per_layer(fields, family, names, count) for names in (family.intermediate, family.experts, family.top_k)]
    hidden, activation = family.width(fields), _activation(fields, family)
    own_code = own_code or activation is None or family.own_gate
    if own_code and stored is not None:
        raise fields.error("no kernel has the experts' activation, and quantised experts run by kernels alone")
    indices: dict[ExpertLayer, list[int]] = {}
    sparse = family.sparse(fields, count)
    for index in range(count):
        if not sparse[index]:
            continue
        intermediate, experts, top_k = (size[index] for size in sizes)
        try:
            layer = ExpertLayer(
                hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, dtype=dtype,
                activation=activation or "silu", gated=family.gated, bias=family.bias,
                weight_format="dense" if stored is None else stored.format_for(index, hidden, intermediate),
            )  # fmt: skip
            check_fit(layer)
        except InputError as error:
            raise fields.error(str(error)) from error
        indices.setdefault(layer, []).append(index)
    groups = [
        LayerGroup(layer=layer, count=len(at), indices=indices_text(at), own_code=own_code)
        for layer, at in indices.items()
    ]
    return tuple(groups), count - sum(sparse)


def check_fit(layer: ExpertLayer) -> None:
    """Raise InputError where a layer's sizes cut a group of its weight format in two."""
    for gemm in layer.gemms:
        if gemm.misfit is not None:
            raise InputError(gemm.misfit)


def _per_layer(fields: Fields, family: Family, names: tuple[str, ...], count: int) -> list[int]:
    if any(name in family.per_layer for name in names):
        return fields.integers(*names, layers=count)
    return [fields.integer(*names)] * count


def _activation(fields: Fields, family: Family) -> str | None:
    """Return Tilecast's name of the activation, None for one that no kernel has."""
    if family.fixed_activation:
        return family.fixed_activation
    seen = fields.text(*family.activation, default="silu")
    if seen in OTHER_ACTIVATIONS:
        return "identity" if seen == "linear" and not family.gated else None
    known = sorted((*ACTIVATION_NAMES, *OTHER_ACTIVATIONS))
    if seen not in ACTIVATION_NAMES:
        raise fields.error(f"field {family.activation[0]} is {seen!r}, expected one of {', '.join(known)}")
    return ACTIVATION_NAMES[seen]
