"""Implementations of the expert GEMMs, their registry, the router and the float64 oracle."""

from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.spec import Registry

registry = Registry((MoeGemm(),))
"""The kernels of this process. The first one of a device kind gives the defaults."""

__all__ = ["registry"]
