"""What the device is and can do: its limits, measured, against which everything else is judged."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, clock_for, free_memory, interleaved
from benchmarks.gpu.record import Record, Setup, read_json
from tilecast.environment import environment_for
from tilecast.evidence import percentile

QUERY = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit", "pstate",
)  # fmt: skip
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same figure under its newer and its older name."""
LAUNCHES = 200


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The measured limits: bytes and operations per second of memory and matrix units."""

    read_gb_s: float
    dense_tflop_s: float

    def time_us(self, size: float, flops: float) -> tuple[float, str]:
        """Return the least time that so many bytes and operations take, and which of them sets it."""
        memory, compute = size / self.read_gb_s / 1e3, flops / self.dense_tflop_s / 1e6
        return (memory, "memory") if memory >= compute else (compute, "compute")


def limits_of(setup: Setup) -> Limits | None:
    """Return what the `device` step measured; None if it has not been run or failed."""
    known = read_json(setup.out / "device" / "device.json")
    if not isinstance(known, dict) or known.get("status") != "ok":
        return None
    found = known["result"]["limits"]
    return Limits(read_gb_s=found["read_gb_s"], dense_tflop_s=found["dense_tflop_s"])


def reading(device: str) -> dict[str, str]:
    """Return clocks, temperature, power and throttle reasons as nvidia-smi says; empty where there is none."""
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return {}
    index = torch.cuda.current_device()
    found: dict[str, str] = {}
    for names in (QUERY, *((reason,) for reason in REASONS)):
        words = ["nvidia-smi", f"--id={_identity(index)}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        try:
            asked = subprocess.run(words, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        values = [value.strip() for value in asked.stdout.strip().split(",")]
        if asked.returncode == 0 and len(values) == len(names):
            found.update(zip(names, values, strict=True))
            if names[0] in REASONS:
                break
    return found


def _identity(index: int) -> str:
    """Return what nvidia-smi calls the device: it does not count by the visible ones."""
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    if not uuid:
        return str(index)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Measure the device. The parts are single figures, so that one that fails leaves the others."""
    clock = clock_for(setup.device, tiny=setup.tiny)
    before = reading(setup.device)
    parts: dict[str, Callable[[], Any]] = {
        "matmul": lambda: matmul(clock, setup),
        "memory": lambda: memory(clock, setup),
        "launch": lambda: launch_overhead(clock, setup),
    }
    found = {name: record.part(name, make, healthy=clock.healthy) for name, make in parts.items()}
    free_memory(setup.device)
    for name, part in found.items():
        if part["status"] != "ok":
            raise RuntimeError(f"{name} could not be measured:\n{part['error']}")
    figures = {name: part["result"] for name, part in found.items()}
    return {
        "about": describe(setup.device),
        "environment": environment_for(setup.device).to_json(),
        "clocks_before": before,
        "clocks_after": reading(setup.device),
        **figures,
        "limits": {
            "read_gb_s": max(figures["memory"]["read_sum_gb_s"], figures["memory"]["read_max_gb_s"]),
            "dense_tflop_s": figures["matmul"]["bf16_tflop_s"],
        },
    }


def describe(device: str) -> dict[str, Any]:
    """Return what the driver says of the device."""
    if device == "cpu":
        return {"name": environment_for("cpu").device, "cuda": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def memory(clock: Clock, setup: Setup) -> dict[str, float]:
    """Return GB/s of a copy on the device (bytes read plus bytes written) and of two reductions (bytes read)."""
    size = 8 << 20 if setup.tiny else 4 << 30
    source = torch.ones(size // 4, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.float32, device=clock.device)
    calls = {
        "copy": clock.prepare(lambda: target.copy_(source)),
        "sum": clock.prepare(lambda: torch.sum(source, 0, out=total)),
        "max": clock.prepare(lambda: source.amax()),
    }
    samples = interleaved(clock, calls, setup.rounds)
    return {
        "bytes": size,
        "copy_gb_s": 2 * size / percentile(samples["copy"], 50) / 1e3,
        "read_sum_gb_s": size / percentile(samples["sum"], 50) / 1e3,
        "read_max_gb_s": size / percentile(samples["max"], 50) / 1e3,
    }


def matmul(clock: Clock, setup: Setup) -> dict[str, float]:
    """Return TFLOP/s of square matmuls on random data, as zeros draw less power and so clock higher."""
    size = 128 if setup.tiny else 8192
    generator = torch.Generator(device=clock.device).manual_seed(0)
    calls = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        left, right = (torch.randn(size, size, device=clock.device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        calls[name] = clock.prepare(_matmul(left, right, out))
    samples = interleaved(clock, calls, setup.rounds)
    return {
        "size": size,
        **{f"{name}_tflop_s": 2 * size**3 / percentile(taken, 50) / 1e6 for name, taken in samples.items()},
        **{f"{name}_p20_us": percentile(taken, 20) for name, taken in samples.items()},
        **{f"{name}_p80_us": percentile(taken, 80) for name, taken in samples.items()},
    }


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(left, right, out=out)


def launch_overhead(clock: Clock, setup: Setup) -> dict[str, float]:
    """Return µs per launch of a kernel that does next to nothing: in a graph, and one by one from Python."""
    tensor = torch.zeros(32, device=clock.device)
    launches = 10 if setup.tiny else LAUNCHES

    def many() -> None:
        for _ in range(launches):
            tensor.add_(1.0)

    graph = clock.prepare(many)
    single = clock.prepare(lambda: tensor.add_(1.0))
    samples = interleaved(clock, {"many": graph, "single": single}, setup.rounds)
    by_hand = type(graph)(replay=many, graph=False)
    eager = interleaved(clock, {"eager": by_hand}, setup.rounds)["eager"]
    return {
        "in_graph_us": percentile(samples["many"], 50) / launches,
        "one_graph_us": percentile(samples["single"], 50),
        "eager_us": percentile(eager, 50) / launches,
    }
