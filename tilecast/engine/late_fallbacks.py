"""Experts modules of models that nobody loaded, which are met one after the other in their first forward pass.

A module does not know the model that it is in, so models are remembered when transformers ends building them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

logger = logging.getLogger(__name__)

Find = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]
"""model -> its experts modules, with their names."""

_models: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()


def remember_models(model_class: Any, find: Find) -> None:
    """Have transformers' class of all models remember, for each experts module, the outermost model it is in."""
    built = model_class.post_init

    @functools.wraps(built)
    def post_init(self: nn.Module) -> None:
        built(self)
        # Of nested models the outer ones come later.
        for _, module in find(self):
            _models[module] = ref(self)

    model_class.post_init = post_init


def others_of(module: nn.Module, find: Find) -> list[nn.Module]:
    """Return the other experts modules of a module's model, none where that is not known."""
    known = _models.get(module)
    model = None if known is None else known()
    return [] if model is None else [other for _, other in find(model) if other is not module]


def warn_late(
    module: nn.Module,
    reason: str,
    find: Find,
    *,
    reason_of: Callable[[nn.Module], str | None],
    seen_reason: Callable[[nn.Module], str | None],
    otherwise: str,
) -> None:
    """Log once for a model that `module`, and how many like it, fall back for a reason.

    `seen_reason` is that of a module which was met before; `reason_of` finds that of one which was not.
    """
    others = others_of(module, find)
    if any(seen_reason(other) == reason for other in others):
        return
    # A reason that the ranks share names the rank in front of it.
    alike = [other for other in others if (found := reason_of(other)) is not None and reason.endswith(found)]
    number = 1 + len(alike)
    logger.warning("experts of %d layer%s fall back to %s: %s", number, "s" * (number > 1), otherwise, reason)
