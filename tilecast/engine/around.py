"""What lies around the experts of somebody else's model on a CPU: linears on packed weights, attention in 16 bits.

torch reads weights of one row at half of the memory's speed, and bf16 attention of one query far below it. Both parts
run as under `invariant()`, with its bits: a row's do not depend on the other rows. They differ from torch's own in the
order of sums alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F

from tilecast.engine.invariant_attention import attention_forward
from tilecast.kernels.cpu.packed_linear import PackedLinear

STATE = "_tilecast_linear"
"""The attribute of a linear that holds its packed weight."""
ATTENDS = "_tilecast_attends"
"""The attribute of a module whose attention in 16 bits Tilecast runs."""
LEAST_WEIGHTS = 1 << 16
"""Weights of a linear below which what a call costs outweighs what reading them faster gives."""
SAMPLES = 6
"""Rows, and columns, of a weight whose values tell a change that torch counts nowhere, such as an adapter's merge."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SDPA = "sdpa"


class _State:
    """A linear's packed weight, and what it was packed from."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = PackedLinear(weight)
        self.seen = _fingerprint(weight)
        # What `weight.data` is used for changes values that torch counts no version of: a few of them are looked at.
        values = weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16).numpy()
        rows, columns = (max(1, size // SAMPLES) for size in values.shape)
        self._sample = values[::rows, ::columns]
        self._values = self._sample.tobytes()

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether the packed copy is still that of `weight`, as far as its version and some of its values tell."""
        return _fingerprint(weight) == self.seen and self._sample.tobytes() == self._values

    def __deepcopy__(self, memo: dict[int, object]) -> _State:
        copied = _State.__new__(_State)
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A linear that is saved whole is torch's when it is loaded, until its model is prepared.
        return _nothing, ()


def _nothing() -> None:
    return None


class TilecastLinear(torch.nn.Linear):
    """A linear whose packed weight runs it where no gradients are recorded, and torch elsewhere."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's own name
        """Return input · weightᵀ + bias, [..., N], of input [..., K]."""
        weight, bias = self.weight, self.bias
        state: _State | None = self.__dict__.get(STATE)
        if (
            state is None
            or torch.compiler.is_compiling()
            or type(input) is not torch.Tensor
            or input.dtype is not weight.dtype
            or input.device.type != "cpu"
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, weight, bias)
        if not state.is_of(weight):
            if not _packable(self):
                return F.linear(input, weight, bias)
            state = self.__dict__[STATE] = _State(weight)
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        return state.packed(rows, bias).view(*input.shape[:-1], weight.shape[0])


def take_over(model: torch.nn.Module, experts: Iterable[str]) -> int:
    """Run a model's linears and attention on Tilecast's kernels from now on; return the bytes of the packed copies.

    Linears that are on the CPU, large enough and torch's own class get a packed copy beside their weight, which stays
    as it is; attention that goes through transformers' `sdpa` is taken in bf16 and fp16. Routers, the linears beside
    the `experts` modules (names) with an output for each expert, stay torch's: who is routed where is theirs to say.
    """
    total, routers = 0, {linear for name in experts for linear in _routers(model, name)}
    for module in model.modules():
        if module in routers:
            continue
        if _packable(module):
            state = module.__dict__[STATE] = _State(cast(torch.Tensor, module.weight))
            module.__class__ = TilecastLinear
            total += state.packed.nbytes
        elif hasattr(module, "is_causal") or hasattr(module, "num_key_value_groups"):
            # What transformers' sdpa function looks at.
            module.__dict__[ATTENDS] = True
    _offer_attention()
    return total


def _routers(model: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    experts = model.get_submodule(name)
    count = getattr(experts, "num_experts", None)
    for child in model.get_submodule(name.rpartition(".")[0]).children():
        for module in child.modules() if child is not experts else ():
            if isinstance(module, torch.nn.Linear) and (count is None or module.out_features == count):
                yield module


def give_back(model: torch.nn.Module) -> None:
    """Run a model's linears and attention as they ran before `take_over`."""
    for module in model.modules():
        module.__dict__.pop(ATTENDS, None)
        module.__dict__.pop(STATE, None)
        if type(module) is TilecastLinear:
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]


@contextmanager
def as_before(model: torch.nn.Module) -> Iterator[None]:
    """Run a model's linears and attention as before `take_over` meanwhile, keeping the packed copies."""
    held = [
        (module.__dict__, name) for module in model.modules() for name in (STATE, ATTENDS) if name in module.__dict__
    ]
    kept = [found.pop(name) for found, name in held]
    try:
        yield
    finally:
        for (found, name), value in zip(held, kept, strict=True):
            found[name] = value


def _packable(module: torch.nn.Module) -> bool:
    if type(module) not in (torch.nn.Linear, TilecastLinear) or "forward" in module.__dict__:
        # Other classes and replaced forwards compute something else: adapters, quantised weights, offloading.
        return False
    weight = module.weight
    return (
        type(weight) in (torch.nn.Parameter, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.dtype in KERNEL_DTYPES
        and weight.numel() >= LEAST_WEIGHTS
        and weight.dim() == 2
        and all(weight.stride())
    )


def _fingerprint(weight: torch.Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape


# Attention ---------------------------------------------------------------------------------------------------


@functools.cache
def _offer_attention() -> None:
    """Have transformers' `sdpa` ask, for each call, whether the module is one of those taken over."""
    functions: Any = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    theirs = functions[SDPA]

    @functools.wraps(theirs)
    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,  # transformers' own name: some models give it as a keyword
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        asked = ATTENDS in getattr(module, "__dict__", ()) and not args
        if asked and _attends(query, key, value, attention_mask, kwargs):
            return attention_forward(module, query, key, value, attention_mask, **kwargs)
        return theirs(module, query, key, value, attention_mask, *args, **kwargs)

    functions.register(SDPA, forward)


def _attends(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, options: dict[str, Any]
) -> bool:
    """Whether the kernel takes these operands; nothing may be recorded for gradients, dropped out or paged."""
    if torch.compiler.is_compiling() or type(query) is not torch.Tensor or query.device.type != "cpu":
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    if any(options.get(name) is not None for name in ("cache", "position_bias", "s_aux", "softcap")):
        return False
    fits = query.dim() == key.dim() == value.dim() == 4 and query.dtype == key.dtype == value.dtype
    return (
        fits
        and not options.get("dropout")
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-1] >= key.shape[2]))
    )
