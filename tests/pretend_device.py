"""A device that is not there: tensors on it are computed by the CPU, but refuse to meet the CPU's.

So code for a GPU runs in tests without one, and fails where a GPU would fail: at an operation on operands of two
devices. Numbers (tensors without dimensions) may meet any device, as on a GPU; copies go anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""A device type of which every PyTorch has as much as indexing needs."""
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class _OnDevice(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Within it `DEVICE` can be used: `with PretendDevice(): torch.ones(3, device=DEVICE)`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, _OnDevice)]
    if function not in COPIES and there and any(x.dim() for x in given if not isinstance(x, _OnDevice)):
        raise RuntimeError(f"{function} got tensors on {DEVICE} and on the CPU")
    wanted = kwargs.get("device")
    made_there = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
    if function is torch.ops.aten.copy_.default:
        made_there = isinstance(args[0], _OnDevice)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(x.inner): x for x in there}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, _OnDevice) else x, (args, kwargs))
    result = function(*args, **kwargs)
    return tree_map(lambda x: _placed(x, known, made_there) if isinstance(x, torch.Tensor) else x, result)


def _placed(result: torch.Tensor, known: dict[int, _OnDevice], made_there: bool) -> torch.Tensor:
    if not made_there:
        # A copy to where it is already would be the very tensor.
        return result.clone() if id(result) in known else result
    # What an operation in place returns is its operand.
    return known[id(result)] if id(result) in known else _OnDevice(result)
