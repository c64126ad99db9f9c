"""A layer written on the command line: `E=8,H=4096,I=14336,k=2`, with `w=awq_g128` where weights are quantised."""

from __future__ import annotations

from tilecast.errors import InputError, ModelError
from tilecast.models.model import LayerGroup, Model, Router
from tilecast.models.read import check_fit, dtype_name
from tilecast.problem import ACTIVATIONS, ExpertLayer

KEYS = ("E", "H", "I", "k", "dtype", "w", "act", "gated", "bias")
FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def read_spec(spec: str, *, dtype: str | None = None, weights: str | None = None) -> Model:
    """Return a model of one layer.

    Keys, in any case and order: E, H, I, k (required), dtype, w (the weight format), act, gated, bias. `dtype` and
    `weights` override the spec's. Raises ModelError.
    """
    given = _pairs(spec)
    missing = [key for key in KEYS[:4] if key.lower() not in given]
    if missing:
        raise ModelError(f"spec {spec!r} lacks {', '.join(missing)}, expected a form such as E=8,H=4096,I=14336,k=2")
    activation = given.get("act", "silu").lower()
    if activation not in ACTIVATIONS:
        raise ModelError(f"spec {spec!r}: act is {given['act']!r}, expected one of {', '.join(ACTIVATIONS)}")
    try:
        layer = ExpertLayer(
            experts=_integer(spec, "E", given["e"]),
            hidden=_integer(spec, "H", given["h"]),
            intermediate=_integer(spec, "I", given["i"]),
            top_k=_integer(spec, "k", given["k"]),
            dtype=dtype_name(given.get("dtype", "bf16") if dtype is None else dtype, f"spec {spec!r}"),
            weight_format=weights or given.get("w", "dense").lower(),
            activation=activation,
            gated=_flag(spec, "gated", given.get("gated", "1")),
            bias=_flag(spec, "bias", given.get("bias", "0")),
        )
        check_fit(layer)
    except InputError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"spec {spec!r}: {error}") from error
    group = LayerGroup(layer=layer, count=1, indices="0")
    return Model(name=_name(layer), source="spec", family="spec", layers=(group,), router=Router())


def _pairs(spec: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals or not key or not value:
            raise ModelError(f"spec {spec!r}: {part!r} is not key=value; keys are {', '.join(KEYS)}")
        if key.lower() not in {known.lower() for known in KEYS}:
            raise ModelError(f"spec {spec!r}: unknown key {key!r}, expected one of {', '.join(KEYS)}")
        if key.lower() in given:
            raise ModelError(f"spec {spec!r}: {key} is given twice")
        given[key.lower()] = value
    return given


def _integer(spec: str, key: str, text: str) -> int:
    # Ten digits are beyond every size; the bound keeps int() from working on a megabyte of them.
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ModelError(f"spec {spec!r}: {key} is {text!r}, expected a positive integer")
    return int(text)


def _flag(spec: str, key: str, text: str) -> bool:
    if text.lower() not in FLAGS:
        raise ModelError(f"spec {spec!r}: {key} is {text!r}, expected one of {', '.join(FLAGS)}")
    return FLAGS[text.lower()]


def _name(layer: ExpertLayer) -> str:
    parts = [f"E={layer.experts}", f"H={layer.hidden}", f"I={layer.intermediate}", f"k={layer.top_k}"]
    parts.append(f"dtype={layer.dtype}")
    if layer.weight_format != "dense":
        parts.append(f"w={layer.weight_format}")
    if layer.activation != "silu":
        parts.append(f"act={layer.activation}")
    if not layer.gated:
        parts.append("gated=0")
    if layer.bias:
        parts.append("bias=1")
    return ",".join(parts)
