"""The layers, token counts and units of the suite. Imports no torch: the driver reads this to know what is left."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.models.find import resolve
from tilecast.models.sharding import layer_for_rank
from tilecast.problem import ExpertLayer

STEPS = ("device", "tests", "certify", "questions", "layers", "sweep", "sanitizer")
"""In the order in which they run."""
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
TINY_TOKENS = (1, 8)
SWEEP_TOKENS = (2048, 1, 32, 8192, 512, 128, 8)
"""Largest value first: both ends of the roofline before what lies between."""
SANITIZERS = ("memcheck", "racecheck")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's layer as one rank sees it; `title` is what tables call it."""

    name: str
    title: str
    layer: ExpertLayer


def _shape(name: str, title: str, preset: str, *, tp: int = 1, ep: int = 1) -> Shape:
    layer = resolve(preset, dtype="bf16").layers[0].layer
    return Shape(name=name, title=title, layer=layer_for_rank(layer, 0, tp=tp, ep=ep))


def layer_shapes(*, tiny: bool = False) -> tuple[Shape, ...]:
    """Return the layers that are timed; with `tiny` one that a CPU runs in milliseconds."""
    if tiny:
        layer = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
        return (Shape(name="tiny", title="Tiny", layer=layer),)
    return (
        _shape("mixtral-8x7b-tp1", "Mixtral-8x7B, TP 1", "mixtral-8x7b"),
        _shape("qwen3-30b-a3b-tp1", "Qwen3-30B-A3B, TP 1", "qwen3-30b-a3b"),
        _shape("mixtral-8x7b-tp2", "Mixtral-8x7B, TP 2", "mixtral-8x7b", tp=2),
        _shape("deepseek-v3-ep8", "DeepSeek-V3, EP 8", "deepseek-v3", ep=8),
        _shape("mixtral-8x7b-tp8", "Mixtral-8x7B, TP 8", "mixtral-8x7b", tp=8),
        _shape("gpt-oss-120b-tp1", "gpt-oss-120b, TP 1", "gpt-oss-120b"),
    )


def find_shape(name: str, *, tiny: bool = False) -> Shape:
    """Return a shape by name; raises KeyError."""
    return {shape.name: shape for shape in layer_shapes(tiny=tiny)}[name]


def layer_tokens(*, tiny: bool = False) -> tuple[int, ...]:
    return TINY_TOKENS if tiny else TOKENS


def units(step: str, *, tiny: bool = False) -> tuple[str, ...]:
    """Return the names of a step's units, in the order in which they run. A unit is what a restart skips whole."""
    if step == "device":
        return ("device",)
    if step == "tests":
        return ("cases", "pytest")
    if step == "certify":
        return ("bf16",) if tiny else ("bf16", "fp16")
    if step == "questions":
        return ("questions",)
    if step == "layers":
        return tuple(shape.name for shape in layer_shapes(tiny=tiny))
    if step == "sweep":
        names = tuple(shape.name for shape in layer_shapes(tiny=tiny))
        counts = TINY_TOKENS[:1] if tiny else SWEEP_TOKENS
        return tuple(f"{name}.T{tokens}" for tokens in counts for name in names)
    if step == "sanitizer":
        return SANITIZERS
    raise KeyError(step)
