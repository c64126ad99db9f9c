"""`--gpu-experts`: which experts are on the GPU and which on the CPU, for the commands that run or tune a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilecast.canonical import Json
from tilecast.cli._layers import ShardedModel
from tilecast.cli._output import Output
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer

if TYPE_CHECKING:
    import torch

    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.engine.placed_choice import Choice, Shares
    from tilecast.engine.streaming import BreakEven

GpuExpertsOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-experts",
        metavar="N|auto|FILE",
        help="Experts of each layer to keep on the GPU, the others on the CPU: a number, as many as fit, or a file: "
        "a record that TM_GEMM_RECORD wrote, or ids by layer as JSON.",
        show_default=False,
    ),
]
GpuExpertCountOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-experts",
        metavar="N|FILE",
        help="Experts of each layer that will be on the GPU, the others on the CPU: a number, or a file of ids by "
        "layer as JSON. What auto comes to, generate says when it loads the model.",
        show_default=False,
    ),
]
ExpertCountsOption = Annotated[
    Path | None,
    typer.Option(
        "--expert-counts",
        metavar="FILE",
        help="With --gpu-experts N or auto: the hottest first, by this file that TM_GEMM_RECORD wrote.",
        show_default=False,
    ),
]


def parse_gpu_experts(
    text: str | None, counts: Path | None = None, *, tp: int = 1, ep: int = 1, experts: str = "tilecast"
) -> Choice | None:
    """Return which experts are near, None where it is not asked for. Raises UsageError and InputError."""
    if text is None:
        if counts is not None:
            raise UsageError("--expert-counts is given without --gpu-experts; give both, or neither")
        return None
    if tp > 1 or ep > 1:
        raise UsageError("--gpu-experts is for one process; leave it out, or --tp and --ep")
    if experts != "tilecast":
        raise UsageError(f"--gpu-experts needs --experts tilecast, but it is {experts!r:.40}")
    from tilecast.engine.placed_choice import read_choice

    return read_choice(text, counts)


def placement_json(model: torch.nn.Module) -> Json:
    """Return where a loaded model's experts are; None where they are not on two devices."""
    from tilecast.engine.placed_model import placed_modules

    found = placed_modules(model)
    if not found:
        return None
    return {
        "near": str(found[0].place.near),
        "far": str(found[0].placed.far),
        "near_experts": {str(state.place.index): list(state.place.near_experts) for state in found},
        "stream_from": {str(state.place.index): state.stream_from for state in found},
    }


@dataclass(frozen=True, kw_only=True)
class PlacedLayers:
    """What a model's layers are run as on two devices: `near` is the environment of the one, the CPU's the other."""

    shares: tuple[Shares, ...]
    near: Environment

    @property
    def far(self) -> Environment:
        """The CPU's environment: that of the near device where this is a CPU."""
        return self.near if self.near.device_kind == "cpu" else cpu_environment()

    @property
    def parts(self) -> tuple[tuple[Environment, tuple[ExpertLayer, ...]], ...]:
        """What each of them is tuned for: the near one for both shares, as far experts' weights may be sent there."""
        near = [part.near for part in self.shares]
        far = [part.far for part in self.shares]
        both = self.near, _each_once([*near, *far])
        return (both,) if self.far == self.near else (both, (self.far, _each_once(far)))

    @property
    def runs(self) -> tuple[tuple[Environment, tuple[ExpertLayer, ...]], ...]:
        """What each of them runs as a rule."""
        near, far = _each_once([part.near for part in self.shares]), _each_once([part.far for part in self.shares])
        return (self.near, near), (self.far, far)

    def profile(self, whole: RoutingProfile | None) -> RoutingProfile | None:
        """Return a routing profile of whole layers as one that knows the shares."""
        from tilecast.engine.placed_choice import profile_of_shares

        return None if whole is None else profile_of_shares(whole, self.shares)

    def explain(self, output: Output) -> None:
        """Note what runs where."""
        for environment, layers in self.parts:
            for layer in layers:
                output.note(f"  on {environment.device}: {layer.label}")
        if self.far == self.near:
            output.note("  there is no GPU here: both parts are for the CPU")


def placed_layers(split: ShardedModel, choice: Choice, near: Environment | None = None) -> PlacedLayers:
    """Return a model's layers as `choice` places them; `near` is by default the current GPU, or the CPU.

    Raises UsageError and InputError.
    """
    from tilecast import environment
    from tilecast.engine.placed_choice import near_numbers, shares_of

    layers = [(group.shards[0].layer, group.count) for group in split.groups]
    numbers = near_numbers(choice, layers)
    shares = dict.fromkeys(shares_of(layer, number) for layer, _ in layers for number in numbers)
    return PlacedLayers(shares=tuple(shares), near=near or environment.here())


def benched_layers(splits: Sequence[ShardedModel], choice: Choice) -> PlacedLayers:
    """Return models' layers as `choice` places them, for one layer at a time on this device and the CPU.

    Where memory decides it is what is free now: nothing else of the models is loaded. Raises UsageError and InputError.
    """
    if not isinstance(choice.experts, str):
        found = [shares for split in splits for shares in placed_layers(split, choice).shares]
    else:
        found = [shares for split in splits for shares in _fitting(split, choice)]
    from tilecast import environment

    return PlacedLayers(shares=tuple(dict.fromkeys(found)), near=environment.here())


def _fitting(split: ShardedModel, choice: Choice) -> list[Shares]:
    """Return a model's layers with as many experts near as fit, the layers numbered as if all of them had experts."""
    from tilecast.engine.placed_choice import Candidate, near_ids, shares_of
    from tilecast.engine.placed_model import expert_bytes, free_bytes, near_device, room

    layers = [group.shards[0].layer for group in split.groups for _ in range(group.count)]
    near = near_device()
    candidates = [
        Candidate(index=place, name=layer.label, layer=layer, expert_bytes=expert_bytes(layer, near))
        for place, layer in enumerate(layers)
    ]
    chosen = near_ids(choice, candidates, room(free_bytes(near)))
    return [shares_of(layer, len(ids)) for layer, ids in zip(layers, chosen, strict=True)]


def break_evens(
    placed: PlacedLayers, table: TuningTable, *, policy: str, routing: str
) -> list[tuple[Shares, BreakEven]]:
    """Return from how many tokens on it pays to send the far experts' weights near, for each layer with both parts."""
    from tilecast.engine.placed_model import near_device
    from tilecast.engine.streaming import break_even_of

    return [
        (
            shares,
            break_even_of(
                table, shares, near=placed.near, far=placed.far, policy=policy, routing=routing, device=near_device()
            ),
        )
        for shares in placed.shares
        if shares.far is not None
    ]


def break_even_lines(found: list[tuple[Shares, BreakEven]]) -> list[str]:
    """Return a line for each layer."""
    from tilecast.engine.streaming import break_even_line

    return [break_even_line(shares, one) for shares, one in found]


def break_even_json(found: list[tuple[Shares, BreakEven]]) -> list[Json]:
    """Return the JSON form of what `break_evens` found."""
    return [
        {
            "layer": shares.layer.label,
            "near": None if shares.near is None else shares.near.label,
            "far": None if shares.far is None else shares.far.label,
            "tokens": one.tokens,
            "bytes": one.bytes,
            "bytes_per_second": one.bytes_per_second,
        }
        for shares, one in found
    ]


def _each_once(layers: list[ExpertLayer | None]) -> tuple[ExpertLayer, ...]:
    return tuple(dict.fromkeys(layer for layer in layers if layer is not None))
