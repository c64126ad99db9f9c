"""Experts of one layer on two devices: some on the near device, where hidden states are, the others on the far one.

The near device's kernels are launched first and then, on the calling thread, the far part's run on the CPU: at the same
time where the near device is a GPU, one after the other where it is the CPU, too, whose cores either part fills. Every
slot's result is float32, and they are added on the near device in slot order, as one device does it. So a placement
changes no bit as long as both devices are of one numerics class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from tilecast.engine import op
from tilecast.engine import runtime as runtime_module
from tilecast.engine.operands import check_inputs, layer_of
from tilecast.engine.placement_part import Part, PlainExperts, add_slots, classes_of
from tilecast.engine.placement_stream import WeightStream
from tilecast.engine.placement_transfer import Transfer
from tilecast.engine.table_runtime import Runtime
from tilecast.errors import DeviceError, InputError, UsageError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertLayer, check_int

AUTO = "auto"


class PlacedExperts:
    """One layer's experts, some near and some far. A call, and its errors, are those of `PreparedExperts`.

    Hidden states, ids and weights are on `near`, and so is the fresh result. `near_experts` and `far_experts` are ids,
    ascending. From `stream_from` tokens on the far experts' weights are sent near and run there; None: never.
    `one_class` says whether an expert has the same bits on either side. Several threads may call it at once. Rows and
    results go through buffers that all placed layers share; under `torch.compile` a call is one operator of the graph.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        near_experts: tuple[int, ...],
        devices: tuple[torch.device, torch.device],
        parts: tuple[Part | None, Part | None],
        transfer: Transfer,
        stream: WeightStream | None,
        stream_from: int | None,
    ) -> None:
        """Take both shares, None for one without experts; `place_experts` makes them."""
        self.layer = layer
        self.near_experts = near_experts
        self.far_experts = tuple(expert for expert in range(layer.experts) if expert not in near_experts)
        self.near, self.far = devices
        self.stream_from = stream_from
        self._near, self._far = parts
        self.one_class = len({classes_of(part.runtime, part.layer) for part in parts if part is not None}) == 1
        self._transfer, self._stream = transfer, stream
        self._dtype = TORCH_DTYPES[layer.dtype]
        self._handle = op.handle_of(self)

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run the layer. Raises what `PreparedExperts` raises, and UsageError while a CUDA graph is captured."""
        layer, out_dtype = self.layer, out_dtype or self._dtype
        if torch.compiler.is_compiling():
            return op.call(
                hidden, topk_ids, topk_weights, None, None, None, None, handle=self._handle,
                activation=layer.activation, gated=layer.gated, global_experts=layer.global_experts,
                out_dtype=out_dtype,
            )  # fmt: skip
        rows, ids, scales = check_inputs(layer, hidden, topk_ids, topk_weights)
        # Routing weights are in the dtype that slots are added in.
        if out_dtype not in (self._dtype, scales.dtype):
            raise InputError(f"out_dtype is {out_dtype}, expected {self._dtype} (the layer's dtype) or {scales.dtype}")
        if hidden.device != self.near:
            raise InputError(f"hidden is on {hidden.device}, expected {self.near}, the near device of these experts")
        out = torch.empty(rows.shape, dtype=out_dtype, device=self.near)
        if rows.shape[0]:
            self._transfer.check_capture()
            with torch.no_grad():
                add_slots(self._slots(rows, ids, scales), layer, ids, out)
        return out.view(hidden.shape)

    @property
    def shares(self) -> tuple[tuple[tuple[int, ...], Part], ...]:
        """The ids of either side and what runs them, the near one first; sides without experts are left out."""
        sides = (self.near_experts, self._near), (self.far_experts, self._far)
        return tuple((ids, part) for ids, part in sides if part is not None)

    def _slots(self, rows: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return every slot's weighted result, near [T·k, H], zero where a slot is absent."""
        begin, asked = self._transfer.mark(), None
        if self._far is not None:
            # On their way before any kernel is launched, so that the host need not wait for those.
            asked = self._transfer.fetch("ids", ids, begin), self._transfer.fetch("weights", scales, begin)
        shape, device = (ids.numel(), rows.shape[1]), self.near
        if self._near is None:
            slots = torch.zeros(shape, dtype=scales.dtype, device=device)
        else:
            slots = torch.empty(shape, dtype=scales.dtype, device=device)
            own = self._near.local_ids(ids)
            self._near.run(self._near.entry(ids.shape[0], own), rows, own, scales, slots)
        if self._far is not None and asked is not None:
            own, weights = self._far.local_ids(asked[0].wait()), asked[1].wait()
            if self._stream is not None and self.stream_from is not None and ids.shape[0] >= self.stream_from:
                self._stream.run(rows, own, scales, slots)
            else:
                self._add_far(self._far, rows, begin, own, weights, slots)
        return slots

    def _add_far(
        self,
        far: Part,
        rows: torch.Tensor,
        begin: torch.cuda.Event | None,
        ids: torch.Tensor,
        scales: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Run the far slots of near rows, as at `begin`, by host ids and weights [T, k], into their near `slots`."""
        transfer, entry = self._transfer, far.entry(ids.shape[0], ids)
        own = ids.flatten()
        where = (own >= 0).nonzero().flatten()
        if not where.shape[0]:
            return
        tokens, places = torch.unique_consecutive(where // ids.shape[1], return_inverse=True)
        whole = tokens.shape[0] == rows.shape[0]
        fetched = transfer.fetch("rows", rows, begin, None if whole else tokens)
        results = transfer.buffer("results", (where.shape[0], rows.shape[1]), slots)
        own, weights = own.index_select(0, where), scales.flatten().index_select(0, where)
        found = fetched.wait()
        # A row for each slot; where every token has one far slot, these are the rows that came.
        found = found if tokens.shape == where.shape else found.index_select(0, places)
        far.run(entry, found, own.view(-1, 1), weights.view(-1, 1), results.tensor)
        slots.index_copy_(0, transfer.send(transfer.stage("slots", where)), transfer.send(results))


def place_experts(
    w13: Weights,
    w2: Weights,
    *,
    top_k: int,
    near_experts: Collection[int],
    near: torch.device | str,
    far: torch.device | str = "cpu",
    activation: str = "silu",
    gated: bool = True,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    policy: str | None = None,
    near_runtime: Runtime | None = None,
    far_runtime: Runtime | None = None,
    stream_from: int | None = None,
) -> PlacedExperts:
    """Put each expert's weights where it will run, stored as that device's table wants them.

    w13, w2, biases and options are those of `prepare_experts`, for all experts, on any one device; every expert is
    copied, so the caller may drop them. `near` is where hidden states will be, a GPU or the CPU; `far` is the CPU. The
    runtimes are by default those in use for either kind of device; a share is a layer of its own in their tables, with
    its number of experts out of all. With `stream_from` the far experts' plain weights stay in host memory besides the
    packed ones (pinned, for a GPU), and there is room for two chunks of them near.
    Raises InputError for weights, ids or devices that do not fit, DeviceError if no kernel runs a share, UsageError
    for `stream_from` under `reproducible` where the two devices are of two numerics classes.
    """
    layer = layer_of(
        w13, w2, top_k=top_k, activation=activation, gated=gated, bias13=bias13, bias2=bias2, dtype=dtype
    )  # fmt: skip
    chosen = choose_near(layer.experts, sorted(near_experts))
    others = tuple(expert for expert in range(layer.experts) if expert not in chosen)
    devices = _device("near", near, ("cpu", "cuda")), _device("far", far, ("cpu",))
    near_runtime, far_runtime = (
        _runtime(given, device, policy) for given, device in zip((near_runtime, far_runtime), devices, strict=True)
    )
    if stream_from is not None:
        check_int("stream_from", stream_from, 1)
    transfer = Transfer(devices[0])
    given = PlainExperts(w13=w13, w2=w2, bias13=bias13, bias2=bias2)
    near_part = Part(layer, chosen, near_runtime, given.picked(chosen, devices[0])) if chosen else None
    far_part = stream = None
    if others:
        plain = given.picked(others, devices[1])
        if stream_from is not None:
            # Pinned once, so that a plain layout and what is sent are the same memory.
            plain = plain.with_tensors([transfer.keep(tensor) for tensor in plain.tensors])
        far_part = Part(layer, others, far_runtime, plain)
        if stream_from is not None:
            tuned = (near_part or far_part).layer
            _check_streaming(near_runtime, tuned, far_part, stream_from)
            stream = WeightStream(far_part.layer, tuned, near_runtime, transfer, plain)
    return PlacedExperts(layer, chosen, devices, (near_part, far_part), transfer, stream, stream_from)


def _runtime(given: Runtime | None, device: torch.device, policy: str | None) -> Runtime:
    chosen = given or runtime_module.current(device.type)
    return chosen if policy is None else chosen.with_policy(policy)


def _device(name: str, given: torch.device | str, kinds: tuple[str, ...]) -> torch.device:
    """Return a device with its index. Raises InputError for one of another kind, DeviceError for one not here."""
    try:
        device = torch.device(given)
    except RuntimeError:
        device = None
    if device is None or device.type not in kinds:
        raise InputError(f"the {name} device is {given!s:.60}, expected {' or '.join(kinds)}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = device.index if device.index is not None or not count else torch.cuda.current_device()
    if index is None or index >= count:
        raise DeviceError(f"the {name} device is {device}, but torch sees {count} GPUs")
    return torch.device(device.type, index)


def _check_streaming(near: Runtime, tuned: ExpertLayer, far: Part, stream_from: int) -> None:
    if "reproducible" not in (near.policy, far.runtime.policy):
        return
    if classes_of(near, tuned) != classes_of(far.runtime, far.layer):
        raise UsageError(
            f"stream_from is {stream_from} under the reproducible policy, but the near and the far experts of "
            f"{far.layer.label} run in two numerics classes, so bits would depend on the number of tokens; take the "
            "fastest policy, or leave stream_from out"
        )


def choose_near(
    layer_experts: int,
    experts: int | str | Sequence[int],
    *,
    counts: Sequence[float] | None = None,
    expert_bytes: int = 0,
    free_bytes: int | None = None,
) -> tuple[int, ...]:
    """Return the ids, ascending, of the experts of a layer of `layer_experts` that are to be near.

    experts: how many, `auto` for as many of `expert_bytes` each as fit in `free_bytes`, or the very ids. Numbers take
    the hottest by `counts` first, of equal ones the lower id; without counts the first ones. Raises InputError.
    """
    check_int("number of experts", layer_experts, 1)
    if counts is not None and len(counts) != layer_experts:
        raise InputError(f"counts are of {len(counts)} experts, the layer has {layer_experts}; record it again")
    if not isinstance(experts, int | str):
        return _given(layer_experts, experts)
    if isinstance(experts, str):
        experts = min(layer_experts, _fitting(experts, expert_bytes, free_bytes))
    check_int("number of near experts", experts, 0, layer_experts)
    heat = counts or [0.0] * layer_experts
    if not all(0 <= count < float("inf") for count in heat):
        raise InputError("counts hold a number that is negative or not finite; record them again")
    hottest = sorted(range(layer_experts), key=lambda expert: (-heat[expert], expert))
    return tuple(sorted(hottest[:experts]))


def _given(layer_experts: int, experts: Sequence[int]) -> tuple[int, ...]:
    for expert in experts:
        check_int("near expert", expert, 0, layer_experts - 1)
    if len(set(experts)) != len(experts):
        twice = next(expert for expert in experts if list(experts).count(expert) > 1)
        raise InputError(f"near expert {twice} is given twice; name each expert once")
    return tuple(sorted(experts))


def _fitting(word: str, expert_bytes: int, free_bytes: int | None) -> int:
    if word != AUTO:
        raise InputError(f"near experts are {word!r:.60}, expected a number, {AUTO} or ids")
    check_int("bytes of an expert", expert_bytes, 1, 1 << 62)
    if free_bytes is None:
        raise InputError(f"near experts are {AUTO}, but the device's free memory is not known; give a number")
    return max(0, free_bytes) // expert_bytes


def break_even(
    layer: ExpertLayer,
    *,
    near_times: Mapping[int, float],
    far_times: Mapping[int, float],
    bytes_to_stream: int,
    bytes_per_second: float,
) -> int | None:
    """Return the smallest token count from which sending the far experts' weights near beats running them far.

    Times are seconds by token count: of the whole layer on the near device, of the far experts' share on the far one.
    Sending and running count one after the other, though they overlap. Only counts with both times are looked at;
    from the one returned on streaming wins at each of them. None where it does not at the largest. Raises InputError.
    """
    check_int("bytes to stream", bytes_to_stream, 0, 1 << 62)
    if not 0 < bytes_per_second < float("inf"):
        raise InputError(f"{layer.label}: bytes per second is {bytes_per_second}, expected a positive number")
    for name, times in (("near", near_times), ("far", far_times)):
        for tokens, seconds in times.items():
            check_int("tokens", tokens, 1)
            if not 0 < seconds < float("inf"):
                raise InputError(f"{layer.label}: {name} time at {tokens} tokens is {seconds}, expected a positive one")
    found = None
    for tokens in sorted(near_times.keys() & far_times.keys(), reverse=True):
        if bytes_to_stream / bytes_per_second + near_times[tokens] >= far_times[tokens]:
            break
        found = tokens
    return found
