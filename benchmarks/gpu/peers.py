"""What an expert layer is run with on GPUs today, in forms that a CUDA graph can capture.

A peer reads operands from tensors that stay where they are, so that one captured graph serves every round.
Where transformers would prepare operands outside its experts (ids of other ranks' experts, their zero weights),
that is done outside of the clock here, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from tilecast.engine.bench import Operands
from tilecast.engine.peers import LayerWeights
from tilecast.kernels.reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, activate
from tilecast.kernels.routing import ordered_sum
from tilecast.problem import ExpertLayer

Call = Callable[[], torch.Tensor]
"""One run of the whole layer on the fixed operands; returns [T, H]."""

MAX_GATHERED_BYTES = 8 << 30
ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


class FixedOperands:
    """One call's operands in tensors that stay where they are.

    hidden [T, H]; ids int32 [T, k]; scale float32 [T, k]. `local_ids` int64 and `local_scale` are as transformers
    has them for a rank's experts: E for those of other ranks, with weight zero.
    """

    def __init__(self, layer: ExpertLayer, first: Operands, device: torch.device) -> None:
        self._experts = layer.experts
        self.hidden = first.hidden.to(device, copy=True)
        self.ids = first.ids.to(device, torch.int32, copy=True)
        self.scale = first.scale.to(device, copy=True)
        self.local_ids = self.ids.long()
        self.local_scale = self.scale.clone()
        self.route(first.ids, first.scale)

    def route(self, ids: torch.Tensor, scale: torch.Tensor) -> None:
        """Route afresh: overwrite ids and weights in place."""
        self.ids.copy_(ids)
        self.scale.copy_(scale)
        elsewhere = (self.ids < 0) | (self.ids >= self._experts)
        self.local_ids.copy_(self.ids.masked_fill(elsewhere, self._experts))
        self.local_scale.copy_(self.scale.masked_fill(elsewhere, 0.0))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a run reads besides the weights."""
        return self.hidden, self.ids, self.scale, self.local_ids, self.local_scale


class GpuPeer(Protocol):
    """A way to run an expert layer that is not Tilecast's."""

    name: str

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        """Return why it cannot run this here."""
        ...

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        """Hold the weights, in its own form if it has one."""
        ...


class TorchGroupedMm:
    """`torch.nn.functional.grouped_mm` on expert-sorted rows, epilogues in torch as Tilecast rounds them."""

    name = "torch grouped_mm"

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        if grouped_mm() is None:
            return f"PyTorch {torch.__version__} has no grouped_mm"
        return None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        experts = torch.arange(layer.experts, dtype=torch.int32, device=weights.w13.device)
        return lambda fixed: lambda: self._run(layer, weights, experts, fixed)

    @staticmethod
    def _run(layer: ExpertLayer, weights: LayerWeights, experts: torch.Tensor, fixed: FixedOperands) -> torch.Tensor:
        product = grouped_mm()
        assert product is not None, "asked for before"
        tokens, top_k = fixed.ids.shape
        # E for absent slots, which so come last and past every offset.
        keys = torch.where((fixed.ids < 0) | (fixed.ids >= layer.experts), layer.experts, fixed.ids).flatten()
        ordered, slots = torch.sort(keys, stable=True)
        offsets = torch.searchsorted(ordered, experts, right=True, out_int32=True)
        owner = ordered.clamp(max=layer.experts - 1).long()
        value = product(fixed.hidden[slots // top_k], weights.w13.transpose(1, 2), offs=offsets).float()
        if weights.bias13 is not None:
            value = value + weights.bias13[owner]
        value = _activate(layer, value).to(fixed.hidden.dtype)
        value = product(value, weights.w2.transpose(1, 2), offs=offsets).float()
        if weights.bias2 is not None:
            value = value + weights.bias2[owner]
        value = value * fixed.scale.flatten()[slots, None]
        # Rows past the last offset were never written.
        value = value.masked_fill((ordered >= layer.experts)[:, None], 0.0)
        by_slot = torch.empty_like(value).index_copy_(0, slots, value)
        return by_slot.view(tokens, top_k, layer.hidden).sum(1).to(fixed.hidden.dtype)


class Transformers:
    """transformers' own experts (Mixtral's, or gpt-oss's where the layer is like those), one implementation."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"transformers {implementation}"

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        oai = layer.activation == "swiglu_oai"
        if not layer.gated or layer.bias != oai:
            return "no experts of transformers that the suite knows are of this form"
        if not oai and layer.activation not in ACTIVATIONS:
            return f"Mixtral's experts have no activation {layer.activation}"
        gathered = tokens * layer.top_k * sum(gemm.weight_bytes(1) for gemm in layer.gemms)
        if self.implementation == "batched_mm" and gathered > MAX_GATHERED_BYTES:
            return f"it would copy {gathered / 2**30:.1f} GiB of weights, one expert's for each routed slot"
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        return None

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        make = _gpt_oss if layer.activation == "swiglu_oai" else _mixtral
        experts = make(layer, weights)
        experts.config._experts_implementation = self.implementation
        experts._is_expert_parallel = layer.global_experts != layer.experts
        return lambda fixed: lambda: experts(fixed.hidden, fixed.local_ids, fixed.local_scale)


class TritonKernels:
    """Triton's own MoE kernels. Reported so that their absence is seen; no released version is adapted to."""

    name = "triton_kernels"

    def unavailable(self, layer: ExpertLayer, tokens: int) -> str | None:
        if importlib.util.find_spec("triton_kernels") is None:
            return "triton_kernels is not installed"
        return "triton_kernels is installed, but the suite has no adapter for it"

    def prepare(self, layer: ExpertLayer, weights: LayerWeights) -> Callable[[FixedOperands], Call]:
        raise NotImplementedError(self.unavailable(layer, 1))


def default_peers() -> Sequence[GpuPeer]:
    """Return every peer, in the order in which tables list them."""
    return (TorchGroupedMm(), Transformers("grouped_mm"), Transformers("batched_mm"), TritonKernels())


def grouped_mm() -> Any | None:
    """Return torch's grouped matmul, under its public name or the one before."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def routing_weights(scale: torch.Tensor) -> torch.Tensor:
    """Return weights that sum to one per token."""
    return scale / ordered_sum(scale)


def _activate(layer: ExpertLayer, value: torch.Tensor) -> torch.Tensor:
    if not layer.gated:
        return activate(value, None, layer.activation)
    gate, up = value.chunk(2, dim=-1)
    return activate(gate, up, layer.activation)


def _mixtral(layer: ExpertLayer, weights: LayerWeights) -> Any:
    """Return Mixtral's experts around the very weights given."""
    configuration: Any = importlib.import_module("transformers.models.mixtral")
    modeling: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    config = configuration.MixtralConfig(
        hidden_size=layer.hidden, intermediate_size=layer.intermediate, num_local_experts=layer.experts,
        num_experts_per_tok=min(layer.top_k, layer.experts), hidden_act=ACTIVATIONS[layer.activation],
    )  # fmt: skip
    with torch.device("meta"):
        experts = modeling.MixtralExperts(config)
    experts.gate_up_proj = _parameter(weights.w13)
    experts.down_proj = _parameter(weights.w2)
    return experts


def _gpt_oss(layer: ExpertLayer, weights: LayerWeights) -> Any:
    """Return gpt-oss's experts on a copy of the weights: it wants K before N, and gate and up interleaved."""
    configuration: Any = importlib.import_module("transformers.models.gpt_oss")
    modeling: Any = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    config = configuration.GptOssConfig(
        hidden_size=layer.hidden, intermediate_size=layer.intermediate, num_local_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )  # fmt: skip
    with torch.device("meta"):
        experts = modeling.GptOssExperts(config)
    assert weights.bias13 is not None and weights.bias2 is not None, "asked for before"
    experts.alpha, experts.limit = SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
    experts.gate_up_proj = _parameter(_interleaved(weights.w13, layer).transpose(1, 2).contiguous())
    experts.gate_up_proj_bias = _parameter(_interleaved(weights.bias13, layer))
    experts.down_proj = _parameter(weights.w2.transpose(1, 2).contiguous())
    experts.down_proj_bias = _parameter(weights.bias2)
    return experts


def _interleaved(rows: torch.Tensor, layer: ExpertLayer) -> torch.Tensor:
    """Turn gate rows before up rows, [E, 2I, …], into gate and up in turns."""
    return torch.stack([rows[:, : layer.intermediate], rows[:, layer.intermediate :]], dim=2).flatten(1, 2)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
