"""Environments, layers and records that the tuner's tests share."""

from __future__ import annotations

from tilecast.environment import Environment
from tilecast.evidence import Measurement
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

HERE = Environment(
    device_kind="cpu",
    device="test",
    arch="x86_64",
    features="avx2",
    units=2,
    llc_bytes=1 << 16,
    kernel_source="0" * 64,
    torch="2.13.0",
    compiler="0.50.0",
)
LAYER = ExpertLayer(hidden=96, intermediate=80, experts=4, top_k=2)


def measured(
    config: TileConfig, *samples_us: float, gemm: ExpertGemm = LAYER.up, tokens: int = 4, **fields: object
) -> Measurement:
    """Return a measurement in `HERE`."""
    return Measurement(
        environment=HERE.digest,
        gemm=gemm,
        tokens=tokens,
        config=config,
        samples_us=samples_us,
        **fields,  # type: ignore[arg-type]
    )
