"""Calls of an expert layer with few tokens on a CPU, in one call of compiled code.

While weights stream through the caches, Python's own code is read from memory again at every call, and that of each
function of torch with it: of a layer that takes 3 ms at one token, a sixth was spent outside the kernels. What a call
needs is therefore learnt from the first of its kind. Whatever is out of the ordinary goes the ordinary way, which says
why it is refused.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from tilecast.engine import recording
from tilecast.kernels.cpu.whole_layer import DONE, Frame, WholeLayer, whole_layer

if TYPE_CHECKING:
    from tilecast.engine.table_index import Entry
    from tilecast.engine.table_runtime import Missed
    from tilecast.kernels.spec import GemmWeights
    from tilecast.problem import ExpertLayer, TileConfig

MAX_TOKENS = 256
"""Beyond, what is outside the kernels is lost in what is inside."""
MAX_KINDS = 1024
"""How many kinds of calls a layer remembers, so that a long-lived process cannot grow without bound."""

SPARES, SPARE_BYTES = 16, 16 << 10
"""How many outputs are made at a time, of up to so many bytes each: the first costs what all others together do."""

_Kind: TypeAlias = tuple[
    torch.Size, torch.dtype, torch.Size, torch.dtype, torch.Size, torch.dtype, torch.dtype, bool, int
]

_spares: dict[tuple[torch.Size, torch.dtype, bool, int], list[torch.Tensor]] = {}
"""Outputs that nobody has yet, of all layers, by shape, dtype, whether of inference mode, and Python thread."""


class _Known(NamedTuple):
    """What runs one kind of calls.

    frame: what is launched; missed: what counts a miss of the table; narrow: whether weights are made float32 first;
    spares: outputs made before, None where each is made when it is wanted.
    """

    frame: Frame
    missed: Missed | None
    narrow: bool
    spares: list[torch.Tensor] | None


class AtOnce:
    """What one layer's calls have taught, by the shapes and dtypes of their operands and their Python thread."""

    __slots__ = ("_by_configs", "_known", "_layer", "_weights")

    def __init__(self, layer: ExpertLayer, weights: tuple[GemmWeights, GemmWeights]) -> None:
        """Take a layer and its weights of up and down, as they are stored."""
        self._layer = layer
        self._weights = weights
        self._known: dict[_Kind, _Known] = {}
        self._by_configs: dict[tuple[TileConfig, TileConfig, torch.dtype], WholeLayer | None] = {}

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Return what a copy is made from: frames point at this one's memory, so a copy learns its own."""
        return None, {"_layer": self._layer, "_weights": self._weights, "_known": {}, "_by_configs": {}}

    def run(
        self, hidden: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, out_dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return the layer's result, shaped as hidden, or None where the call has to go the ordinary way."""
        if not self._known or recording.active() is not None:
            return None
        if not (type(hidden) is type(ids) is type(scales) is torch.Tensor):
            return None
        known = self._known.get(_kind(hidden, ids, scales, out_dtype))
        if known is None or hidden.requires_grad or scales.requires_grad:
            return None
        if not (hidden.is_cpu and ids.is_cpu and scales.is_cpu):
            return None
        # Each is itself where nothing has to be done.
        hidden, ids, scales = hidden.contiguous(), ids.contiguous(), scales.contiguous()
        frame, missed, narrow, spares = known
        if narrow:
            scales = scales.to(torch.float32)
        out = spares.pop() if spares else _output(hidden, out_dtype, spares)
        if frame.call(frame.address, hidden.data_ptr(), ids.data_ptr(), scales.data_ptr(), out.data_ptr()) != DONE:
            self._known.clear()
            return None
        if missed is not None:
            missed.count += 1
        return out

    def learn(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        scales: torch.Tensor,
        out_dtype: torch.dtype,
        entry: Entry,
        missed: Missed | None,
    ) -> None:
        """Remember how a call that went the ordinary way could have gone, if all that it wants is an entry's launches.

        missed: what counts the table's misses for so many tokens, None for a hit.
        """
        tokens = hidden.numel() // self._layer.hidden
        # All operands are on one device: the ordinary way checked that.
        if tokens > MAX_TOKENS or not hidden.is_cpu or (missed is None and not entry.hit):
            return
        whole = self._whole(entry, out_dtype)
        frame = None if whole is None else whole.frame(tokens, ids.dtype)
        if frame is None:
            return
        if len(self._known) >= MAX_KINDS:
            self._known.clear()
        kind = _kind(hidden, ids, scales, out_dtype)
        self._known[kind] = _Known(frame, missed, scales.dtype is not torch.float32, _spares_of(kind))

    def _whole(self, entry: Entry, out_dtype: torch.dtype) -> WholeLayer | None:
        configs = entry.up, entry.down
        key = (*configs, out_dtype)
        if key not in self._by_configs:
            kernels = entry.up_kernel, entry.down_kernel
            self._by_configs[key] = whole_layer(self._layer, kernels, configs, self._weights, out_dtype)
        return self._by_configs[key]


def _kind(hidden: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, out_dtype: torch.dtype) -> _Kind:
    inference = torch.is_inference_mode_enabled()
    return (
        hidden.shape, hidden.dtype, ids.shape, ids.dtype, scales.shape, scales.dtype, out_dtype, inference, get_ident(),
    )  # fmt: skip


def _spares_of(kind: _Kind) -> list[torch.Tensor] | None:
    """Return where a kind's outputs are kept, None if they are too large for it."""
    shape, *_, out_dtype, inference, thread = kind
    if shape.numel() * out_dtype.itemsize > SPARE_BYTES:
        return None
    if len(_spares) >= MAX_KINDS:
        _spares.clear()
    return _spares.setdefault((shape, out_dtype, inference, thread), [])


def _output(hidden: torch.Tensor, dtype: torch.dtype, spares: list[torch.Tensor] | None) -> torch.Tensor:
    """Return a fresh output like hidden, with undefined contents, and make others for later where there is a place."""
    if spares is not None:
        spares.extend(torch.empty_like(hidden, dtype=dtype) for _ in range(SPARES - 1))
    return torch.empty_like(hidden, dtype=dtype)
