"""Which modules of a transformers model are operations that `compare` looks at, found by their structure.

A decoder layer (`…layers.N`) is a block; its children are norms, attention (or what stands in its place, such as
a state-space mixer), MLPs and the MoE layer, which holds the router, the experts and what is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tilecast.errors import ModelError

KINDS = ("embedding", "norm", "attention", "router", "experts", "mlp", "moe", "block", "collective", "lm_head")
"""Kinds of operations; `moe` and `block` are what is left of them beside the operations inside: sums and products."""

_BLOCK = re.compile(r"(?:.*\.)?(?:layers|blocks|h)\.(\d+)")
_ROUTER = re.compile(r"router|gate|gating", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: the path of its module, its kind, and the decoder layer it is in (None: outside of them)."""

    name: str
    kind: str
    layer: int | None = None

    @property
    def label(self) -> str:
        """What people read: `layer 3 experts (mlp.experts)`."""
        inside = self.name.split(f".{self.layer}.", 1)[-1] if self.layer is not None else self.name
        place = f"layer {self.layer} {self.kind}" if self.layer is not None else self.kind
        return place if inside in (self.kind, self.name) else f"{place} ({inside})"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer, as transformers' experts interface has them."""
    return type(module).__name__.endswith("Experts") or all(
        hasattr(module, name) for name in ("has_gate", "is_transposed")
    )


def operations(model: nn.Module) -> list[tuple[Operation, nn.Module]]:
    """Return the operations of a causal language model with their modules. Raises ModelError if it has no block."""
    found = dict(_outer(model))
    modules = dict(model.named_modules())
    blocks = {name: match for name in modules if (match := _BLOCK.fullmatch(name))}
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    if not outermost:
        raise ModelError(f"{type(model).__name__} has no decoder layers named layers.N, so nothing to compare")
    for name in outermost:
        layer = int(blocks[name][1])
        found |= {Operation(name=path, kind=kind, layer=layer): part for path, kind, part in _block(name, modules)}
        found[Operation(name=name, kind="block", layer=layer)] = modules[name]
    return list(found.items())


def _outer(model: Any) -> Iterator[tuple[Operation, nn.Module]]:
    """Yield what stands outside of the blocks: the embedding, the last norm and the head."""
    single = {"embedding": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, module in model.named_modules():
        for kind, part in single.items():
            if part is module:
                yield Operation(name=name, kind=kind), module
        if _is_norm(module) and not any(_BLOCK.fullmatch(prefix) for prefix in _prefixes(name)):
            yield Operation(name=name, kind="norm"), module


def _block(block: str, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield path, kind and module of each operation in a block."""
    for child, module in modules[block].named_children():
        path = f"{block}.{child}"
        experts = [name for name in modules if name.startswith(f"{path}.") and is_experts(modules[name])]
        if experts:
            yield from _moe(path, experts[0], modules)
        elif _is_norm(module):
            yield path, "norm", module
        elif _MLP.search(child):
            yield path, "mlp", module
        elif any(True for _ in module.parameters()):
            yield path, "attention", module


def _moe(path: str, experts: str, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, nn.Module]]:
    home = experts.rpartition(".")[0]
    siblings = dict(modules[home].named_children())
    routers = [name for name, part in siblings.items() if _ROUTER.search(type(part).__name__)]
    routers = routers or [name for name in siblings if name in ("gate", "router")]
    for name, part in siblings.items():
        own = f"{home}.{name}"
        kind = "experts" if own == experts else "router" if name in routers else "norm" if _is_norm(part) else "mlp"
        if kind != "mlp" or any(True for _ in part.parameters()):
            yield own, kind, part
    yield path, "moe", modules[path]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])
