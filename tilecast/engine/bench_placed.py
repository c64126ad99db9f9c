"""A layer's experts on two devices in a benchmark: the whole call, either share of it, and what crosses.

A share is timed as the same call with the other share's ids absent: what it needs for itself, ways included. On one
device the two of them add up, less the parts of a call that both have; with a GPU they run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from tilecast.engine.bench_contestant import Contestant
from tilecast.engine.bench_result import PlacedPoint
from tilecast.engine.peers import Bound, LayerWeights, Prepared
from tilecast.engine.placed_choice import Shares
from tilecast.engine.placement import PlacedExperts, place_experts
from tilecast.engine.streaming import stream_from
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import UsageError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import DTYPES, ExpertLayer

FAR = torch.device("cpu")
ALONE, BOTH, NEAR_SHARE, FAR_SHARE = "one device", "two devices", "near share", "far share"


class BenchedPlacement:
    """A layer's experts on two devices, prepared once for all token counts; the first ones are near.

    Which ones does not matter: a benchmark routes to all alike.
    """

    def __init__(self, shares: Shares, weights: LayerWeights, runtime: Runtime, device: torch.device) -> None:
        """Copy the weights to where they are to be. `runtime` and `device` are the near ones.

        Raises UsageError for a layer of which other ranks have experts, and what `place_experts` raises.
        """
        layer = shares.layer
        if layer.experts != layer.global_experts:
            raise UsageError(f"{layer.label} is one rank's share of a layer; only whole layers are placed")
        far = runtime if device.type == FAR.type else runtime.with_environment(cpu_environment())
        self.shares, self.device = shares, device
        self.stream_from = stream_from(runtime, far, shares, device)
        near = 0 if shares.near is None else shares.near.experts
        self.experts: PlacedExperts = place_experts(
            weights.w13, weights.w2, top_k=layer.top_k, near_experts=range(near), near=device, far=FAR,
            activation=layer.activation, gated=layer.gated, bias13=weights.bias13, bias2=weights.bias2,
            dtype=TORCH_DTYPES[layer.dtype], near_runtime=runtime, far_runtime=far, stream_from=self.stream_from,
        )  # fmt: skip

    def enter(self, alone: Prepared) -> list[Contestant]:
        """Return the contestants: the layer on one device by the same clock, on two, and the shares there are."""
        sides = ((NEAR_SHARE, self.shares.near, True), (FAR_SHARE, self.shares.far, False))
        return [
            Contestant(name=ALONE, bind=alone, by_host=True),
            Contestant(name=BOTH, bind=self._bind, by_host=True),
            *(
                Contestant(name=name, bind=partial(self._bind_share, near), share=True, by_host=True)
                for name, part, near in sides
                if part is not None
            ),
        ]

    def point(self, contestants: Sequence[Contestant], tokens: int, ids: Sequence[torch.Tensor]) -> PlacedPoint:
        """Return what the contestants of `enter` took; `ids` are the routings that they were timed with."""
        timings = {contestant.name: contestant.timing() for contestant in contestants}
        streamed = self.stream_from is not None and tokens >= self.stream_from
        crossing = [
            crossing_bytes(self.shares.layer, one, len(self.experts.near_experts), streamed=streamed) for one in ids
        ]
        held = {experts: part.weight_bytes for experts, part in self.experts.shares}
        return PlacedPoint(
            near_experts=len(self.experts.near_experts),
            near=str(self.experts.near),
            far=str(self.experts.far),
            near_bytes=held.get(self.experts.near_experts, 0),
            far_bytes=held.get(self.experts.far_experts, 0),
            crossing_bytes=sum(crossing) / len(crossing),
            stream_from=self.stream_from,
            alone=timings[ALONE],
            both=timings[BOTH],
            near_share=timings.get(NEAR_SHARE),
            far_share=timings.get(FAR_SHARE),
        )

    def _bind(self, hidden: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> Bound:
        return partial(self.experts, hidden, ids, scale)

    def _bind_share(self, near: bool, hidden: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> Bound:
        own = (ids < len(self.experts.near_experts)) == near
        return partial(self.experts, hidden, torch.where(own, ids, torch.full_like(ids, -1)), scale)


def crossing_bytes(layer: ExpertLayer, ids: torch.Tensor, near: int, *, streamed: bool) -> int:
    """Return the bytes that go between the devices in a call with this routing [T, k], the first `near` experts near.

    Ids and routing weights in any case; then rows with a far slot, and for every far slot its float32 result and its
    place; where weights are sent, those of the far experts in use.
    """
    if near == layer.experts:
        return 0
    far = (ids >= near) & (ids < layer.experts)
    asked = ids.numel() * (ids.element_size() + DTYPES["fp32"])
    if streamed:
        active = int(torch.unique(ids[far]).numel())
        return asked + sum(gemm.weight_bytes(active) for gemm in layer.gemms)
    rows, slots = int(far.any(dim=1).sum()), int(far.sum())
    return asked + layer.hidden * (rows * DTYPES[layer.dtype] + slots * DTYPES["fp32"]) + slots * torch.int64.itemsize
