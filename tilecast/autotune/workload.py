"""The operands of a measurement: weights in rotation, activations, routing.

What a launch reads is made as cold as in a model, where a layer runs again only after all other layers have:
weights rotate through more memory than the last-level cache holds, and every launch is routed afresh.
Random numbers come from the CPU's generators, so operands have the same values on every device.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tilecast.autotune.draws import routed_ids
from tilecast.autotune.routing_profiles import RoutingProfile, as_profile
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.sparsity import has_zeros, sparse_rows, sparse_weights
from tilecast.autotune.stacks import quantized_stack
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel, stack_bytes
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertGemm, TileConfig

ROTATION = 4
"""Weights rotate through this many times the last-level cache, so that none of it is still there."""
MAX_COPIES = 64
MAX_ROTATION_BYTES = 2 << 30
"""Bounds of the extra copies of a weight stack: tiny layers stay in the cache in reality, too."""
POOL_ELEMENTS = 1 << 22
"""Normal deviates generated once per stack; weights are slices of them, as memory copies are cheap."""
MAX_SORTED_BYTES = 2 << 30
"""Bound of the sorted rows that are kept: unlike rows in slot order, every routing needs its own."""
SORTED = "sorted"
"""The order of the intermediate in which row p belongs to slot `route.slots[p]`; see `Kernel.order`."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one launch gets besides the weights.

    `rows` is [T, H] for up and [T·k, I] for down, in the layer's dtype, in the order that the kernel reads;
    `topk_weights` float32 [T, k]. All are on one device.
    """

    rows: torch.Tensor
    route: ExpertLayout
    topk_weights: torch.Tensor


def device_of(environment: Environment) -> torch.device:
    """Return the device of this process that `environment` is about. Raises DeviceError if there is none."""
    if environment.device_kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"{environment.device} is to be measured, but PyTorch sees no GPU here; run on that device")
    return torch.device("cuda", torch.cuda.current_device())


def synchronise(device: torch.device) -> None:
    """Wait for `device`, so that what a launch did wrong is raised here and not by something later."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def normal_stack(
    shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return a tensor of normal deviates, none of them a stretch of zeros, as fast as memory can be filled."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1)
    size = min(POOL_ELEMENTS, flat.numel())
    pool = torch.empty(size).normal_(0, std, generator=generator).to(dtype).to(out.device)
    start = 0
    while start < flat.numel():
        # Each stretch begins elsewhere in the pool, so that no two experts hold the same rows.
        offset = int(torch.randint(size, (1,), generator=generator)) if start else 0
        length = min(size - offset, flat.numel() - start)
        flat[start : start + length] = pool[offset : offset + length]
        start += length
    return out


def weight_stack(gemm: ExpertGemm, seed: int, device: torch.device | None = None) -> Weights:
    """Return random plain weights of a GEMM, scaled so that activations keep their size, in its weight format."""
    std = 1 / math.sqrt(gemm.k)
    if gemm.layer.weight_format != "dense":
        return quantized_stack(gemm, std, seed, device)
    return normal_stack((gemm.layer.experts, gemm.n, gemm.k), TORCH_DTYPES[gemm.layer.dtype], std, seed, device)


def launch(kernel: Kernel, config: TileConfig, weights: GemmWeights, inputs: Inputs, out: torch.Tensor) -> None:
    """Run one GEMM once, as the engine does."""
    if weights.gemm.name == "up":
        kernel.up(config, inputs.rows, weights, inputs.route, out)
    else:
        kernel.down(config, inputs.rows, weights, inputs.route, inputs.topk_weights, out)


def poisoned_output(
    gemm: ExpertGemm, tokens: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Return what a launch writes into, full of NaN: [T·k, I] for up, [T, H] for down."""
    layer = gemm.layer
    shape = (tokens * layer.top_k, layer.intermediate) if gemm.name == "up" else (tokens, layer.hidden)
    return torch.full(shape, math.nan, dtype=dtype or TORCH_DTYPES[layer.dtype], device=device)


def present_slots(route: ExpertLayout) -> torch.Tensor:
    """Return the slots (int64 [present]) of this rank's experts, in the sorted order."""
    return route.slots[: int(route.offsets[-1])].long()


def in_order(gemm: ExpertGemm, inputs: Inputs, order: str) -> Inputs:
    """Return the operands, given in slot order, for a config that wants `order`.

    For `sorted` the route is sorted now, where it would be on first use, so that no launch has to wait for it;
    rows of down that belong to no slot are NaN.
    """
    if order != SORTED:
        return inputs
    slots = present_slots(inputs.route)
    if gemm.name == "up":
        return inputs
    rows = torch.full_like(inputs.rows, math.nan)
    rows[: len(slots)] = inputs.rows[slots]
    return replace(inputs, rows=rows)


def in_slot_order(gemm: ExpertGemm, out: torch.Tensor, route: ExpertLayout, order: str) -> torch.Tensor:
    """Return the output of a config of that order, with row s for slot s where it is the intermediate."""
    if order != SORTED or gemm.name == "down":
        return out
    slots = present_slots(route)
    rows = poisoned_output(gemm, route.tokens, out.dtype, out.device)
    rows[slots] = out[: len(slots)]
    return rows


class Workload:
    """Builds and keeps operands; one GEMM at a time is held in memory, see `release`."""

    def __init__(
        self,
        environment: Environment,
        *,
        routing: str | RoutingProfile = "uniform",
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Measure for `environment` under a routing profile; operands follow from `seed` alone.

        They are on `device`, by default the environment's. Raises DeviceError if that is not here, InputError for
        an unknown profile.
        """
        self.environment = environment
        self.routing = as_profile(routing)
        self.seed = seed
        self.device = device_of(environment) if device is None else device
        self._stacks: OrderedDict[tuple[str, str, int], GemmWeights] = OrderedDict()
        self._bytes: dict[tuple[str, str, int], int] = {}
        self._gemm: ExpertGemm | None = None
        self._memory_bytes = 0
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._sorted: OrderedDict[tuple[int, int], Inputs] = OrderedDict()

    def copies(self, gemm: ExpertGemm) -> int:
        """Return how many copies of the weights it takes to rotate through `ROTATION` times the cache."""
        # Of a copy a kernel may read the live neurons alone; of up at least the gates, a half.
        dead = self._dead(gemm) or 0.0
        read = max(1 - dead, 0.05 if gemm.name == "down" else 0.5)
        return weight_copies(gemm, math.ceil(self.environment.llc_bytes / read))

    def weights(self, gemm: ExpertGemm, kernel: Kernel, layout: str, copy: int = 0) -> GemmWeights:
        """Return one copy of the weights in a layout, packed on first use."""
        self._hold(gemm)
        owner = "" if layout == PLAIN else kernel.name
        key = (owner, layout, copy)
        if key in self._stacks:
            self._stacks.move_to_end(key)
            return self._stacks[key]
        # Before and not after: what is dropped, what is packed and the result would stand there all at once.
        needed = stack_bytes(kernel, gemm, layout)
        self._make_room(gemm, needed)
        self._bytes[key] = needed
        made = self._plain(gemm, copy) if layout == PLAIN else kernel.pack(self._source(gemm, copy), layout)
        self._stacks[key] = made
        return made

    def fits(self, gemm: ExpertGemm, stacks: Sequence[int]) -> bool:
        """Whether stacks of so many bytes each are kept in memory at once; a single one always is."""
        self._hold(gemm)
        return len(stacks) <= 1 or sum(stacks) <= self._room(gemm)

    def plain(self, gemm: ExpertGemm) -> GemmWeights:
        """Return the weights as checkpoints hold them, the source of copy 0 of every layout."""
        self._hold(gemm)
        return self._source(gemm, 0)

    def inputs(self, gemm: ExpertGemm, tokens: int, seed: int, order: str = "slot") -> Inputs:
        """Return the operands of one launch; the same seed gives the same ones, another seed other routing.

        Rows of down are in `order`; whichever it is, what is sorted on first use has been.
        """
        self._hold(gemm)
        key = (tokens, seed)
        if key not in self._inputs:
            layer = gemm.layer
            ids = routed_ids(layer, tokens, hash_seed(self.seed, tokens, seed), self.routing).to(self.device)
            self._inputs[key] = Inputs(
                rows=self._rows(gemm, tokens, seed),
                route=sort_slots(ids, layer.experts),
                topk_weights=_topk_weights(tokens, layer.top_k, hash_seed(self.seed, 7, seed)).to(self.device),
            )
        if order != SORTED:
            return self._inputs[key]
        if key not in self._sorted:
            made = in_order(gemm, self._inputs[key], order)
            if gemm.name == "up":
                return made
            most = max(1, MAX_SORTED_BYTES // max(1, made.rows.nbytes))
            while len(self._sorted) >= most:
                self._sorted.popitem(last=False)
            self._sorted[key] = made
        return self._sorted[key]

    def release(self) -> None:
        """Drop every operand."""
        self._stacks.clear()
        self._bytes.clear()
        self._inputs.clear()
        self._sorted.clear()
        self._gemm = None

    def _hold(self, gemm: ExpertGemm) -> None:
        if self._gemm != gemm:
            self.release()
            self._gemm = gemm
            # Asked before anything is made: what is free on a GPU includes none of the stacks later on.
            self._memory_bytes = _memory_bytes(self.device)

    def _rows(self, gemm: ExpertGemm, tokens: int, seed: int) -> torch.Tensor:
        # Activations are small and just written by the layer before: one tensor per token count serves all.
        for (held, _), inputs in self._inputs.items():
            if held == tokens:
                return inputs.rows
        rows = tokens if gemm.name == "up" else tokens * gemm.layer.top_k
        dtype = TORCH_DTYPES[gemm.layer.dtype]
        made = normal_stack((rows, gemm.k), dtype, 1.0, hash_seed(self.seed, 3, seed), self.device)
        dead = self._dead(gemm)
        return made if dead is None else sparse_rows(made, gemm, dead, hash_seed(self.seed, 5, seed))

    def _dead(self, gemm: ExpertGemm) -> float | None:
        """Return the share of dead neurons, None where the profile says nothing of it or the layer has none."""
        return self.routing.sparsity if has_zeros(gemm) else None

    def _source(self, gemm: ExpertGemm, copy: int) -> GemmWeights:
        # Built again rather than kept where no candidate runs on plain weights: packing is rare, memory is not.
        return self._stacks.get(("", PLAIN, copy)) or self._plain(gemm, copy)

    def _plain(self, gemm: ExpertGemm, copy: int) -> GemmWeights:
        dtype = TORCH_DTYPES[gemm.layer.dtype]
        seed = hash_seed(self.seed, 11, copy)
        data = weight_stack(gemm, seed, self.device)
        if (dead := self._dead(gemm)) is not None and isinstance(data, torch.Tensor):
            data = sparse_weights(data, gemm, dead)
        bias = normal_stack(data.shape[:2], dtype, 0.5, seed + 1, self.device) if gemm.layer.bias else None
        return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=bias)

    def _make_room(self, gemm: ExpertGemm, needed: int) -> None:
        while self._stacks and sum(self._bytes[key] for key in self._stacks) + needed > self._room(gemm):
            self._stacks.popitem(last=False)

    def _room(self, gemm: ExpertGemm) -> int:
        """Return how many bytes of stacks may stand in memory."""
        # One that is made stands beside its source, plain weights, until it is.
        return self._memory_bytes // 2 - gemm.weight_bytes()


def weight_copies(gemm: ExpertGemm, llc_bytes: int) -> int:
    """Return how many copies of a GEMM's weights rotate past a last-level cache of `llc_bytes`."""
    stack = gemm.weight_bytes()
    wanted = math.ceil(ROTATION * llc_bytes / stack)
    return max(1, min(wanted, MAX_ROTATION_BYTES // stack, MAX_COPIES))


def _topk_weights(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, top_k, generator=generator).add_(0.1)
    return weights / weights.sum(1, keepdim=True)


def _memory_bytes(device: torch.device) -> int:
    """Return what operands may use: the whole memory of a machine, what is left of a GPU's."""
    if device.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_memory(gemm: ExpertGemm, device: torch.device | None = None, *, packed_bytes: int | None = None) -> None:
    """Raise DeviceError if the weights of `gemm` do not fit into the device's memory in two layouts.

    `packed_bytes` are those of the largest packed one, by default as many as of the plain one.
    """
    # A packed layout stands beside the plain weights while both race.
    plain, there = gemm.weight_bytes(), _memory_bytes(device or torch.device("cpu"))
    needed = plain + (plain if packed_bytes is None else packed_bytes)
    if needed > there:
        where = "this machine has" if device is None or device.type == "cpu" else f"{device} has left"
        raise DeviceError(
            f"measuring {gemm.layer.label} {gemm.name} needs {needed / 2**30:.1f} GiB for weights in two layouts, "
            f"{where} {there / 2**30:.1f} GiB; tune a smaller share (--tp, --ep) or on a larger machine"
        )
