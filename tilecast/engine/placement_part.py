"""One device's share of a placed layer: its experts' weights, and every routed slot's result by itself.

The kernels of a layer add a token's slots inside the down GEMM. Here each slot is a token of its own for that GEMM
(top-k 1), so that its float32 result comes out as it was before the addition, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tilecast.engine import recording
from tilecast.engine.experts import stored_weights
from tilecast.engine.operands import check_device, place_of
from tilecast.engine.table_index import Entry
from tilecast.engine.table_runtime import Runtime
from tilecast.kernels import sort_slots
from tilecast.kernels.gpu.checks import TRITON_TYPES
from tilecast.kernels.gpu.launch import device_facts
from tilecast.kernels.gpu.moe import combine_build, launch_combine
from tilecast.kernels.gpu.sorting import DeviceLayout
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights, numerics_class
from tilecast.kernels.stacks import Weights, tensors_of
from tilecast.problem import ExpertLayer


@dataclass(frozen=True, kw_only=True)
class PlainExperts:
    """Plain weights of some experts, on one device, as `prepare_experts` takes them."""

    w13: Weights
    w2: Weights
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that they consist of, [E, …] each: of w13, of w2, biases."""
        biases = (bias for bias in (self.bias13, self.bias2) if bias is not None)
        return (*tensors_of(self.w13), *tensors_of(self.w2), *biases)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PlainExperts:
        """Return weights of the same formats from tensors in the order of `tensors`."""
        count = len(tensors_of(self.w13))
        stacks, biases = tensors[: 2 * count], tensors[2 * count :]
        return PlainExperts(
            w13=_stack(self.w13, stacks[:count]), w2=_stack(self.w2, stacks[count:]),
            bias13=biases[0] if biases else None, bias2=biases[1] if biases else None,
        )  # fmt: skip

    def picked(self, experts: Sequence[int], device: torch.device) -> PlainExperts:
        """Return contiguous copies of some experts on a device; nothing else is copied there."""
        return self.with_tensors([_pick(tensor.detach(), experts, device) for tensor in self.tensors])


def _stack(form: Weights, tensors: Sequence[torch.Tensor]) -> Weights:
    if isinstance(form, torch.Tensor):
        return tensors[0]
    codes, scales, *zeros = tensors
    return replace(form, codes=codes, scales=scales, zeros=zeros[0] if zeros else None)


def _pick(tensor: torch.Tensor, experts: Sequence[int], device: torch.device) -> torch.Tensor:
    picked = torch.empty((len(experts), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
    for place, expert in enumerate(experts):
        picked[place].copy_(tensor[expert])
    return picked


class Part:
    """Some experts of a layer on one device, numbered from 0 in ascending order of their ids."""

    def __init__(self, layer: ExpertLayer, experts: Sequence[int], runtime: Runtime, plain: PlainExperts) -> None:
        """Store the plain weights of these `experts` of the whole `layer` as the runtime's table wants them.

        Raises DeviceError if no kernel there can run them.
        """
        check_device(plain.w13, runtime)
        self.layer = replace(layer, experts=len(experts), global_experts=layer.experts)
        self.runtime = runtime
        anchor = runtime.anchor(self.layer)
        self._up = stored_weights(self.layer.up, plain.w13, plain.bias13, anchor.up_kernel, anchor.up)
        down = stored_weights(self.layer.down, plain.w2, plain.bias2, anchor.down_kernel, anchor.down)
        self._apart = slots_apart(self._up, down)
        self._places = _places(layer.experts, experts).to(plain.w13.device)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights as they are stored, padding and what a layout holds besides included."""
        return int(self._up.data.nbytes) + int(self._apart[1].data.nbytes)

    def plain(self) -> PlainExperts:
        """Return the weights as they were given, bit for bit."""
        anchor, up, down = self.runtime.anchor(self.layer), self._up, self._apart[1]
        up = up if up.layout == PLAIN else anchor.up_kernel.unpack(up)
        down = down if down.layout == PLAIN else anchor.down_kernel.unpack(down)
        return PlainExperts(w13=up.data, w2=down.data, bias13=up.bias, bias2=down.bias)

    def local_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return global expert ids, on this part's device, as int32 ids of its own experts; -1 for all others."""
        # Clamped first, so that no id beyond the table is looked up; both ends of it say absent.
        at = topk_ids.clamp(-1, self._places.shape[0] - 2) + 1
        return self._places.index_select(0, at.flatten()).view(topk_ids.shape)

    def entry(self, tokens: int, ids: torch.Tensor) -> Entry:
        """Return what runs a batch of so many tokens, and record it with its own ids [T, k]."""
        entry = self.runtime.lookup(self.layer, tokens)
        recorder = recording.active()
        if recorder is not None:
            recorder.count(self.layer, ids, hit=entry.hit, place=place_of(self._up.data))
        return entry

    def run(self, entry: Entry, rows: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Run rows [T, H] with own ids and weights [T, k] into out [T·k, H], rows of absent slots zero.

        k is the layer's, or 1 where slots come apart.
        """
        up = self._up if ids.shape[1] == self.layer.top_k else self._apart[0]
        run_slots(entry, up, self._apart[1], rows, ids, scales, out)


def run_slots(
    entry: Entry,
    up: GemmWeights,
    down: GemmWeights,
    rows: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Run both GEMMs of rows [T, H]: every slot's weighted result into out [T·k, H], absent ones zero.

    `up` is of the ids' top-k, `down` of top-k 1; `out` has the dtype of `scales`, in which slots are added.
    """
    layer = up.gemm.layer
    layout = sort_slots(ids, layer.experts)
    intermediate = torch.empty((ids.numel(), layer.intermediate), dtype=rows.dtype, device=rows.device)
    entry.up_kernel.up(entry.up, rows, up, layout, intermediate)
    entry.down_kernel.down(entry.down, intermediate, down, _apart(layout), scales.view(-1, 1), out)


def _apart(layout: ExpertLayout) -> ExpertLayout:
    """Return the layout in which each slot is a token of its own; slots keep their numbers."""
    if layout.top_k == 1:
        return layout
    ids = layout.ids.view(-1, 1)
    if isinstance(layout, DeviceLayout):
        return DeviceLayout(ids, layout.experts)
    return replace(layout, tokens=layout.tokens * layout.top_k, top_k=1, ids=ids)


def slots_apart(up: GemmWeights, down: GemmWeights) -> tuple[GemmWeights, GemmWeights]:
    """Return the same stored weights as those of a layer with top-k 1."""
    layer = replace(up.gemm.layer, top_k=1)
    return replace(up, gemm=layer.up, plans={}), replace(down, gemm=layer.down, plans={})


def _places(experts: int, chosen: Sequence[int]) -> torch.Tensor:
    """Return each id's place among the chosen ones, or -1: [experts + 2], ids from -1 to `experts`."""
    found = [-1] * (experts + 2)
    for place, expert in enumerate(chosen):
        found[expert + 1] = place
    # Made from integers of 32 bits, the kernels' own for ids.
    return torch.tensor(found).int()


def add_slots(slots: torch.Tensor, layer: ExpertLayer, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Add the results [T·k, H] of each token's slots in slot order into out [T, H], with one rounding."""
    if slots.is_cuda:
        launch_add(slots, layer, ids, out)
        return
    by_token = slots.view(*ids.shape, -1)
    total = by_token[:, 0]
    for place in range(1, ids.shape[1]):
        total = total + by_token[:, place]
    out.copy_(total)


def launch_add(slots: torch.Tensor, layer: ExpertLayer, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Do on a GPU what `add_slots` does, in one launch in place of one for each slot."""
    build = combine_build(layer.down, TRITON_TYPES[out.dtype], device_facts(out.device)[0])
    launch_combine(build, slots, DeviceLayout(ids, layer.experts), out)


def classes_of(runtime: Runtime, layer: ExpertLayer) -> tuple[str, str]:
    """Return the numerics classes of a layer's up and down GEMM: experts of equal ones have equal bits."""
    entry, here = runtime.anchor(layer), runtime.environment
    return (
        numerics_class(entry.up_kernel, layer.up, entry.up, here),
        numerics_class(entry.down_kernel, layer.down, entry.down, here),
    )
