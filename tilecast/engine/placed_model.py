"""A model with the experts of each layer on two devices: the way there, and what then runs a module's experts.

The model is in the CPU's memory first. Everything but the experts' weights moves to the near device; then, layer by
layer, each expert's weights go where they are to run, and the whole layer's are let go of. So the near device never
holds more than what stays there, and the CPU no more than one layer besides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilecast.engine import runtime as runtime_module
from tilecast.engine.adapted import STATE, Adapted, adapted_of, fingerprint, replace_parameter
from tilecast.engine.announce import announce
from tilecast.engine.expert_module import Form, Plain, local, plain_weights
from tilecast.engine.group import Group
from tilecast.engine.placed_choice import Candidate, Choice, Shares, near_ids, shares_of
from tilecast.engine.placement import AUTO, PlacedExperts, place_experts
from tilecast.engine.placement_part import PlainExperts
from tilecast.engine.quantized_loading import LAYER
from tilecast.engine.quantized_module import STACKS, detach
from tilecast.engine.streaming import break_even_in, break_even_line, may_stream, stream_from
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import environment_for
from tilecast.errors import DeviceError, InputError, UsageError
from tilecast.problem import ExpertLayer

logger = logging.getLogger(__name__)

FAR = torch.device("cpu")
RESERVE_SHARE = 0.1
RESERVE_BYTES = 1 << 30
"""What `auto` leaves free near for hidden states and the cache: a tenth of what is free, at least this."""

Inspected = tuple[str, torch.nn.Module, Form, ExpertLayer]
"""An experts module that tuned kernels can run: its name in the model, itself, and what it computes."""


@dataclass(frozen=True, kw_only=True)
class PlacedModule:
    """Where the experts of one module are, or are to be: `index` is its layer's in the model."""

    name: str
    index: int
    form: Form
    layer: ExpertLayer
    near_experts: tuple[int, ...]
    near: torch.device

    @property
    def shares(self) -> Shares:
        """The layers that the near and the far device run."""
        return shares_of(self.layer, len(self.near_experts))

    @property
    def near_layers(self) -> tuple[ExpertLayer, ...]:
        """The shares that run on the kind of device that is near."""
        parts = self.shares[1:] if self.near.type == FAR.type else (self.shares.near,)
        return tuple(part for part in parts if part is not None)


class PlacedAdapted(Adapted):
    """What runs one module's experts on two devices."""

    def __init__(self, module: torch.nn.Module, place: PlacedModule, runtimes: tuple[Runtime, Runtime]) -> None:
        """Start without weights: `prepare` puts them where they are to be. The runtimes are near's and far's."""
        super().__init__(module, place.form, None)
        self.place = place
        self.runtimes = runtimes
        self.stream_from = stream_from(*runtimes, place.shares, place.near)

    def prepare(
        self, module: torch.nn.Module, runtime: Runtime, top_k: int, *, release: bool = True, summed: bool = True
    ) -> None:
        """Put a module's weights where they are to run, stored as the tables of both devices want them.

        `runtime` is that of the near device. The module keeps parameters without memory, on the near device.
        """
        assert self.form is not None, "only what tuned kernels run is placed"
        plain = plain_weights(module, self.form)
        self.runtime = runtime
        self._dtype = plain.dtype
        self._by_top_k = {top_k: self._prepared(plain, top_k, module)}
        detach(module)
        self._release(module, self.place.near)
        for name in self.form.names[2:]:
            bias = local(module.get_parameter(name))
            if bias.device != self.place.near:
                replace_parameter(module, name, bias.to(self.place.near))
        self._seen = fingerprint(module, self.form)

    @property
    def placed(self) -> PlacedExperts:
        """The experts as they were placed first."""
        first = next(iter(self._by_top_k.values()))
        assert isinstance(first, PlacedExperts)
        return first

    def fits(self, module: torch.nn.Module) -> bool:
        """Whether the module still stands for the weights that were placed, where and as it did."""
        return fingerprint(module, self.place.form) == self._seen

    def plain(self) -> Plain:
        """Return the weights of all experts in the CPU's memory, bit for bit as they were given."""
        found = _joined(self.placed)
        return Plain(
            w13=found.w13, w2=found.w2, bias13=found.bias13, bias2=found.bias2, dtype=self._dtype, shared=False
        )  # fmt: skip

    def _for_top_k(self, top_k: int) -> PlacedExperts:
        """Return the experts for another number of slots a token, on memory of their own."""
        logger.warning("%s for top-%d is stored once more", self.place.layer.label, top_k)
        found = self._prepared(self.plain(), top_k, None)
        self._by_top_k[top_k] = found
        return found

    def _prepared(self, plain: Plain, top_k: int, module: torch.nn.Module | None) -> PlacedExperts:
        assert self.form is not None and self.runtime is not None
        (layer,) = plain.layers(self.form, top_k)
        return place_experts(
            plain.w13, plain.w2, top_k=top_k, near_experts=self.place.near_experts, near=self.place.near, far=FAR,
            activation=layer.activation, gated=layer.gated, bias13=plain.bias13, bias2=plain.bias2, dtype=plain.dtype,
            near_runtime=self.runtimes[0], far_runtime=self.runtimes[1], stream_from=self.stream_from,
        )  # fmt: skip


def made_whole(group: Group, found: Sequence[tuple[str, torch.nn.Module]]) -> None:
    """Give experts that were prepared before their weights back.

    Raises UsageError on several ranks, InputError for a model without experts.
    """
    if not found:
        raise InputError("gpu_experts is given, but the model has no experts that Tilecast runs")
    if group.world_size > 1:
        raise UsageError(f"gpu_experts is for one process, not for {group.world_size} ranks; leave one of both out")
    for _, module in found:
        state = adapted_of(module)
        if state is not None:
            state.restore(module, quantized=True)
            module.__dict__.pop(STATE)


def placeable(
    found: Sequence[tuple[str, torch.nn.Module]],
    forms: Sequence[tuple[Form | None, tuple[ExpertLayer, ...], str | None]],
    reasons: Sequence[str | None],
) -> list[Inspected]:
    """Return the modules that one layer's kernels run; the others stay whole, with the rest of the model.

    Raises InputError if that are all.
    """
    kept: list[Inspected] = []
    for (name, module), (form, own, _), reason in zip(found, forms, reasons, strict=True):
        if form is not None and reason is None and len(own) == 1:
            kept.append((name, module, form, own[0]))
        elif reason is None:
            logger.warning("%s stays whole, as its own code runs between the GEMMs", name)
    if not kept:
        why = next((reason for reason in reasons if reason), "its own code runs between the GEMMs")
        raise InputError(f"gpu_experts is given, but no experts of the model can be placed: {why}")
    return kept


def kind_of(places: Mapping[str, PlacedModule]) -> str | None:
    """Return the kind of the near device, None where nothing is placed."""
    return next((place.near.type for place in places.values()), None)


def place_model(model: torch.nn.Module, found: Sequence[Inspected], choice: Choice) -> dict[str, PlacedModule]:
    """Move all but the weights of `found` to the near device, choose which experts follow, and return it by name.

    Raises InputError for a choice that does not fit the model, DeviceError for more than what is free there.
    """
    near = choice.near or near_device()
    candidates = []
    for place, (name, _, _, layer) in enumerate(found):
        match = LAYER.search(f"{name}.")
        index = int(match[1]) if match else place
        candidates.append(Candidate(index=index, name=name, layer=layer, expert_bytes=expert_bytes(layer, near)))
    with _experts_held_back([(module, form) for _, module, form, _ in found]):
        model.to(near)
    free = free_bytes(near)
    ids = near_ids(choice, candidates, room(free))
    _check_room(candidates, ids, near, free)
    return {
        name: PlacedModule(name=name, index=candidate.index, form=form, layer=layer, near_experts=chosen, near=near)
        for (name, _, form, layer), candidate, chosen in zip(found, candidates, ids, strict=True)
    }


def adapt_placed(module: torch.nn.Module, place: PlacedModule) -> PlacedAdapted:
    """Put a module's experts where they are to be, and return what runs them. Raises what `place_experts` raises."""
    runtimes = runtime_module.current(place.near.type), runtime_module.current(FAR.type)
    return _adapted(module, place, runtimes, place.layer.top_k)


def place_again(module: torch.nn.Module, known: PlacedAdapted, top_k: int) -> PlacedAdapted:
    """Place a module's experts once more: it was copied, cast or moved, or has new weights.

    What was near is where the module's parameters now are. The module is whole there for a moment.
    """
    with torch.inference_mode(False):
        known.restore(module, quantized=True)
    form = known.place.form
    near = local(module.get_parameter(form.names[1])).device
    (layer,) = plain_weights(module, form).layers(form, top_k)
    runtimes = known.runtimes
    if near.type != known.place.near.type:
        runtimes = runtime_module.current(near.type), runtimes[1]
    return _adapted(module, replace(known.place, near=near, layer=layer), runtimes, top_k)


def _adapted(
    module: torch.nn.Module, place: PlacedModule, runtimes: tuple[Runtime, Runtime], top_k: int
) -> PlacedAdapted:
    state = PlacedAdapted(module, place, runtimes)
    # Not in inference mode: what is made there could not be copied, cast or written to later.
    with torch.inference_mode(False):
        state.prepare(module, runtimes[0], top_k)
    module.__dict__[STATE] = state
    return state


def placed_modules(model: torch.nn.Module) -> tuple[PlacedAdapted, ...]:
    """Return what runs the modules of a model whose experts are on two devices, in model order."""
    return tuple(state for state in map(adapted_of, model.modules()) if isinstance(state, PlacedAdapted))


def near_device() -> torch.device:
    """Return the current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else FAR


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Imported here: what loads models builds on this module.
    from tilecast.engine.load import available_memory

    return available_memory()


def expert_bytes(layer: ExpertLayer, device: torch.device) -> int:
    """Return the bytes of one expert's weights on a device, in the largest layout that a kernel may store them in."""
    here = environment_for(device)
    whole = sum(runtime_module.default_registry().largest_stack(gemm, here) for gemm in layer.gemms)
    return -(-whole // layer.experts)


def room(free: int | None) -> int | None:
    """Return how many of the bytes that are free near `auto` takes for experts."""
    return None if free is None else free - max(RESERVE_BYTES, int(free * RESERVE_SHARE))


def announce_placement(places: Mapping[str, PlacedModule], choice: Choice) -> None:
    """Say in one line what is where, and how that was chosen."""
    first = next(iter(places.values()))
    numbers = sorted({len(place.near_experts) for place in places.values()})
    shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    experts = sorted({place.layer.experts for place in places.values()})
    if isinstance(choice.experts, Mapping):
        chosen = f"as {choice.source} says"
    elif choice.record is not None:
        chosen = f"the hottest by {choice.source}"
    else:
        chosen = "the first ones, as no counts were given"
    alike = first.near.type == FAR.type
    announce(
        logger, "%s of %s experts of each of %d layers are near (%s), %s; %s%s",
        shown, "/".join(map(str, experts)), len(places), first.near, chosen,
        "none is far" if numbers[0] >= experts[-1] else f"the others are far ({FAR})",
        "; there is no GPU here, so both parts run on the CPU" if alike else "",
    )  # fmt: skip


def announce_break_evens(model: torch.nn.Module) -> None:
    """Say, in a line for each distinct layer whose shares the table has times of, when sending weights is faster."""
    for shares, state in {state.place.shares: state for state in placed_modules(model)}.items():
        if shares.far is None:
            continue
        found = break_even_in(*state.runtimes, shares, state.place.near)
        if found.bytes_per_second is not None:
            kept = found.tokens is not None and not may_stream(*state.runtimes, shares)
            why = "; they stay far, as under reproducible bits must not depend on the number of tokens" if kept else ""
            announce(logger, "%s%s", break_even_line(shares, found), why)


def _joined(experts: PlacedExperts) -> PlainExperts:
    """Return the plain weights of both shares as one, in the CPU's memory and in the order of ids."""
    shares = [(ids, part.plain()) for ids, part in experts.shares]
    tensors = []
    for halves in zip(*(plain.tensors for _, plain in shares), strict=True):
        whole = torch.empty((experts.layer.experts, *halves[0].shape[1:]), dtype=halves[0].dtype)
        for (ids, _), half in zip(shares, halves, strict=True):
            for expert, own in zip(ids, half, strict=True):
                whole[expert].copy_(own)
        tensors.append(whole)
    return shares[0][1].with_tensors(tensors)


@contextmanager
def _experts_held_back(modules: Sequence[tuple[torch.nn.Module, Form]]) -> Iterator[None]:
    """Take experts' weights out of their modules, so that moving the model leaves them where they are."""
    held: list[tuple[torch.nn.Module, dict[str, Any], Any]] = []
    for module, form in modules:
        weights = {name: module._parameters[name] for name in form.names}
        held.append((module, weights, module.__dict__.pop(STACKS, None)))
        for name in weights:
            module._parameters[name] = None
    try:
        yield
    finally:
        for module, weights, stacks in held:
            module._parameters.update(weights)
            if stacks is not None:
                module.__dict__[STACKS] = stacks


def _check_room(
    candidates: Sequence[Candidate], ids: Sequence[tuple[int, ...]], near: torch.device, free: int | None
) -> None:
    needed = sum(candidate.expert_bytes * len(chosen) for candidate, chosen in zip(candidates, ids, strict=True))
    # On the CPU they are in its memory already.
    if near.type != FAR.type and free is not None and needed > free:
        raise DeviceError(
            f"the near experts need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {near} beside the "
            f"rest of the model; place fewer, or {AUTO}"
        )
