"""How many scales quantised weights have."""

from __future__ import annotations

from tilecast.problem import ExpertGemm, weight_format


def scale_shape(gemm: ExpertGemm) -> tuple[int, int]:
    """Return how many scales an expert's weights have: [rows, columns].

    Gate and up projections are quantised apart, so blocks and tensors of them never mix.
    """
    form = weight_format(gemm.layer.weight_format)
    parts = 2 if gemm.name == "up" and gemm.layer.gated else 1
    columns = -(-gemm.k // form.group) if form.group else 1
    if form.rows == 1:
        return gemm.n, columns
    width = gemm.n // parts
    return parts * (-(-width // form.rows) if form.rows else 1), columns
