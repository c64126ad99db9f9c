"""What ranks exchange inside an operation, seen where torch dispatches it: each rank's share, and what came back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Keep = Callable[[torch.Tensor, torch.Tensor], None]


class Collectives(TorchDispatchMode):
    """Tells `keep` of every all-reduce and all-gather: this rank's share, and the result once it is there.

    What is gathered comes as one tensor, the ranks' parts beside one another.
    """

    def __init__(self, keep: Keep) -> None:
        """Call `keep(share, result)` for each collective, before the operation around it ends or goes on."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self._keep = keep
        self._ended: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def flush(self) -> None:
        """Tell of the collectives so far; what is dispatched next may change their results in place."""
        while self._ended:
            share, parts = self._ended.pop(0)
            parts = [torch.ops._c10d_functional.wait_tensor(part) for part in parts]
            self._keep(share, parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; remember it if it is a collective."""
        given = kwargs or {}
        name = f"{func.namespace}.{func._schema.name.rpartition('::')[2]}"
        if name in ("_c10d_functional.all_reduce", "_c10d_functional.all_reduce_"):
            share = args[0].detach().clone()
            result = func(*args, **given)
            self._ended.append((share, [result]))
            return result
        if name in ("c10d.allreduce_", "c10d.allgather_"):
            share = (args[0] if name == "c10d.allreduce_" else args[1])[0].detach().clone()
            result = func(*args, **given)
            self._ended.append((share, args[0] if name == "c10d.allreduce_" else args[0][0]))
            return result
        if func.namespace not in ("c10d", "_c10d_functional"):
            self.flush()
        return func(*args, **given)
