"""Experts whose own code runs between the GEMMs: an activation that no kernel has, or a norm of every expert's output.

Both GEMMs run on the tuned kernels, each as that of an ungated layer without activation, found in the table by its
shapes: the up GEMM gives [T·k, 2I] (or I), rounded once as eager does; the module's own code makes [T·k, I] of it;
the down GEMM adds a token's slots in float32. With a norm the down GEMM gives every slot's row, rounded once, and the
normed rows are added here: in float32, in slot order, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import ref

import torch

from tilecast.engine import op, recording
from tilecast.engine.experts import stored_weights
from tilecast.engine.operands import check_device, check_inputs, place_of
from tilecast.engine.table_index import Entry
from tilecast.engine.table_runtime import Runtime
from tilecast.errors import UsageError
from tilecast.kernels import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertLayer

SERIAL = 32768 - 1
"""Elements up to which torch runs an elementwise operation in one thread, from one place on to the end."""
VECTOR = 128
"""Rows of a multiple of this many elements never reach the loop that torch ends a vectorised one with."""

Rows = Callable[[torch.Tensor], torch.Tensor]


def split_layers(
    w13: torch.Tensor, w2: torch.Tensor, *, top_k: int, dtype: str, bias: bool, global_experts: int, normed: bool
) -> tuple[ExpertLayer, ExpertLayer]:
    """Return the layers whose up GEMM and whose down GEMM run w13 [E, N, H] and w2 [E, H, I]. Raises InputError."""
    experts, hidden, intermediate = w2.shape
    up = ExpertLayer(
        hidden=hidden, intermediate=w13.shape[1], experts=experts, top_k=top_k, dtype=dtype, activation="identity",
        gated=False, bias=bias, global_experts=global_experts,
    )  # fmt: skip
    return up, replace(up, intermediate=intermediate, top_k=1 if normed else top_k)


class SplitExperts:
    """One module's experts in two halves. A call, and its errors, are those of `PreparedExperts`.

    `module` has `_apply_gate` (or `act_fn`, if not gated) and, with a norm, `post_expert_norm`; it is not kept alive.
    """

    def __init__(
        self,
        layers: tuple[ExpertLayer, ExpertLayer],
        weights: tuple[GemmWeights, GemmWeights],
        module: torch.nn.Module,
        *,
        runtime: Runtime,
        gated: bool,
        normed: bool,
    ) -> None:
        """Take weights stored as the table wants them; `prepare_split` stores them."""
        self.layer, self._down_layer = layers
        self.runtime = runtime
        self._up, self._down = weights
        self._module = ref(module)
        self._gated, self._normed = gated, normed
        self._dtype = TORCH_DTYPES[self.layer.dtype]
        self._handle = op.handle_of(self)

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run the experts: hidden [T, H], ids and weights [T, k] to a fresh [T, H]."""
        out_dtype = out_dtype or self._dtype
        if torch.compiler.is_compiling():
            return op.call(
                hidden, topk_ids, topk_weights, None, None, None, None, handle=self._handle, activation="identity",
                gated=False, global_experts=self.layer.global_experts, out_dtype=out_dtype,
            )  # fmt: skip
        rows, ids, scales = check_inputs(self.layer, hidden, topk_ids, topk_weights)
        if rows.shape[0] == 0:
            return torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
        with torch.no_grad():
            return self._run(rows, ids, scales, out_dtype).view(hidden.shape)

    @property
    def packed(self) -> bool:
        """Whether the weights are on memory of their own."""
        return self._up.layout != PLAIN and self._down.layout != PLAIN

    @property
    def module(self) -> torch.nn.Module:
        """The module whose code runs between the GEMMs. Raises UsageError if it was deleted."""
        owner = self._module()
        if owner is None:
            raise UsageError("the module whose code runs between these experts' GEMMs was deleted; prepare its copy")
        return owner

    def unpacked(self) -> tuple[GemmWeights, GemmWeights]:
        """Return the weights of up and down in the plain layout, bit for bit as they were given."""
        up, down = self.runtime.anchor(self.layer), self.runtime.anchor(self._down_layer)
        return (
            self._up if self._up.layout == PLAIN else up.up_kernel.unpack(self._up),
            self._down if self._down.layout == PLAIN else down.down_kernel.unpack(self._down),
        )

    def with_top_k(self, top_k: int) -> SplitExperts | None:
        """Return the same experts for another number of slots a token, None where the table stores those otherwise."""
        experts = max(self.layer.global_experts, top_k)
        up = replace(self.layer, top_k=top_k, global_experts=experts)
        down = replace(self._down_layer, top_k=1 if self._normed else top_k, global_experts=experts)
        first, second = self.runtime.anchor(up), self.runtime.anchor(down)
        stored = (first.up_kernel.layout(up.up, first.up), second.down_kernel.layout(down.down, second.down))
        if stored != (self._up.layout, self._down.layout):
            return None
        weights = replace(self._up, gemm=up.up, plans={}), replace(self._down, gemm=down.down, plans={})
        return SplitExperts(
            (up, down), weights, self.module, runtime=self.runtime, gated=self._gated, normed=self._normed
        )  # fmt: skip

    def _run(self, rows: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        owner: Any = self.module
        tokens, top_k = ids.shape
        layout = sort_slots(ids, self.layer.experts)
        entry = self._found(self.layer, tokens, ids, self._up)
        wide = torch.empty((tokens * top_k, self.layer.intermediate), dtype=rows.dtype, device=rows.device)
        entry.up_kernel.up(entry.up, rows, self._up, layout, wide)
        order = entry.up_kernel.order(self.layer.up, entry.up)
        middle = self._by_rows(owner._apply_gate if self._gated else owner.act_fn, wide)
        if not self._normed:
            return self._sent_down(middle, order, ids, layout, scales, out_dtype)
        # A slot is then a token of its own: the layout is the same one.
        alone = ExpertLayout(
            tokens=tokens * top_k, top_k=1, experts=layout.experts, ids=layout.ids.view(-1, 1), slots=layout.slots,
            offsets=layout.offsets,
        )  # fmt: skip
        ones = torch.ones((tokens * top_k, 1), dtype=torch.float32, device=rows.device)
        slots = self._sent_down(middle, order, ids.reshape(-1, 1), alone, ones, self._dtype)
        normed = self._by_rows(owner.post_expert_norm, slots).view(tokens, top_k, -1)
        present = (ids >= 0) & (ids < self.layer.experts)
        return _added(normed, torch.where(present, scales, 0.0), present).to(out_dtype)

    def _sent_down(
        self,
        middle: torch.Tensor,
        order: str,
        ids: torch.Tensor,
        layout: ExpertLayout,
        scales: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        entry = self._found(self._down_layer, layout.tokens, ids, self._down)
        wanted = entry.down_kernel.order(self._down_layer.down, entry.down)
        if wanted != order:
            # Row p of the sorted order is slot `slots[p]`.
            slots = layout.slots.long()
            middle = middle[slots] if wanted == "sorted" else torch.empty_like(middle).index_copy_(0, slots, middle)
        out = torch.empty((layout.tokens, self.layer.hidden), dtype=out_dtype, device=middle.device)
        entry.down_kernel.down(entry.down, middle, self._down, layout, scales, out)
        return out

    def _found(self, layer: ExpertLayer, tokens: int, ids: torch.Tensor, weights: GemmWeights) -> Entry:
        entry = self.runtime.lookup(layer, tokens)
        recorder = recording.active()
        if recorder is not None:
            recorder.count(layer, ids, hit=entry.hit, place=place_of(weights.data))
        return entry

    def _by_rows(self, function: Rows, rows: torch.Tensor) -> torch.Tensor:
        """Apply a module's own function, under `reproducible` so that a row's bits are free of the other rows.

        On CPUs torch splits a large tensor over threads anywhere, and computes what is left over at each end by other
        code than the rest; so it is given no more than one thread takes, and nothing is left over or only one row is.
        """
        width = rows.shape[1]
        if rows.device.type != "cpu" or self.runtime.policy != "reproducible":
            return function(rows).to(self._dtype).contiguous()
        together = max(1, SERIAL // width) if width % (2 * VECTOR) == 0 else 1
        done = [function(part).to(self._dtype) for part in torch.split(rows, together)]
        return torch.cat(done)


def prepare_split(
    layers: tuple[ExpertLayer, ExpertLayer],
    w13: torch.Tensor,
    w2: torch.Tensor,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    module: torch.nn.Module,
    *,
    runtime: Runtime,
    gated: bool,
    normed: bool,
) -> SplitExperts:
    """Store weights as the table wants those of `split_layers`, and return the callable experts.

    Raises DeviceError if no kernel here can run them.
    """
    check_device(w13, runtime)
    up, down = layers
    first, second = runtime.anchor(up), runtime.anchor(down)
    weights = (
        stored_weights(up.up, w13, bias13, first.up_kernel, first.up),
        stored_weights(down.down, w2, bias2, second.down_kernel, second.down),
    )
    return SplitExperts(layers, weights, module, runtime=runtime, gated=gated, normed=normed)


def _added(slots: torch.Tensor, scales: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of [T, k, H] over k: float32, in slot order, absent slots as zero."""
    total = torch.zeros((slots.shape[0], slots.shape[2]), dtype=torch.float32, device=slots.device)
    for place in range(slots.shape[1]):
        row = torch.where(present[:, place, None], slots[:, place].float(), 0.0)
        # Two roundings, wherever an element lies: nothing here may become a fused multiply-add.
        total += row * scales[:, place, None]
    return total
