"""The shapes that every published figure is about."""

from __future__ import annotations

from tilecast.problem import ExpertLayer

DTYPES = ("fp32", "bf16", "fp16")
TOKENS = (1, 4, 16, 64, 256)


def reference_layer(dtype: str) -> ExpertLayer:
    """E=8, H=1024, I=3584, top-2: Mixtral-8x7B at a quarter of its hidden and intermediate sizes."""
    return ExpertLayer(hidden=1024, intermediate=3584, experts=8, top_k=2, dtype=dtype)


def mixtral_tp8(dtype: str = "bf16") -> ExpertLayer:
    """Mixtral-8x7B's layer as one of 8 tensor-parallel ranks sees it."""
    return ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2, dtype=dtype)
