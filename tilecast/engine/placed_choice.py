"""Which experts of a model live near, on the accelerator: what is asked for, and each layer's ids that follow from it.

What is asked for is a number for every layer, `auto`, or ids by layer. The hottest come first where a record of serving
(TM_GEMM_RECORD) says how many slots each expert got.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch

from tilecast.autotune.record import FORMAT, LayerRecord, Load, ServingRecord, read_json, read_record
from tilecast.autotune.routing_profiles import RoutingProfile
from tilecast.engine.placement import AUTO, choose_near
from tilecast.errors import InputError, UsageError
from tilecast.problem import MAX_DIMENSION, ExpertLayer

KNOWN = "a number of experts, auto, or a file: a record that TM_GEMM_RECORD wrote, or ids by layer as JSON"
NAMED = 6
"""How many layers a message names."""

Asked = int | str | Path | Mapping[int, Sequence[int]]
"""A number of experts of every layer, `auto`, the name of a file, or ids by the layer's index in the model."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for, read and checked as far as that goes without the model.

    experts: a number, `auto`, or ids by the layer's index in the model. record: what serving counted, None if nothing
    was given. source: what messages call it. near: the near device, None for the GPU, or the CPU where there is none.
    """

    experts: int | str | Mapping[int, tuple[int, ...]]
    record: ServingRecord | None = None
    source: str = "gpu_experts"
    near: torch.device | None = None


class Shares(NamedTuple):
    """A layer and what the near and the far device run of it; None for a device without experts of it."""

    layer: ExpertLayer
    near: ExpertLayer | None
    far: ExpertLayer | None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One expert layer of a model: its index and name there, and the bytes of one of its experts."""

    index: int
    name: str
    layer: ExpertLayer
    expert_bytes: int


def read_choice(asked: Asked, counts: Path | str | None = None) -> Choice:
    """Return what was asked for; `counts` is the file of a record whose hottest experts come first.

    Raises UsageError for what is neither a number from 0, `auto` nor a file, InputError for a file of another kind.
    """
    if isinstance(asked, Mapping):
        _check_no_counts(counts)
        return Choice(experts={index: tuple(ids) for index, ids in asked.items()})
    text = str(asked)
    record = None if counts is None else read_record(Path(counts))
    if text.removeprefix("-").isascii() and text.removeprefix("-").isdigit():
        if not 0 <= int(text) <= MAX_DIMENSION:
            raise UsageError(f"gpu_experts is {text:.40}, expected 0 or above, or auto, or a file")
        return Choice(experts=int(text), record=record, source=str(counts))
    if text == AUTO:
        return Choice(experts=AUTO, record=record, source=str(counts))
    path = Path(text)
    if not path.is_file():
        raise UsageError(f"gpu_experts is {text!r:.200}, expected {KNOWN}")
    _check_no_counts(counts)
    found = read_json(path, "placement")
    if isinstance(found, dict) and found.get("format") == FORMAT:
        return Choice(experts=AUTO, record=read_record(path), source=text)
    return Choice(experts=_ids_by_layer(path), source=text)


def as_choice(asked: Asked | Choice) -> Choice:
    """Return a choice as it is, and anything else as `read_choice` does."""
    return asked if isinstance(asked, Choice) else read_choice(asked)


def near_ids(choice: Choice, candidates: Sequence[Candidate], free_bytes: int | None) -> list[tuple[int, ...]]:
    """Return for each layer the ids of its near experts, ascending.

    `auto` takes as many of every layer as fit into `free_bytes` all together; None is no limit. Raises InputError,
    naming the layer, for numbers and ids that it does not have, and for a record or a file of another model.
    """
    if isinstance(choice.experts, Mapping):
        _check_layers(choice, choice.experts, candidates)
    counts = [None] * len(candidates) if choice.record is None else counts_of(choice.record, candidates, choice.source)
    total = sum(candidate.expert_bytes for candidate in candidates)
    found = []
    for candidate, slots in zip(candidates, counts, strict=True):
        asked = choice.experts[candidate.index] if isinstance(choice.experts, Mapping) else choice.experts
        # In proportion to their size, so that every layer gets as many.
        share = None if free_bytes is None else max(0, free_bytes) * candidate.expert_bytes // total
        try:
            found.append(
                choose_near(
                    candidate.layer.experts, asked, counts=slots, expert_bytes=candidate.expert_bytes, free_bytes=share
                )
            )
        except InputError as error:
            raise InputError(f"{candidate.name}: {error}") from error
    return found


def shares_of(layer: ExpertLayer, near: int) -> Shares:
    """Return a layer with its near and its far share, if `near` of its experts are near.

    Raises InputError for more experts than there are.
    """
    if not 0 <= near <= layer.experts:
        raise InputError(f"{layer.label} has {layer.experts} experts, {near} cannot be near")
    parts = [
        replace(layer, experts=count, global_experts=layer.global_experts) if count else None
        for count in (near, layer.experts - near)
    ]
    return Shares(layer, parts[0], parts[1])


def counts_of(record: ServingRecord, candidates: Sequence[Candidate], source: str) -> list[tuple[int, ...]]:
    """Return the slots that each expert of each layer got, from a record of the same model in any dtype.

    Equal layers are counted apart, in the order in which they ran. Raises InputError.
    """
    groups: dict[ExpertLayer, list[int]] = {}
    for place, candidate in enumerate(candidates):
        groups.setdefault(candidate.layer, []).append(place)
    found: dict[int, tuple[int, ...]] = {}
    for layer, places in groups.items():
        loads = _loads_of(record, layer, len(places), source)
        for position, place in enumerate(places):
            ranks = [of_rank[position].slots for of_rank in loads]
            found[place] = tuple(map(sum, zip(*ranks, strict=True)))
    return [found[place] for place in range(len(candidates))]


def _loads_of(record: ServingRecord, layer: ExpertLayer, count: int, source: str) -> list[tuple[Load, ...]]:
    """Return what every rank counted at a layer's `count` places of the model."""
    seen = _records_of(record, layer)
    if not _may_be_whole(seen, layer, record.world_size):
        known = sorted({found.layer.label for found in record.layers if found.loads})
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        raise InputError(
            f"{source} has no counts of {layer.label}; it has: {'; '.join(known[:NAMED]) or 'none'}{more}; record the "
            "whole model, on one rank or with --tp"
        )
    parts = [
        found.loads[start : start + count] for found in seen for start in range(0, len(found.loads), count)
    ]  # fmt: skip
    if any(len(part) != count for part in parts) or len(parts) > record.world_size:
        places = sum(len(found.loads) for found in seen)
        raise InputError(
            f"{source} counts {_layers(places)} of {layer.label}, the model has {count}; it is of another model, or of "
            "a process that ran several"
        )
    return parts


def _records_of(record: ServingRecord, layer: ExpertLayer) -> list[LayerRecord]:
    """Return what was counted of a layer: in any dtype and weight format, else of any share of its I."""
    counted = [found for found in record.layers if found.loads]
    dtypes = [
        found for found in counted
        if replace(found.layer, dtype=layer.dtype, weight_format=layer.weight_format) == layer
    ]  # fmt: skip
    if dtypes:
        return dtypes
    return [
        found for found in counted
        if replace(found.layer, dtype=layer.dtype, weight_format=layer.weight_format, intermediate=layer.intermediate)
        == layer
    ]  # fmt: skip


def _may_be_whole(seen: Sequence[LayerRecord], layer: ExpertLayer, ranks: int) -> bool:
    """Whether what was counted is of the layer, or of shares of its I as so many ranks hold them."""
    widest = max((found.layer.intermediate for found in seen), default=0)
    return widest in (layer.intermediate, -(-layer.intermediate // ranks))


def _check_layers(choice: Choice, given: Mapping[int, object], candidates: Sequence[Candidate]) -> None:
    known = [candidate.index for candidate in candidates]
    for what, indices in (("lacks", set(known) - given.keys()), ("has", given.keys() - set(known))):
        if indices:
            shown = ", ".join(map(str, sorted(indices)[:NAMED])) + (", …" if len(indices) > NAMED else "")
            kind = "of the model" if what == "lacks" else "and the model has no experts there"
            layers = "layer" if len(indices) == 1 else "layers"
            raise InputError(f"{choice.source} {what} {layers} {shown} {kind}, expected {', '.join(map(str, known))}")


def _check_no_counts(counts: object) -> None:
    if counts is not None:
        raise UsageError("a file that says which experts are near leaves nothing to choose by counts; give one of them")


def _ids_by_layer(path: Path) -> dict[int, tuple[int, ...]]:
    """Read ids by layer, `{"0": [0, 3], "1": [2]}`. Raises InputError."""
    expected = f'{path}: expected ids by layer, {{"0": [0, 3], "1": [2]}}, or a file that TM_GEMM_RECORD wrote'
    pairs = json.loads(path.read_bytes(), object_pairs_hook=list)
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs) or not pairs:
        raise InputError(expected)
    found: dict[int, tuple[int, ...]] = {}
    for key, ids in cast(list[tuple[str, object]], pairs):
        if not (key.isascii() and key.isdigit() and len(key) < 8) or not isinstance(ids, list):
            raise InputError(f"{expected}; {key!r:.40} is neither")
        wrong = [value for value in ids if isinstance(value, bool) or not isinstance(value, int)]
        if wrong:
            raise InputError(f"{path}: layer {key} has {wrong[0]!r:.40}, expected ids of experts")
        if int(key) in found:
            raise InputError(f"{path}: layer {key} is there twice")
        found[int(key)] = tuple(ids)
    return found


def near_numbers(choice: Choice, layers: Sequence[tuple[ExpertLayer, int]]) -> tuple[int, ...]:
    """Return how many experts are near, each number once, where only the model's layers and their counts are known.

    Raises UsageError for a choice that depends on the device's memory, InputError for one that does not fit the model.
    """
    if isinstance(choice.experts, str):
        raise UsageError(
            f"how many experts {AUTO} or a record puts near depends on the memory that is free when the model is "
            f"loaded; give a number, as generate --gpu-experts {AUTO} says it"
        )
    total = sum(count for _, count in layers)
    if isinstance(choice.experts, Mapping) and len(choice.experts) != total:
        raise InputError(
            f"{choice.source} has ids for {_layers(len(choice.experts))}, the model has {total} with experts"
        )
    check_choice(choice, [layer.experts for layer, _ in layers])
    if isinstance(choice.experts, int):
        return (choice.experts,)
    return tuple(sorted({len(ids) for ids in choice.experts.values()}))


def check_choice(choice: Choice, experts: Sequence[int]) -> None:
    """Raise InputError for a choice that no layer of a model can follow, whose layers have these numbers of experts.

    It needs nothing but a config, so it is known before any weight is read. Without numbers nothing is checked.
    """
    if not experts:
        return
    if isinstance(choice.experts, int) and choice.experts > min(experts):
        raise InputError(
            f"gpu_experts is {choice.experts}, but a layer has {min(experts)} experts; give at most as many"
        )
    for index, ids in choice.experts.items() if isinstance(choice.experts, Mapping) else ():
        try:
            choose_near(max(experts), ids)
        except InputError as error:
            raise InputError(f"{choice.source}: layer {index}: {error}") from error


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def profile_of_shares(profile: RoutingProfile, shares: Sequence[Shares]) -> RoutingProfile:
    """Return a profile that knows the shares of layers whose counts it has: the hottest experts are the near ones.

    Profiles that are no histogram say something of every layer already, and keep their name as histograms do.
    """
    loads: dict[str, tuple[Load, ...]] = {}
    for layer, near, far in shares:
        router = (layer.experts, layer.global_experts, layer.top_k)
        found = profile.loads.get(layer.digest) or profile.routers.get(router) or ()
        if len(profile.counts) == layer.experts:
            found = (Load(profile.counts),)
        for load in found:
            first, rest = _cut(load.slots, 0 if near is None else near.experts)
            for part, own, others in ((near, first, rest), (far, rest, first)):
                if part is not None:
                    # Both shares are one layer where half of the experts are near: it is the mean of the two.
                    loads[part.digest] = (*loads.get(part.digest, ()), Load(own, sum(others)))
    # A plain histogram would be taken by its order, in which the near experts are not the first ones.
    return replace(profile, loads={**profile.loads, **loads}, counts=() if loads else profile.counts)


def _cut(slots: tuple[int, ...], near: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the slots of a layer's hottest experts, and those of the others."""
    chosen = choose_near(len(slots), near, counts=slots)
    return tuple(slots[expert] for expert in chosen), tuple(n for e, n in enumerate(slots) if e not in chosen)
