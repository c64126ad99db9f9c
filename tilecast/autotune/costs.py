"""What tuning itself costs: the seconds of a sample, a check, a packing, a compilation, by a device's limits."""

from __future__ import annotations

from tilecast.autotune.calibrate import Calibration
from tilecast.autotune.gate import out_dtypes
from tilecast.autotune.measure import CLEARLY_LONG, MAX_REPEATS, SAMPLE_US
from tilecast.problem import ExpertGemm, TileConfig

ROUTING_US = 150.0
"""Drawing, sorting and looking up the operands of one launch."""
ORACLE_SLOTS = 64
"""Slots that the gate compares with float64, in two variants."""
FLOAT64_RATE, CONVERTED_BYTES = 0.25, 8
"""Part of the float32 rate that float64 products reach; bytes of one converted weight."""
PACK_RATE = 0.011
"""Part of the bandwidth that making random weights and packing them reaches, into memory that nobody used before."""
COMPILE_S = {"cpu": 0.5, "cuda": 2.0}
"""Compiling one kernel; on a CPU of one process of those that compile at once."""
GIVEN_AT_LAUNCH = ("block_n", "block_k", "threads")
"""Parameters of the CPU's kernels that are arguments of compiled code; block_n nearly always is."""


def expected_sample_s(predicted_us: float, calibration: Calibration, *, device_kind: str = "cpu") -> float:
    """Return the seconds that one sample of a config takes, repeats of short launches and fresh routing included."""
    repeats = max(1, min(MAX_REPEATS, int(SAMPLE_US[device_kind] / max(predicted_us, 1e-3) + 0.5)))
    return repeats * (predicted_us + ROUTING_US) / 1e6


def expected_warming_s(predicted_us: float, *, device_kind: str = "cpu") -> float:
    """Return the seconds of the launches that precede a config's first sample."""
    return 0.0 if predicted_us > CLEARLY_LONG * SAMPLE_US[device_kind] else 2 * predicted_us / 1e6


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
    return copies * gemm.weight_bytes() / (PACK_RATE * calibration.memory_bytes_s)


def expected_compile_s(gemm: ExpertGemm, *, device_kind: str = "cpu", processes: int = 1) -> float:
    """Return the seconds of compiling what the gate launches of one config, by so many processes at once."""
    if device_kind != "cpu":
        return COMPILE_S[device_kind]
    return len(out_dtypes(gemm)) * COMPILE_S["cpu"] / processes


def code_of(config: TileConfig) -> TileConfig:
    """Return what stands for all configs of a CPU's kernel that run the same code."""
    return TileConfig(config.kernel, {name: value for name, value in config.params if name not in GIVEN_AT_LAUNCH})
