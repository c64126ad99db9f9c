"""Implementations of the expert GEMMs, their registry, the router and the float64 oracle.

The registry describes kernels without torch; what computes is imported, and torch with it, at its first use.
"""

from typing import TYPE_CHECKING

from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.onednn import OneDnnLinear
from tilecast.kernels.cpu.sparse import SparseExperts
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.fp8 import Fp8
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.split_k import SplitK
from tilecast.kernels.gpu.tma import Tma
from tilecast.kernels.spec import Registry

if TYPE_CHECKING:
    from tilecast.kernels.dispatch import route, sort_slots

registry = Registry(
    (MoeGemm(), OneDnnLinear(), SparseExperts(), Grouped(), Decode(), Tma(), Persistent(), SplitK(), Fp8())
)
"""The kernels of this process. The first one of a device kind gives the defaults."""


def __getattr__(name: str) -> object:
    """Import what computes at its first use."""
    if name not in ("route", "sort_slots"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tilecast.kernels import dispatch

    value: object = getattr(dispatch, name)
    globals()[name] = value
    return value


__all__ = ["registry", "route", "sort_slots"]
