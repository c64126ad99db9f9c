"""The operands of a measurement: weights in rotation, activations, routing.

What a launch reads is made as cold as in a model, where a layer runs again only after all other layers have:
weights rotate through more memory than the last-level cache holds, and every launch is routed afresh.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from dataclasses import dataclass

import torch

from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels import sort_slots
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, TORCH_DTYPES, GemmWeights, Kernel
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

ROTATION = 4
"""Weights rotate through this many times the last-level cache, so that none of it is still there."""
MAX_COPIES = 64
MAX_ROTATION_BYTES = 2 << 30
"""Bounds of the extra copies of a weight stack: tiny layers stay in the cache in reality, too."""
POOL_ELEMENTS = 1 << 22
"""Normal deviates generated once per stack; weights are slices of them, as memory copies are cheap."""
DRAWS = 32
"""Routing draws tried for one with the typical number of active experts."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one launch gets besides the weights.

    `rows` is [T, H] for up and [T·k, I] for down, in the layer's dtype; `topk_weights` float32 [T, k].
    """

    rows: torch.Tensor
    route: ExpertLayout
    topk_weights: torch.Tensor


def typical_active_experts(layer: ExpertLayer, tokens: int) -> int:
    """Return the expected number of this rank's experts that uniform routing of `tokens` reaches, at least 1."""
    missed = (1 - layer.top_k / layer.global_experts) ** tokens
    return max(1, round(layer.experts * (1 - missed)))


def uniform_ids(layer: ExpertLayer, tokens: int, seed: int) -> torch.Tensor:
    """Return int32 [T, k]: distinct experts per token out of all global ones, each as likely.

    Among a few draws, the one whose number of active local experts is nearest to the expected one is taken:
    the weights read would otherwise differ between launches by more than configs do. So a rank of an
    expert-parallel layer has at least one slot to work on wherever a draw gave it one.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = typical_active_experts(layer, tokens)
    best, best_gap = torch.empty(0), math.inf
    for _ in range(DRAWS):
        scores = torch.rand(tokens, layer.global_experts, generator=generator)
        ids = scores.topk(layer.top_k, dim=1, sorted=False).indices
        active = int((torch.bincount(ids.flatten(), minlength=layer.global_experts)[: layer.experts] > 0).sum())
        gap = abs(active - wanted)
        if gap < best_gap:
            best, best_gap = ids, gap
        if gap == 0:
            break
    if layer.experts < layer.global_experts and not bool((best < layer.experts).any()):
        best[0, 0] = seed % layer.experts
    return best.to(torch.int32)


def normal_stack(shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int) -> torch.Tensor:
    """Return a tensor of normal deviates, none of them a stretch of zeros, as fast as memory can be filled."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    size = min(POOL_ELEMENTS, flat.numel())
    pool = torch.empty(size).normal_(0, std, generator=generator).to(dtype)
    start = 0
    while start < flat.numel():
        # Each stretch begins elsewhere in the pool, so that no two experts hold the same rows.
        offset = int(torch.randint(size, (1,), generator=generator)) if start else 0
        length = min(size - offset, flat.numel() - start)
        flat[start : start + length] = pool[offset : offset + length]
        start += length
    return out


def launch(kernel: Kernel, config: TileConfig, weights: GemmWeights, inputs: Inputs, out: torch.Tensor) -> None:
    """Run one GEMM once, as the engine does."""
    if weights.gemm.name == "up":
        kernel.up(config, inputs.rows, weights, inputs.route, out)
    else:
        kernel.down(config, inputs.rows, weights, inputs.route, inputs.topk_weights, out)


def poisoned_output(gemm: ExpertGemm, tokens: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return what a launch writes into, full of NaN: [T·k, I] for up, [T, H] for down."""
    layer = gemm.layer
    shape = (tokens * layer.top_k, layer.intermediate) if gemm.name == "up" else (tokens, layer.hidden)
    return torch.full(shape, math.nan, dtype=dtype or TORCH_DTYPES[layer.dtype])


class Workload:
    """Builds and keeps operands; one GEMM at a time is held in memory, see `release`."""

    def __init__(self, environment: Environment, *, routing: str = "uniform", seed: int = 0) -> None:
        """Measure for `environment` under a routing profile; operands follow from `seed` alone."""
        self.environment = environment
        self.routing = routing
        self.seed = seed
        self._stacks: OrderedDict[tuple[str, str, int], GemmWeights] = OrderedDict()
        self._gemm: ExpertGemm | None = None
        self._inputs: dict[tuple[int, int], Inputs] = {}

    def copies(self, gemm: ExpertGemm) -> int:
        """Return how many copies of the weights it takes to rotate through `ROTATION` times the cache."""
        stack = gemm.weight_bytes()
        wanted = math.ceil(ROTATION * self.environment.llc_bytes / stack)
        affordable = MAX_ROTATION_BYTES // stack
        return max(1, min(wanted, affordable, MAX_COPIES))

    def weights(self, gemm: ExpertGemm, kernel: Kernel, layout: str, copy: int = 0) -> GemmWeights:
        """Return one copy of the weights in a layout, packed on first use."""
        self._hold(gemm)
        owner = "" if layout == PLAIN else kernel.name
        key = (owner, layout, copy)
        if key in self._stacks:
            self._stacks.move_to_end(key)
            return self._stacks[key]
        # Before and not after: what is dropped, what is packed and the result would stand there all at once.
        self._make_room(gemm)
        made = self._plain(gemm, copy) if layout == PLAIN else kernel.pack(self._source(gemm, copy), layout)
        self._stacks[key] = made
        return made

    def plain(self, gemm: ExpertGemm) -> GemmWeights:
        """Return the weights as checkpoints hold them, the source of copy 0 of every layout."""
        self._hold(gemm)
        return self._source(gemm, 0)

    def inputs(self, gemm: ExpertGemm, tokens: int, seed: int) -> Inputs:
        """Return the operands of one launch; the same seed gives the same ones, another seed other routing."""
        self._hold(gemm)
        key = (tokens, seed)
        if key not in self._inputs:
            layer = gemm.layer
            route = sort_slots(uniform_ids(layer, tokens, hash_seed(self.seed, tokens, seed)), layer.experts)
            self._inputs[key] = Inputs(
                rows=self._rows(gemm, tokens, seed),
                route=route,
                topk_weights=_topk_weights(tokens, layer.top_k, hash_seed(self.seed, 7, seed)),
            )
        return self._inputs[key]

    def release(self) -> None:
        """Drop every operand."""
        self._stacks.clear()
        self._inputs.clear()
        self._gemm = None

    def _hold(self, gemm: ExpertGemm) -> None:
        if self._gemm != gemm:
            self.release()
            self._gemm = gemm

    def _rows(self, gemm: ExpertGemm, tokens: int, seed: int) -> torch.Tensor:
        # Activations are small and just written by the layer before: one tensor per token count serves all.
        for (held, _), inputs in self._inputs.items():
            if held == tokens:
                return inputs.rows
        rows = tokens if gemm.name == "up" else tokens * gemm.layer.top_k
        return normal_stack((rows, gemm.k), TORCH_DTYPES[gemm.layer.dtype], 1.0, hash_seed(self.seed, 3, seed))

    def _source(self, gemm: ExpertGemm, copy: int) -> GemmWeights:
        # Built again rather than kept where no candidate runs on plain weights: packing is rare, memory is not.
        return self._stacks.get(("", PLAIN, copy)) or self._plain(gemm, copy)

    def _plain(self, gemm: ExpertGemm, copy: int) -> GemmWeights:
        dtype = TORCH_DTYPES[gemm.layer.dtype]
        seed = hash_seed(self.seed, 11, copy)
        data = normal_stack((gemm.layer.experts, gemm.n, gemm.k), dtype, 1 / math.sqrt(gemm.k), seed)
        bias = normal_stack((gemm.layer.experts, gemm.n), dtype, 0.5, seed + 1) if gemm.layer.bias else None
        return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=bias)

    def _make_room(self, gemm: ExpertGemm) -> None:
        # Packed data is opaque; every layout holds the same elements, so that the plain size stands for it.
        # One more is about to be made, and stands beside its source until it is.
        room = max(1, _memory_bytes() // 2 // gemm.weight_bytes() - 1)
        while len(self._stacks) >= room:
            self._stacks.popitem(last=False)


def hash_seed(*parts: int) -> int:
    """Return one seed made of several numbers; near numbers give unrelated seeds."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ (part & 0xFFFFFFFF)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
    return value >> 1


def _topk_weights(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, top_k, generator=generator).add_(0.1)
    return weights / weights.sum(1, keepdim=True)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(gemm: ExpertGemm) -> None:
    """Raise DeviceError if the weights of `gemm` do not fit into memory in two layouts."""
    # A packed layout stands beside the plain weights while both race.
    needed, there = 2 * gemm.weight_bytes(), _memory_bytes()
    if needed > there:
        raise DeviceError(
            f"measuring {gemm.layer.label} {gemm.name} needs {needed / 2**30:.1f} GiB for weights in two layouts, "
            f"this machine has {there / 2**30:.1f} GiB; tune a smaller share (--tp, --ep) or on a larger machine"
        )
