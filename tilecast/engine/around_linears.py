"""Linears of somebody else's model on packed weights, those that read the same rows together.

torch reads weights of one row at half of the memory's speed. A linear's bits are those of `invariant()`: they do not
depend on the other rows, nor on the linears that run in the same launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import as_strided

from tilecast.engine.around_operands import KERNEL_DTYPES, is_plain
from tilecast.kernels.cpu.packed_linear import PackedLinear, packed_together

STATE = "_tilecast_linear"
"""The attribute of a linear that holds its packed weight."""
LEAST_WEIGHTS = 1 << 16
"""Weights of a linear below which what a call costs outweighs what reading them faster gives."""
SAMPLES, SAMPLE_WIDTH = 6, 16
"""Places of a weight, and values of each, that tell a change that torch counts nowhere, such as an adapter's merge."""
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)  # fmt: skip
"""Names of linears of one module that usually read the same rows; whether they do is seen at each call."""
MOST_MISSES = 8
"""Launches of several linears of which some were not asked for, after which each runs by itself."""


class _State:
    """A linear's packed weight, and what it was packed from."""

    def __init__(self, weight: torch.Tensor, packed: PackedLinear | None = None) -> None:
        self.packed = packed or PackedLinear(weight)
        self.together: _Together | None = None
        self._seen = _fingerprint(weight)
        # What `weight.data` is used for changes values that torch counts no version of: a few of them are looked at,
        # in places on a diagonal, since each place costs a miss of the cache.
        values = weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16).numpy()
        count, width = min(SAMPLES, values.shape[0]), min(SAMPLE_WIDTH, values.shape[1])
        last = max(1, count - 1)
        steps = [(size - taken) // last for size, taken in zip(values.shape, (1, width), strict=True)]
        step = sum(step * stride for step, stride in zip(steps, values.strides, strict=True))
        self._sample: Any = as_strided(values, (count, width), (step, values.strides[1]), writeable=False)
        self._values = self._sample.tobytes()

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether the packed copy is still that of `weight`, as far as its version and some of its values tell."""
        return _fingerprint(weight) == self._seen and self._sample.tobytes() == self._values

    def __deepcopy__(self, memo: dict[int, object]) -> _State:
        copied = _State.__new__(_State)
        copied.__dict__.update(self.__dict__)
        # Its neighbours are those of the module that it was copied from.
        copied.together = None
        return copied

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A linear that is saved whole is torch's when it is loaded, until its model is prepared.
        return _nothing, ()


def _nothing() -> None:
    return None


class _Together:
    """Linears of one module on one packed weight, all of which run at the first that is called with a row."""

    def __init__(self, linears: Sequence[torch.nn.Linear], packed: PackedLinear) -> None:
        self._linears, self._packed = linears, packed
        self._sizes = [linear.out_features for linear in linears]
        self._firsts = [sum(self._sizes[:place]) for place in range(len(linears))]
        self._states: list[_State] = [linear.__dict__[STATE] for linear in linears]
        # The row, its bytes, and what of the results nobody has asked for yet.
        self._pending: tuple[torch.Tensor, bytes, dict[int, torch.Tensor]] | None = None
        self._misses = 0

    def run(self, linear: torch.nn.Linear, row: torch.Tensor) -> torch.Tensor | None:
        """Return a linear's result for one row [..., K]; None where it has to run by itself."""
        # Another row may lie where the last one did, and one may be changed between two calls.
        content = ctypes.string_at(row.data_ptr(), row.numel() * row.itemsize)
        pending = self._pending
        if pending is not None and pending[0] is row and pending[1] == content:
            found = pending[2].pop(id(linear), None)
            if not pending[2]:
                self._pending = None
            if found is not None:
                return found
        self._misses += pending is not None and bool(pending[2])
        if self._misses > MOST_MISSES or not all(map(_State.is_of, self._states, map(_weight_of, self._linears))):
            self.part()
            return None
        biases = [linear.bias for linear in self._linears] if linear.bias is not None else []
        if any(bias is None for bias in biases):
            self.part()
            return None
        out = self._packed.one_row(row, list(zip(self._firsts, biases, strict=False)))
        split = torch.split_with_sizes(out, self._sizes, -1)
        parts = {id(one): part for one, part in zip(self._linears, split, strict=True)}
        own = parts.pop(id(linear))
        self._pending = row, content, parts
        return own

    def part(self) -> None:
        """Have each linear run by itself from now on."""
        self._pending = None
        for state in self._states:
            state.together = None


class TilecastLinear(torch.nn.Linear):
    """A linear whose packed weight runs it where no gradients are recorded, and torch elsewhere."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's own name
        """Return input · weightᵀ + bias, [..., N], of input [..., K]."""
        state: _State | None = self.__dict__.get(STATE)
        if state is None or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        weight, bias = _weight_of(self), self.bias
        if not is_plain(input, weight):
            return F.linear(input, weight, bias)
        is_row = input.numel() == weight.shape[1] == input.shape[-1] and input.is_contiguous()
        if is_row and state.together is not None:
            found = state.together.run(self, input)
            if found is not None:
                return found
        if not state.is_of(weight):
            if not is_packable(self):
                return F.linear(input, weight, bias)
            state = self.__dict__[STATE] = _State(weight)
        if is_row:
            return state.packed.one_row(input, () if bias is None else ((0, bias),))
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        return state.packed(rows, bias).view(*input.shape[:-1], weight.shape[0])


def _weight_of(linear: torch.nn.Linear) -> torch.Tensor:
    # Modules look their parameters up slowly; what replaced one is no parameter.
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def take_linears(modules: Sequence[torch.nn.Module]) -> int:
    """Give those of the modules that are linears packed weights; return the bytes of the packed copies."""
    taken = [module for module in modules if is_packable(module)]
    left = dict.fromkeys(taken)
    for module, names in product(modules, TOGETHER):
        found = [module._modules.get(name) for name in names]
        if all(one in left for one in found) and _take_together(cast("list[torch.nn.Linear]", found)):
            for one in found:
                left.pop(cast(torch.nn.Module, one))
    for linear in left:
        linear.__dict__[STATE] = _State(cast(torch.Tensor, linear.weight))
        linear.__class__ = TilecastLinear
    return sum(linear.__dict__[STATE].packed.nbytes for linear in taken)


def _take_together(linears: Sequence[torch.nn.Linear]) -> bool:
    """Pack linears as one where their sizes allow it, and return whether they do."""
    biased = sum(linear.bias is not None for linear in linears)
    packed = packed_together([linear.weight for linear in linears]) if biased in (0, len(linears)) else None
    if packed is None:
        return False
    whole, parts = packed
    for linear, part in zip(linears, parts, strict=True):
        linear.__dict__[STATE] = _State(linear.weight, part)
        linear.__class__ = TilecastLinear
    together = _Together(linears, whole)
    for linear in linears:
        linear.__dict__[STATE].together = together
    return True


def give_linear_back(module: torch.nn.Module) -> None:
    """Have a linear run as torch's own again."""
    module.__dict__.pop(STATE, None)
    if type(module) is TilecastLinear:
        module.__class__ = torch.nn.Linear  # type: ignore[assignment]  # to mypy it stays what it was checked to be


def is_packable(module: torch.nn.Module) -> bool:
    """Whether a module is a linear that can run on a packed weight."""
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
