"""`invariant()`: inside of it, torch's operations give each row the same bits whatever else is in the batch.

Two modes work together. A `TorchFunctionMode` takes `F.linear` and `F.scaled_dot_product_attention` while they are
whole, since torch would choose among kernels by shape. A `TorchDispatchMode` sees every operation that reaches a
kernel, from whatever call it comes: matrix products and reductions are replaced, moves and exactly rounded
arithmetic pass, and anything else passes too but is noted by name in `uncovered`. Overriding operators in
`torch.library` would change them for the whole process and could not tell what it has missed.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilecast.engine import invariant_forms as forms
from tilecast.engine import invariant_operations as operations
from tilecast.engine.sampling import request_seed, sample_row
from tilecast.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["Invariant", "invariant", "outside", "request_seed", "sample_row"]


class Invariant:
    """What `invariant()` returns: a context manager, and a record of what it could not vouch for.

    `uncovered` counts, by name, the operations that ran inside and are not known to be free of the batch's shape.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Start with an empty record; nothing changes until the context is entered. `quiet`: nothing is logged."""
        self._quiet = quiet
        self.uncovered: Counter[str] = Counter()
        self._functions = _Functions(self.uncovered)
        self._dispatch = _Dispatch(self.uncovered)
        self._modes = (self._functions, self._dispatch)
        self._depth = 0

    @property
    def covered(self) -> bool:
        """Whether every operation so far was one whose bits do not depend on the batch."""
        return not self.uncovered

    def __enter__(self) -> Invariant:
        """Take over torch's operations in this thread. Raises InputError under autocast."""
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                raise InputError(
                    f"invariant() inside torch.autocast on {device}: autocast chooses dtypes by operation; "
                    "load the model in the dtype that it is to run in"
                )
        if torch.compiler.is_compiling():
            raise InputError("invariant() inside torch.compile: compiled code fuses operations; run the model eagerly")
        self._dispatch.__enter__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self._functions.__enter__()  # type: ignore[no-untyped-call]  # torch's, untyped
        _entered().append(self)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give torch's operations back, and say once what was not covered."""
        self._functions.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's, untyped
        self._dispatch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's, untyped
        _entered().remove(self)
        self._depth -= 1
        if self.uncovered and self._depth == 0 and error is None and not self._quiet:
            names = ", ".join(sorted(self.uncovered))
            logger.warning("not known to be free of the batch: %s; results may depend on it", names)


def invariant() -> Invariant:
    """Return a context in which linears, matrix products, attention, softmax, norms and activations are row by row.

    Per row, bits then depend neither on the batch's size or order, nor on padding on the left, nor on how a prompt is
    cut into chunks; what the context has no such form of is in `uncovered`. Gradients pass through: the forward
    values are the invariant ones. Entering raises InputError under autocast and torch.compile.
    """
    return Invariant()


_threads = threading.local()


def _entered() -> list[Invariant]:
    """Return the contexts that this thread is inside of."""
    found: list[Invariant] = _threads.__dict__.setdefault("entered", [])
    return found


def taking_over() -> bool:
    """Whether this thread is inside of `invariant()`, and not in `outside()`."""
    return any(not mode.paused for context in _entered() for mode in context._modes)


def note(name: str) -> None:
    """Count something that runs now among what this thread's contexts cannot vouch for."""
    for context in _entered():
        context.uncovered[name] += 1


@contextmanager
def outside() -> Iterator[None]:
    """Run the block as if this thread were in no `invariant()`: torch's own operations, and none is recorded."""
    modes = [mode for context in _entered() for mode in context._modes]
    before = [mode.paused for mode in modes]
    for mode in modes:
        mode.paused = True
    try:
        yield
    finally:
        for mode, paused in zip(modes, before, strict=True):
            mode.paused = paused


class _Functions(TorchFunctionMode):
    def __init__(self, uncovered: Counter[str]) -> None:
        super().__init__()
        self._uncovered = uncovered
        self.paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self.paused:
            return func(*args, **given)
        if func is F.linear and _sound(args, given):
            return forms.linear(*args, **given)
        if func is F.scaled_dot_product_attention:
            bound = _attention.bind(*args, **given)
            bound.apply_defaults()
            chosen = bound.arguments
            dropout = chosen.pop("dropout_p")
            chosen.pop("enable_gqa")
            operands = [chosen.pop(name) for name in ("query", "key", "value")]
            if dropout == 0 and _sound(tuple(operands), {}):
                return forms.scaled_dot_product(*operands, **chosen)
            self._uncovered["scaled_dot_product_attention"] += 1
        return func(*args, **given)


def _sound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the kernels take these operands and nothing is to be recorded for gradients."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not graph and len({t.dtype for t in tensors}) == 1 and all(forms.multiplies(t) for t in tensors)


def _attention_signature(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> None:  # fmt: skip
    """Stand in for `F.scaled_dot_product_attention`, a built-in function that `inspect` cannot read."""


_attention = inspect.signature(_attention_signature)


class _Dispatch(TorchDispatchMode):
    def __init__(self, uncovered: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self._uncovered = uncovered
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if self.paused:
            return func(*args, **given)
        known = _kinds.get(func)
        if known is None:
            known = _kinds[func] = operations.kind_of(func)
        if known == operations.PASSES:
            return func(*args, **given)
        if known == operations.COMPOSITE:
            with self:
                return func.decompose(*args, **given)
        result = NotImplemented
        if known == operations.REPLACED:
            result = forms.REPLACEMENTS[func.overloadpacket](func, *args, **given)
        if result is NotImplemented:
            if operations.matters(func, args, given):
                self._uncovered[operations.name_of(func)] += 1
            return func(*args, **given)
        return result


_kinds: dict[Any, str] = {}
"""What kind of operation each overload is, worked out once."""
