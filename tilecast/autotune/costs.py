"""What tuning itself costs: the seconds of a sample, a check, a packing, a compilation, by a device's limits."""

from __future__ import annotations

from tilecast.autotune.calibrate import Calibration
from tilecast.autotune.measure import MAX_REPEATS, SAMPLE_US
from tilecast.problem import ExpertGemm

ROUTING_US = 150.0
"""Drawing, sorting and looking up the operands of one launch."""
ORACLE_SLOTS = 64
"""Slots that the gate compares with float64, in two variants."""
FLOAT64_RATE, CONVERTED_BYTES = 0.25, 8
"""Part of the float32 rate that float64 products reach; bytes of one converted weight."""
PACK_PASSES, PACK_RATE = 3.0, 0.25
"""Times that packing touches every weight, and the part of the bandwidth that gather-like copies reach."""
COMPILE_S = {"cpu": 0.15, "cuda": 2.0}
"""Compiling one new config."""


def expected_sample_s(predicted_us: float, calibration: Calibration, *, device_kind: str = "cpu") -> float:
    """Return the seconds that one sample of a config takes, repeats of short launches and fresh routing included."""
    repeats = max(1, min(MAX_REPEATS, int(SAMPLE_US[device_kind] / max(predicted_us, 1e-3) + 0.5)))
    return repeats * (predicted_us + ROUTING_US) / 1e6


def expected_check_s(
    gemm: ExpertGemm, tokens: int, predicted_us: float, calibration: Calibration, *, first: bool = False
) -> float:
    """Return the seconds of the gate for one config; `first` of a (GEMM, tokens) also makes the expected values."""
    launches_s = 2 * predicted_us / 1e6
    if not first:
        return launches_s + 4 * tokens * gemm.layer.top_k * gemm.n * 4 / calibration.memory_bytes_s
    slots = min(2 * tokens * gemm.layer.top_k, 2 * ORACLE_SLOTS)
    active = min(gemm.layer.experts, slots)
    rate = max(calibration.flops_s.get("fma", 0.0), calibration.flops_s.get("simt", 0.0)) * FLOAT64_RATE
    converted = 2 * active * gemm.n * gemm.k * CONVERTED_BYTES / calibration.memory_bytes_s
    return launches_s + converted + 2 * gemm.flops(slots) / rate


def expected_pack_s(gemm: ExpertGemm, calibration: Calibration, *, copies: int = 1) -> float:
    """Return the seconds of making `copies` of a GEMM's weights in one more layout."""
    return copies * PACK_PASSES * gemm.weight_bytes() / (PACK_RATE * calibration.memory_bytes_s)


def expected_compile_s(configs: int, *, device_kind: str = "cpu") -> float:
    """Return the seconds of compiling so many configs, none of which is in the cache of compiled code."""
    return configs * COMPILE_S[device_kind]
