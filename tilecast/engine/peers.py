"""What users run an expert layer with today: the contestants that Tilecast is measured against.

A peer is prepared once per layer and bound to one call's operands before that call is timed. Most peers run
the whole layer as users would call it, with their own dtypes and rounding. `onednn prepacked gemms` runs the
two products alone, on rows that were gathered before the clock starts and weights packed for about that many
rows: no whole layer can be expected to be faster than it on the same library, which makes it a strict target.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from tilecast.errors import UsageError
from tilecast.kernels.cpu.onednn_launch import cannot_prepack_here, prepack, prepacked_linear
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import activate
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertLayer

Bound = Callable[[], torch.Tensor]
"""One call, ready to run and be timed. Returns the layer's output [T, H]."""

Prepared = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Bound]
"""Binds hidden [T, H], ids (integers [T, k]) and routing weights (float32 [T, k]) to a call; not timed."""

TRANSFORMERS_MINIMUM = (5, 17)
TRANSFORMERS_ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
MAX_GATHERED_BYTES = 2 << 30
"""Bound on the weights that `batched_mm` copies, once per routed slot."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A layer's weights as checkpoints hold them.

    w13 is [E, 2I or I, H] (gate rows before up rows), w2 [E, H, I], in the layer's dtype or weight format; biases are
    None or [E, 2I or I] and [E, H]. Peers get dense ones only.
    """

    w13: Weights
    w2: Weights
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return w13 and w2 of a layer whose weights are dense."""
        assert isinstance(self.w13, torch.Tensor) and isinstance(self.w2, torch.Tensor), "a peer got quantised weights"
        return self.w13, self.w2


class Peer(Protocol):
    """A way to run an expert layer that is not Tilecast's."""

    @property
    def name(self) -> str:
        """The name in tables and on the command line."""
        ...

    @property
    def gemms_only(self) -> bool:
        """Whether only the two products are run: a target, whose result is not the layer's."""
        ...

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        """Return why this peer cannot run `layer` with so many tokens here on `cpu` or `cuda`; None when it can."""
        ...

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        """Return the peer holding `weights`; `tokens` is what it may optimise for."""
        ...


class TorchLoop:
    """A plain PyTorch loop over the experts: two `linear`s each, added into the output in its dtype."""

    name = "torch loop"
    gemms_only = False

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        """Return None: runs everywhere."""
        return None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        """Hold the weights as they are."""
        return lambda hidden, ids, scale: partial(self._run, layer, weights, hidden, ids, scale)

    @staticmethod
    def _run(
        layer: ExpertLayer, weights: LayerWeights, hidden: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(layer.experts):
            token, position = torch.where(ids == expert)
            if token.numel() == 0:
                continue
            product = F.linear(hidden[token], weights.dense[0][expert], _row(weights.bias13, expert))
            value = _activate_halves(layer, product)
            value = F.linear(value, weights.dense[1][expert], _row(weights.bias2, expert))
            value = value * scale[token, position, None]
            out.index_add_(0, token, value.to(out.dtype))
        return out


class TorchGroupedMm:
    """`torch.nn.functional.grouped_mm` over expert-sorted rows, with float32 activation and ordered combine."""

    name = "torch grouped_mm"
    gemms_only = False

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        """Return why this PyTorch cannot."""
        return _grouped_mm_refuses(layer, device)

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        """Hold the weights as they are."""
        return lambda hidden, ids, scale: partial(self._run, layer, weights, hidden, ids, scale)

    @staticmethod
    def _run(
        layer: ExpertLayer, weights: LayerWeights, hidden: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        route = sort_slots(ids, layer.experts)
        slots = route.slots[: int(route.offsets[-1])].long()
        expert = route.ids.flatten()[slots]
        product = F.grouped_mm(
            hidden[slots // route.top_k], weights.dense[0].transpose(1, 2), offs=route.offsets[1:]
        ).float()
        if weights.bias13 is not None:
            product += weights.bias13[expert]
        value = _activate_halves(layer, product).to(hidden.dtype)
        product = F.grouped_mm(value, weights.dense[1].transpose(1, 2), offs=route.offsets[1:]).float()
        if weights.bias2 is not None:
            product += weights.bias2[expert]
        by_slot = product.new_zeros(ids.numel(), layer.hidden)
        by_slot[slots] = product * scale.flatten()[slots, None]
        return by_slot.view(*ids.shape, layer.hidden).sum(1).to(hidden.dtype)


class TransformersExperts:
    """transformers' own experts module (Mixtral's) under one of its implementations."""

    gemms_only = False

    def __init__(self, implementation: str) -> None:
        """Use `eager`, `grouped_mm` or `batched_mm`."""
        self.implementation = implementation
        self.name = f"transformers {implementation}"

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        """Return why transformers is absent or too old, or why its Mixtral experts cannot run the layer."""
        if not layer.gated or layer.bias:
            return "Mixtral's experts are gated and have no bias"
        if layer.activation not in TRANSFORMERS_ACTIVATIONS:
            return f"Mixtral's experts have no activation {layer.activation}"
        if layer.global_experts != layer.experts:
            return "outside a model it does not take the ids of other ranks' experts"
        gathered = tokens * layer.top_k * sum(gemm.weight_bytes(1) for gemm in layer.gemms)
        if self.implementation == "batched_mm" and gathered > MAX_GATHERED_BYTES:
            return f"it would copy {gathered / 2**30:.1f} GiB of weights, one expert's for each routed slot"
        if self.implementation == "grouped_mm" and (reason := _grouped_mm_refuses(layer, device)) is not None:
            return reason
        return _transformers_missing()

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        """Build the module around the very weights given; none is copied."""
        mixtral: Any = importlib.import_module("transformers.models.mixtral")
        modeling: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        config = mixtral.MixtralConfig(
            hidden_size=layer.hidden,
            intermediate_size=layer.intermediate,
            num_local_experts=layer.experts,
            num_experts_per_tok=layer.top_k,
            hidden_act=TRANSFORMERS_ACTIVATIONS[layer.activation],
        )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            experts = modeling.MixtralExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(weights.dense[0], requires_grad=False)
        experts.down_proj = torch.nn.Parameter(weights.dense[1], requires_grad=False)
        # The router of transformers returns int64 ids.
        return lambda hidden, ids, scale: partial(experts, hidden, ids.long(), scale)


class OneDnnGemms:
    """The two products alone through oneDNN, weights prepacked for the rows that an expert has on average.

    The down product reads random rows, so nothing but the two library calls per expert is timed; the result
    is the last expert's product.
    """

    name = "onednn prepacked gemms"
    gemms_only = True

    def available(self, layer: ExpertLayer, tokens: int = 1, device: str = "cpu") -> str | None:
        """Return why oneDNN cannot prepack this dtype on this CPU."""
        return cannot_prepack_here(layer.dtype) if device == "cpu" else "oneDNN runs on the CPU"

    def prepare(self, layer: ExpertLayer, weights: LayerWeights, tokens: int = 1) -> Prepared:
        """Pack every expert's weights: a copy of them all."""
        rows = max(1, math.ceil(tokens * layer.top_k / layer.global_experts))
        up, down = ([prepack(w, rows) for w in stack] for stack in weights.dense)
        return lambda hidden, ids, scale: partial(self._run, self._calls(layer, up, down, hidden, ids))

    @staticmethod
    def _calls(
        layer: ExpertLayer, up: list[torch.Tensor], down: list[torch.Tensor], hidden: torch.Tensor, ids: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        calls = []
        for expert in range(layer.experts):
            token, _ = torch.where(ids == expert)
            if token.numel():
                calls.append((hidden[token], up[expert]))
                calls.append((torch.randn(token.numel(), layer.intermediate).to(hidden.dtype), down[expert]))
        return calls

    @staticmethod
    def _run(calls: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        product = torch.empty(0)
        for rows, weight in calls:
            product = prepacked_linear(rows, weight)
        return product


PEERS: tuple[Peer, ...] = (
    TorchLoop(),
    TransformersExperts("eager"),
    TransformersExperts("grouped_mm"),
    TransformersExperts("batched_mm"),
    TorchGroupedMm(),
    OneDnnGemms(),
)
"""Every peer, in the order in which tables list them."""


def refused(peer: Peer, layer: ExpertLayer, tokens: int, device: str) -> str | None:
    """Return why a peer cannot run `layer` with so many tokens here; None when it can."""
    if layer.weight_format != "dense":
        return f"runs dense weights, the layer's are {layer.weight_format}"
    return peer.available(layer, tokens, device)


def find_peers(names: Sequence[str]) -> tuple[Peer, ...]:
    """Return peers by name, in the order given, each once. Raises UsageError that lists the known ones."""
    known = {peer.name: peer for peer in PEERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no peer is named {unknown[0]!r}; known: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _transformers_missing() -> str | None:
    try:
        version = metadata.version("transformers")
        importlib.import_module("transformers.integrations.moe")
    except (ImportError, metadata.PackageNotFoundError) as error:
        return f"transformers cannot be imported ({_first_line(error)}); install tilecast[hf]"
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if release < TRANSFORMERS_MINIMUM:
        wanted = ".".join(map(str, TRANSFORMERS_MINIMUM))
        return f"transformers is {version}, its experts have implementations from {wanted} on"
    return None


def _grouped_mm_refuses(layer: ExpertLayer, device: str) -> str | None:
    """Return why grouped_mm does not take the layer: tried on two small experts aligned as the layer's are."""
    if not hasattr(F, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.grouped_mm"
    try:
        for gemm in layer.gemms:
            k, n = 16 + gemm.k % 16, 16 + gemm.n % 16
            weight = torch.zeros(2, n, k, dtype=TORCH_DTYPES[layer.dtype], device=device)
            offsets = torch.tensor([1, 2], dtype=torch.int32, device=device)
            F.grouped_mm(weight.new_zeros(2, k), weight.transpose(1, 2), offs=offsets)
    except (RuntimeError, ValueError) as error:
        return f"grouped_mm refuses this layer: {_first_line(error)}"
    return None


def _activate_halves(layer: ExpertLayer, product: torch.Tensor) -> torch.Tensor:
    if not layer.gated:
        return activate(product, None, layer.activation)
    gate, up = product.chunk(2, dim=-1)
    return activate(gate, up, layer.activation)


def _row(stack: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if stack is None else stack[expert]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
