"""The adapter for transformers: `experts_implementation="tilecast"` runs a model's experts on the tuned kernels.

Everything that depends on transformers' own code is in this file and `transformers_facts`: the registry of experts
functions (`transformers.integrations.moe.ExpertsInterface`), where a model's loading ends, and what its experts modules
are. Tested with 5.17 to 5.23.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tilecast.canonical import canonical_json
from tilecast.engine import runtime as runtime_module
from tilecast.engine.adapted import STATE, Adapted, adapt, adapted_of
from tilecast.engine.adapted_model import AdaptedModel, AdaptedModule, log_adapted
from tilecast.engine.agreement import check_coverage, process_group, startup
from tilecast.engine.around import give_back, take_over
from tilecast.engine.expert_module import Form, Unsupported, form_of, local, plain_weights
from tilecast.engine.float32_routers import keep_router_in_float32
from tilecast.engine.group import Group
from tilecast.engine.late_fallbacks import remember_models, warn_late
from tilecast.engine.placed_choice import Asked, Choice, Shares, as_choice
from tilecast.engine.placed_model import (
    PlacedAdapted,
    adapt_placed,
    announce_break_evens,
    announce_placement,
    kind_of,
    made_whole,
    place_again,
    place_model,
    placeable,
)
from tilecast.engine.quantized_loading import load_quantized
from tilecast.engine.quantized_module import make_dense
from tilecast.engine.table_runtime import Runtime
from tilecast.engine.transformers_facts import import_part, is_experts, summed, values_of
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import InputError, UsageError
from tilecast.problem import ExpertLayer
from tilecast.settings import Settings

logger = logging.getLogger(__name__)

NAME = "tilecast"
OTHERWISE = "grouped_mm"
"""What runs experts that the tuned kernels do not: the implementation that transformers itself takes by default."""
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass
class _Options:
    registered: bool = False
    release: bool = True
    float32_router: bool = False
    experts_only: bool = False
    settings: Settings | None = None
    placement: Choice | None = None


_options = _Options()


def register_transformers(
    *,
    release: bool = True,
    float32_router: bool = False,
    experts_only: bool = False,
    settings: Settings | None = None,
) -> None:
    """Make `experts_implementation="tilecast"` known to transformers; calling it again changes the options.

    A model loaded with it (`from_pretrained`), or switched to it (`set_experts_implementation`), is started up as the
    `TM_GEMM_*` variables say, by all ranks together, and its experts are packed as the table wants. `release` gives
    the memory of the weights as they were loaded back, where the packed ones replace them. `float32_router` keeps
    router logits in float32 where the model's own code rounds them to its dtype, which changes who is routed where.
    On a CPU linears, norms and attention in 16 bits run on Tilecast's kernels, too (`engine/around.py`), with their
    bits; `experts_only` leaves them to torch.
    `settings` replace the environment's, and then a table that is in use already, too.
    Raises UsageError where transformers is missing or too old.
    """
    _options.release, _options.float32_router, _options.settings = release, float32_router, settings
    _options.experts_only = experts_only
    _register()


@contextmanager
def started_by(
    settings: Settings | None, placement: Choice | None = None, experts_only: bool | None = None
) -> Iterator[None]:
    """Have models of the block started up as `settings` say, where given; a program's own options stay as they are.

    With a `placement` some of their experts are near, and the others on the CPU. `experts_only` None is the program's.
    """
    _register()
    before = _options.settings, _options.placement, _options.experts_only
    _options.settings, _options.placement = settings or before[0], placement
    _options.experts_only = before[2] if experts_only is None else experts_only
    try:
        with runtime_module.lent() if settings is not None else nullcontext():
            yield
    finally:
        _options.settings, _options.placement, _options.experts_only = before


def _register() -> None:
    if _options.registered:
        return
    moe = import_part("transformers.integrations.moe")
    moe.ExpertsInterface.register(NAME, experts_forward)
    models = import_part("transformers").PreTrainedModel
    _after_loading(models)
    remember_models(models, experts_modules)
    _options.registered = True


def experts_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return a model's experts modules that transformers dispatches by `experts_implementation`, with their names."""
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def prepare_model(
    model: torch.nn.Module,
    *,
    release: bool | None = None,
    float32_router: bool | None = None,
    experts_only: bool | None = None,
    gpu_experts: Asked | Choice | None = None,
) -> AdaptedModel:
    """Start up for a model that is loaded and pack its experts; `from_pretrained` does it where it is registered.

    Needed by hand for a model that was built otherwise and is to be compiled. All ranks must call it. An experts module
    that the tuned kernels do not run, on any rank, falls back to transformers' grouped_mm on all of them, and the
    reason is logged once. Raises what `startup` raises.

    `gpu_experts` keeps that many experts of each layer on the GPU and the others on the CPU: a number, `auto`, a file
    or ids by layer, as `placed_choice.read_choice` says; where there is no GPU both parts run on the CPU. The model is
    best in the CPU's memory then: what belongs on the GPU is moved there. Raises UsageError on several ranks.
    """
    choice = _options.placement if gpu_experts is None else as_choice(gpu_experts)
    release = _options.release if release is None else release
    float32_router = _options.float32_router if float32_router is None else float32_router
    found = [(name, module) for name, module in experts_modules(model) if _asks_for_us(module)]
    group = process_group()
    with group.guard():
        if choice is not None:
            made_whole(group, found)
        for _, module in found:
            known = adapted_of(module)
            if known is not None:
                # Prepared before: its own parameters may hold nothing.
                known.restore(module, quantized=True)
        forms = [_inspected(module, _top_k_of(model, name, module)) for name, module in found]
        reasons = _shared_reasons(group, [reason for _, _, reason in forms])
        places = {} if choice is None else place_model(model, placeable(found, forms, reasons), choice)
        runs = [
            places[name].near_layers if name in places else own
            for (name, _), (_, own, _) in zip(found, forms, strict=True)
        ]
        layers = [
            layer
            for (name, _), own, reason in zip(found, runs, reasons, strict=True)
            if not reason and name not in places
            for layer in own
        ]
        shares = None if choice is None else [place.shares for place in places.values()]
        runtime = _start(group, layers, kind_of(places) or _kind(found[0][1]), shares) if places or layers else None
        for (name, module), (form, own, _), reason in zip(found, forms, reasons, strict=True):
            if name in places:
                adapt_placed(module, places[name])
                continue
            state = adapt(module, reason, form) if reason or form else None
            if state is not None and reason is None:
                kind = _kind(module)
                state.prepare(
                    module,
                    runtime_module.current(kind),
                    own[0].top_k,
                    release=release,
                    summed=summed(module, form, model),
                )
        if group.world_size > 1:
            # Nobody runs a collective of the model before all have packed.
            group.gather("experts packed", b"")
    if float32_router:
        for name, module in found:
            keep_router_in_float32(model, name, module)
    ours = [name for (name, _), reason in zip(found, reasons, strict=True) if not reason]
    if ours and not (_options.experts_only if experts_only is None else experts_only):
        take_over(model, ours)
    else:
        give_back(model)
    modules = tuple(
        AdaptedModule(name=name, layers=() if reason else own, reason=reason)
        for (name, _), own, reason in zip(found, runs, reasons, strict=True)
    )
    adapted = AdaptedModel(modules=modules, runtime=runtime)
    if group.rank == 0:
        log_adapted(adapted, OTHERWISE)
        if choice is not None:
            announce_placement(places, choice)
            announce_break_evens(model)
    return adapted


def restore_model(model: torch.nn.Module) -> None:
    """Give a model's experts their own weights back, for another implementation or for training, and torch the rest."""
    for _, module in experts_modules(model):
        state = adapted_of(module)
        if state is not None:
            state.restore(module)
            _forget(module)
    give_back(model)


def experts_forward(self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run an experts module of transformers: hidden [T, H], ids [T, k], weights [T, k] to a fresh [T, H].

    What transformers calls for `experts_implementation="tilecast"`. Ids of no local expert count as absent.
    """
    ids, weights = _routing(args, kwargs)
    state = adapted_of(self)
    if state is None or (not torch.compiler.is_compiling() and not state.fits(self)):
        state = _prepare_late(self, ids.shape[-1])
    if state.reason is not None:
        otherwise = import_part("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS[OTHERWISE]
        out: torch.Tensor = otherwise(self, hidden_states, ids, weights)
        return out
    return state(hidden_states, ids, weights)


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights, which families pass by place or by a name of their own."""
    found = [*args, *kwargs.values()]
    more = sum(value is not None for value in found[2:])
    if more:
        raise InputError(
            f"experts are called with {more} more operand{'s' * (more > 1)} than hidden states, expert ids and routing "
            f"weights, which Tilecast has no use for; run this model's experts on {OTHERWISE}"
        )
    if len(found) < 2 or not all(isinstance(value, torch.Tensor) for value in found[:2]):
        raise InputError("experts are called with hidden states, expert ids and routing weights")
    ids, weights = found[0], found[1]
    return (weights, ids) if ids.dtype.is_floating_point and not weights.dtype.is_floating_point else (ids, weights)


# Preparing -------------------------------------------------------------------------------------------------


def _prepare_late(module: torch.nn.Module, top_k: int) -> Adapted:
    """Prepare a module that no loading prepared, or whose weights have changed since: all ranks come here together."""
    if torch.compiler.is_compiling():
        raise UsageError("prepare the model before it is compiled: tilecast.prepare_model(model)")
    known = adapted_of(module)
    if isinstance(known, PlacedAdapted):
        return place_again(module, known, top_k)
    if known is not None:
        known.restore(module, quantized=True)
    group = process_group()
    with group.guard():
        form, _, reason = _inspected(module, top_k)
        (reason,) = _shared_reasons(group, [reason])
        state = adapt(module, reason, form)
        if reason is None:
            kind = _kind(module)
            added = summed(module, form, module)
            own = None if known is None else known.runtime
            if own is None or own.environment.device_kind != kind:
                own = runtime_module.current(kind)
            state.prepare(module, own, top_k, release=_options.release, summed=added)
        else:
            warn_late(
                module, reason, lambda model: [found for found in experts_modules(model) if _asks_for_us(found[1])],
                reason_of=lambda other: None if adapted_of(other) is not None else _inspected(other, top_k)[2],
                seen_reason=lambda other: None if (seen := adapted_of(other)) is None else seen.reason,
                otherwise=OTHERWISE,
            )  # fmt: skip
    return state


def _inspected(module: torch.nn.Module, top_k: int) -> tuple[Form | None, tuple[ExpertLayer, ...], str | None]:
    """Return a module's form and layers, or why it has none."""
    try:
        form = form_of(module)
        device = local(getattr(module, form.names[1])).device.type
        if device not in ("cpu", "cuda"):
            raise Unsupported(f"its weights are on {device}")
        return form, plain_weights(module, form).layers(form, top_k), None
    except (Unsupported, InputError) as error:
        return None, (), str(error)


def _shared_reasons(group: Group, reasons: list[str | None]) -> list[str | None]:
    """Return for each module the first rank's reason to fall back, so that none runs what another does not."""
    if group.world_size == 1:
        return reasons
    everyone = [json.loads(seen) for seen in group.gather("fallbacks", canonical_json(list(reasons)).encode("ascii"))]
    if any(len(theirs) != len(reasons) for theirs in everyone):
        raise UsageError("ranks have models with different numbers of expert layers; start all with the same model")
    shared: list[str | None] = []
    for place in range(len(reasons)):
        seen = [(rank, theirs[place]) for rank, theirs in enumerate(everyone) if theirs[place]]
        only = len(seen) < len(everyone)
        shared.append((f"rank {seen[0][0]}: {seen[0][1]}" if only else seen[0][1]) if seen else None)
    return shared


def _kind(module: torch.nn.Module) -> str:
    """Return the kind of device that a module's weights are on."""
    return local(next(module.parameters())).device.type


def _start(group: Group, layers: list[ExpertLayer], kind: str, shares: list[Shares] | None) -> Runtime:
    """Do what the environment variables ask for, or take the table that is in use already."""
    if _options.settings is None:
        runtime_module.own_again()
    settings = _options.settings or Settings.from_environment()
    if _options.settings is None and runtime_module.in_use() and settings.tune is None and settings.miss != "tune":
        found = runtime_module.current(kind)
        check_coverage(group, found, layers)
        return found
    environment: Environment | None = cpu_environment() if kind == "cpu" else None
    return startup(layers, settings, group=group, environment=environment, placed=shares)


def _top_k_of(model: torch.nn.Module, name: str, module: torch.nn.Module) -> int:
    """Return how many experts a token is routed to, as the modules around say; a call with another number may come."""
    parent = model.get_submodule(name.rpartition(".")[0])
    around = [parent, *(child for child in parent.children() if child is not module), module]
    configs = [getattr(module, "config", None), getattr(model, "config", None)]
    for holder in [*around, *configs]:
        for attribute in TOP_K_NAMES:
            for value in values_of(holder, attribute):
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return 1


# transformers itself -------------------------------------------------------------------------------------------


def _asks_for_us(module: torch.nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_experts_implementation", None) == NAME


def _after_loading(model_class: Any) -> None:
    """Prepare models where transformers ends loading them, or switches their experts."""
    load = model_class.__dict__["from_pretrained"].__func__
    switch = model_class.set_experts_implementation

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # The Auto classes hand it on within the config.
        given = getattr(kwargs.get("config"), "_experts_implementation_internal", None)
        asked = NAME in (kwargs.get("experts_implementation"), given)
        if asked and _options.settings is None:
            # A variable that cannot be understood is found out before the weights are read.
            Settings.from_environment()
        loaded = load_quantized(load, cls, args, kwargs, name=NAME, find=experts_modules)
        if loaded is None:
            loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if any(_asks_for_us(module) for _, module in experts_modules(model)):
            prepare_model(model)
        elif asked:
            logger.warning("%s has no experts that transformers lets others run", type(model).__name__)
        return loaded

    @functools.wraps(switch)
    def set_experts_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = switch(self, *args, **kwargs)
        modules = [module for _, module in experts_modules(self)]
        for module in modules:
            state = adapted_of(module)
            if state is not None and not _asks_for_us(module):
                state.restore(module)
                _forget(module)
            elif not _asks_for_us(module):
                make_dense(module)
        if any(_asks_for_us(module) and adapted_of(module) is None for module in modules):
            prepare_model(self)
        elif not any(_asks_for_us(module) for module in modules):
            give_back(self)
        return done

    model_class.from_pretrained = classmethod(from_pretrained)
    model_class.set_experts_implementation = set_experts_implementation


def _forget(module: torch.nn.Module) -> None:
    module.__dict__.pop(STATE, None)
