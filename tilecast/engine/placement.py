"""Experts of one layer on two devices: some on the near device, where hidden states are, the others on the far one.

Both parts run their tuned kernels at the same time; every slot's result is float32, and they are added on the near
device in slot order, as one device does it. So a placement changes no bit as long as both devices are of one
numerics class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from tilecast.engine.runtime import Runtime
from tilecast.errors import InputError
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertLayer, check_int

AUTO = "auto"


class PlacedExperts:
    """One layer's experts, some near and some far. A call, and its errors, are those of `PreparedExperts`.

    Hidden states, ids and weights are on `near`, and so is the fresh result. `near_experts` and `far_experts` are ids,
    ascending. From `stream_from` tokens on the far experts' weights are sent near and run there; None: never.
    """

    layer: ExpertLayer
    near_experts: tuple[int, ...]
    far_experts: tuple[int, ...]
    near: torch.device
    far: torch.device
    stream_from: int | None

    def __call__(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run the layer. Raises what `PreparedExperts` raises."""
        raise NotImplementedError


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

    w13, w2, biases and options are those of `prepare_experts`, for all experts, on any one device.
    """
    raise NotImplementedError


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
