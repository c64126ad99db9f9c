"""What a model is to Tilecast: its expert layers, how often each occurs, and facts about its router."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from tilecast.problem import ExpertLayer


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a family scores and weighs experts; nothing here changes a shape.

    `scoring` is `softmax` or `sigmoid`; `renormalize` divides the chosen weights by their sum; `scale` multiplies
    them afterwards. With `groups` > 1 experts are chosen from the `top_groups` best groups only. `extras` names
    whatever else the family's router does, such as a selection bias.
    """

    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    extras: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether scoring, top-k and renormalisation are all that this router does."""
        return self.scale == 1.0 and self.groups == 1 and not self.extras


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Equal MoE layers of one model: the unsharded layer, how many there are, and their indices as text.

    With `own_code` no kernel has what runs between the GEMMs, so that the model's own code does, and `parts` are two.
    """

    layer: ExpertLayer
    count: int
    indices: str
    own_code: bool = False

    def parts(self, layer: ExpertLayer) -> tuple[ExpertLayer, ...]:
        """Return what is run, and tuned, for `layer`, which is this group's or a rank's share of it."""
        return own_code_layers(layer) if self.own_code else (layer,)


def own_code_layers(layer: ExpertLayer) -> tuple[ExpertLayer, ExpertLayer]:
    """Return the layers whose up GEMM, and whose down GEMM, run experts with the model's own code between the two."""
    up = replace(layer, intermediate=layer.up.n, activation="identity", gated=False)
    return up, replace(up, intermediate=layer.intermediate)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's expert layers.

    `source` is `preset`, `spec` or the path of the config.json; `family` the model_type whose fields were read
    (`spec` for a spec); `layers` are unsharded and ordered by first index; `dense_layers` counts the decoder
    layers without routed experts; `shared_intermediate` is the total width of the shared experts, which run
    beside the expert layer and are no part of it (0: none). `notes` are sentences for people.
    """

    name: str
    source: str
    family: str
    layers: tuple[LayerGroup, ...]
    router: Router
    dense_layers: int = 0
    shared_intermediate: int = 0
    notes: tuple[str, ...] = ()

    @property
    def moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return sum(group.count for group in self.layers)


def indices_text(indices: list[int]) -> str:
    """Write ascending layer indices briefly: `3-60`, `1-31 step 2`, `0,4-7`."""
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}-{indices[-1]} step {steps.pop()}"
    parts: list[str] = []
    start = 0
    for position in range(1, len(indices) + 1):
        if position == len(indices) or indices[position] != indices[position - 1] + 1:
            first, last = indices[start], indices[position - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = position
    return ",".join(parts)
