"""Far experts' weights sent near a chunk at a time, and run there: what many tokens are worth.

Two chunks have room on the near device, so that one is copied while the other runs; all layers of one shape share that
room. Only experts that have rows are sent.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch

from tilecast.engine.functional import plain_entry
from tilecast.engine.placement_part import PlainExperts, run_slots
from tilecast.engine.placement_transfer import Transfer
from tilecast.engine.table_runtime import Runtime
from tilecast.kernels import sort_slots
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertLayer

CHUNK_BYTES = 64 << 20
"""Weights of a chunk, but one expert at least: a copy of this takes longer than the launches of a chunk's kernels."""
ROOMS = 2


class Ring:
    """Room for two chunks of experts on the near device, with each its event that says when it may be written again."""

    def __init__(self, near: torch.device, like: Sequence[torch.Tensor], experts: int) -> None:
        """Allocate room for so many experts of tensors [E, …] in each place."""
        with torch.inference_mode(False):
            # Zeros, as kernels may look at the codes of all experts, those of none included.
            self.rooms = [
                [torch.zeros((experts, *part.shape[1:]), dtype=part.dtype, device=near) for part in like]
                for _ in range(ROOMS)
            ]
        self.free: list[torch.cuda.Event | None] = [None] * ROOMS
        self.lock = threading.Lock()


_Key: TypeAlias = tuple[torch.device, int, tuple[tuple[torch.Size, torch.dtype], ...]]
_rings: WeakValueDictionary[_Key, Ring] = WeakValueDictionary()


def _ring(near: torch.device, parts: Sequence[torch.Tensor], experts: int) -> Ring:
    key = (near, experts, tuple((part.shape[1:], part.dtype) for part in parts))
    found = _rings.get(key)
    if found is None:
        found = _rings[key] = Ring(near, parts, experts)
    return found


class WeightStream:
    """The far experts of one layer, plain in host memory, to be run on the near device."""

    def __init__(
        self, layer: ExpertLayer, tuned: ExpertLayer, runtime: Runtime, transfer: Transfer, plain: PlainExperts
    ) -> None:
        """Keep plain weights of `layer`, the far share; they run by the near runtime's entries for `tuned`."""
        self._transfer, self._runtime, self._tuned, self._plain = transfer, runtime, tuned, plain
        each = sum(tensor[0].nbytes for tensor in plain.tensors)
        self.chunk = max(1, min(layer.experts, CHUNK_BYTES // each))
        self._ring = _ring(transfer.near, plain.tensors, self.chunk)
        self._experts = layer.experts
        self._layer = replace(layer, experts=self.chunk, top_k=1)

    def run(self, rows: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor) -> None:
        """Run near rows [T, H] by the far share's ids [T, k], on the host, into their rows of near slots [T·k, H].

        scales [T, k] are near.
        """
        layout = sort_slots(ids, self._experts)
        bounds = layout.offsets.tolist()
        used = [expert for expert, (begin, end) in enumerate(pairwise(bounds)) if end > begin]
        if not used:
            return
        entry = plain_entry(self._runtime, self._tuned, layout.tokens)
        where = layout.slots[: bounds[-1]].long()
        own = torch.tensor([place % self.chunk for place in range(len(used))]).int()
        counts = torch.tensor([bounds[expert + 1] - bounds[expert] for expert in used])
        send, stage = self._transfer.send, self._transfer.stage
        near_where, near_ids = send(stage("slots", where)), send(stage("chunk ids", own.repeat_interleave(counts)))
        with self._ring.lock:
            for number, first in enumerate(range(0, len(used), self.chunk)):
                chosen, room = used[first : first + self.chunk], number % ROOMS
                part = slice(bounds[chosen[0]], bounds[chosen[-1] + 1])
                at = near_where[part]
                up, down = self._arrived(room, chosen)
                out = torch.empty((at.shape[0], rows.shape[1]), dtype=slots.dtype, device=slots.device)
                weights = scales.flatten().index_select(0, at)
                chunk_rows = rows.index_select(0, at // layout.top_k)
                run_slots(entry, up, down, chunk_rows, near_ids[part].view(-1, 1), weights.view(-1, 1), out)
                self._ring.free[room] = self._transfer.mark()
                slots.index_copy_(0, at, out)

    def _arrived(self, room: int, chosen: Sequence[int]) -> tuple[GemmWeights, GemmWeights]:
        """Send the weights of some experts into a room and return them as weights of a layer of that many."""
        tensors = self._ring.rooms[room]
        pairs = [
            (to[start : start + len(run)], source[run[0] : run[-1] + 1])
            for start, run in _runs(chosen)
            for to, source in zip(tensors, self._plain.tensors, strict=True)
        ]
        self._transfer.send_weights(pairs, self._ring.free[room])
        there = self._plain.with_tensors(tensors)
        # Anew for each chunk: kernels may keep a converted copy of scales or biases.
        return (
            GemmWeights(gemm=self._layer.up, layout=PLAIN, data=there.w13, bias=there.bias13),
            GemmWeights(gemm=self._layer.down, layout=PLAIN, data=there.w2, bias=there.bias2),
        )


def _runs(experts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return runs of successive experts, each with its place among all: one copy serves a run."""
    found: list[tuple[int, list[int]]] = []
    for place, expert in enumerate(experts):
        if found and found[-1][1][-1] == expert - 1:
            found[-1][1].append(expert)
        else:
            found.append((place, [expert]))
    return found
