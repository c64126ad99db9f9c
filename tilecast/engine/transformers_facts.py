"""What transformers' own code is like, where versions and families differ: its modules, its collectives, its age."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch

from tilecast.engine.expert_module import Form
from tilecast.errors import UsageError

LEAST_VERSION = (5, 17)


def import_part(name: str) -> Any:
    """Import a module of transformers. Raises UsageError where it is missing or too old."""
    try:
        version = importlib.metadata.version("transformers")
        found = importlib.import_module(name)
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise UsageError(f"transformers cannot be imported ({error}); install tilecast[hf]") from error
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LEAST_VERSION:
        raise UsageError(f"transformers is {version}, expected at least {'.'.join(map(str, LEAST_VERSION))}")
    return found


def values_of(config: Any, field: str) -> list[Any]:
    """Return the values that a config has of a field: one, or one of each layer where a family says so; none if none.

    Such configs raise an error of their own where they are asked for the one value of a field that differs.
    """
    try:
        return [getattr(config, field)] if hasattr(config, field) else []
    except RuntimeError:
        return list(dict.fromkeys(getattr(layer, field, None) for layer in getattr(config, "per_layer_config", ())))


def summed(module: torch.nn.Module, form: Form | None, model: torch.nn.Module) -> bool:
    """Whether transformers adds the ranks' outputs of a module that is split over them.

    It does not where it brings each token to its experts' ranks and back: always from 5.18 to 5.20, on demand before
    and after; then ranks call their experts with different tokens. It also does that while gradients are recorded.
    """
    if form is None or form.split != "experts":
        return True
    configs = [getattr(holder, "config", None) for holder in (module, model)]
    plans = [getattr(config, "base_model_ep_plan", None) or {} for config in configs]
    asked = next((found for config in configs if (found := getattr(config, "distributed_config", None))), None)
    options: dict[str, Any] = {} if asked is None else asked if isinstance(asked, dict) else vars(asked)
    styles = {style for plan in [*plans, options.get("ep_plan") or {}] for style in plan.values()}
    if "ep_dispatch_experts" not in styles:
        return True
    known = importlib.util.find_spec("transformers.distributed.expert_parallel") is not None
    same_batch = asked is not None and options.get("ep_size") == options.get("tp_size")
    if not known or not same_batch or options.get("ep_implementation", "auto") not in ("auto", "all_reduce"):
        return False
    module.register_forward_pre_hook(_without_gradients)
    return True


def _without_gradients(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take hidden states out of the graph, so that how tokens reach the experts does not depend on it."""
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module is one of those whose experts transformers lets others run."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")
