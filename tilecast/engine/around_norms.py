"""RMS norms of somebody else's model, each in one kernel call: with the bits that they have inside of `invariant()`.

Which modules are such norms, and of which form, is not told by their names: a module is run on rows that tell forms
apart, inside of `invariant()`, and taken where the kernel gives the very bits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tilecast.engine.around_operands import KERNEL_DTYPES, is_plain
from tilecast.engine.invariant import Invariant
from tilecast.errors import InputError
from tilecast.kernels.cpu.rows import FORMS, PreparedNorm, rms_norm

STATE = "_tilecast_norm"
"""The attribute of a norm that says how it is computed."""
EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What families call the number that is added to the mean square."""
MAGNITUDES = (0.0, 1e-4, 1e-2, 1.0, 1.0, 30.0)
"""Sizes of the rows that norms are told apart by: in the small ones epsilon is most of the divisor."""


class _State:
    """A norm on the kernel, and the epsilon that it is for."""

    def __init__(self, norm: PreparedNorm, name: str, epsilon: float, form: str) -> None:
        self.norm, self.name, self.epsilon, self.form = norm, name, epsilon, form

    def fits(self, rows: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the kernel takes these operands, besides their being plain."""
        norm = self.norm
        return (
            rows.dtype is norm.dtype
            and rows.dim() > 0
            and rows.shape[-1] == norm.width == weight.numel()
            and rows.numel() > 0
            and rows.is_contiguous()
            and weight.is_contiguous()
        )

    def __deepcopy__(self, memo: dict[int, object]) -> _State:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A norm that is saved whole runs its own code when it is loaded, until its model is prepared.
        return _nothing, ()


def _nothing() -> None:
    return None


def take_norm(module: torch.nn.Module) -> bool:
    """Run a module on the kernel from now on where it is an RMS norm; return whether it is."""
    name = next((name for name in EPSILONS if isinstance(module.__dict__.get(name), float)), None)
    if name is None or "forward" in module.__dict__ or not _is_weighted(module):
        return False
    give_norm_back(module)
    weight, epsilon = module.get_parameter("weight"), float(module.__dict__[name])
    form = _form_of(module, epsilon)
    if form is None:
        return False
    module.__dict__[STATE] = _State(PreparedNorm(weight.dtype, form, len(weight), epsilon), name, epsilon, form)
    module.__class__ = _class_of(type(module))
    return True


def give_norm_back(module: torch.nn.Module) -> None:
    """Have a module run its own code again."""
    module.__dict__.pop(STATE, None)
    theirs = getattr(type(module), "_tilecast_theirs", None)
    if theirs is not None:
        module.__class__ = theirs


def _is_weighted(module: torch.nn.Module) -> bool:
    """Whether a module has one vector of weights that the kernel takes, and nothing else."""
    weight = module._parameters.get("weight")
    return (
        type(weight) is torch.nn.Parameter
        and len(module._parameters) == 1
        and not module._buffers
        and not module._modules
        and weight.dim() == 1
        and weight.numel() > 0
        and weight.is_cpu
        and weight.dtype in KERNEL_DTYPES
    )


def _form_of(module: torch.nn.Module, epsilon: float) -> str | None:
    """Return the form in which the kernel gives a module's bits, with other weights too; None where in none."""
    weight = module._parameters["weight"]
    assert weight is not None, "looked at before"
    generator = torch.Generator().manual_seed(weight.numel())
    drawn = torch.randn(1 + len(MAGNITUDES), weight.numel(), generator=generator)
    # Weights of one do not tell where is rounded.
    factors = drawn[0].to(weight.dtype)
    rows = (drawn[1:] * torch.tensor(MAGNITUDES).unsqueeze(1)).to(weight.dtype)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": torch.nn.Parameter(factors, requires_grad=False)}
    try:
        with torch.no_grad(), Invariant(quiet=True) as context:
            wanted = probe.forward(rows)
        if not context.covered or not isinstance(wanted, torch.Tensor) or wanted.dtype != rows.dtype:
            return None
        return next((form for form in FORMS if torch.equal(rms_norm(rows, factors, epsilon, form), wanted)), None)
    except (InputError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        # It wants other operands than rows, or this CPU lacks the dtype: its own code runs it.
        return None


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the rows [..., N] normalised; in every case that is out of the ordinary by the module's own code."""
    state: _State | None = self.__dict__.get(STATE)
    if state is not None and not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
        rows, weight = args[0], self._parameters.get("weight")
        if is_plain(rows, weight) and state.fits(rows, weight) and self.__dict__[state.name] == state.epsilon:
            return state.norm(rows, weight)
    return self._tilecast_theirs.forward(self, *args, **kwargs)


_classes: dict[type, type[torch.nn.Module]] = {}


def _class_of(theirs: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return a norm's class with the kernel in its forward."""
    made = _classes.get(theirs)
    if made is None:
        own = {"forward": _forward, "_tilecast_theirs": theirs, "__reduce_ex__": _reduce}
        made = _classes[theirs] = type(f"Tilecast{theirs.__name__}", (theirs,), own)
    return made


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    return _made_again, (self._tilecast_theirs,), self.__dict__


def _made_again(theirs: type[torch.nn.Module]) -> torch.nn.Module:
    made = _class_of(theirs)
    return made.__new__(made)
