"""The facts that `doctor` tells: machine, kernels, coverage."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata

from tilecast._version import VERSION
from tilecast.canonical import Json
from tilecast.cli._tables import config_text
from tilecast.environment import Environment
from tilecast.evidence import Decision, TuningTable
from tilecast.problem import DTYPES, ExpertLayer

PACKAGES = ("torch", "llvmlite", "transformers", "triton", "numba")
COMPILERS = ("cc", "gcc", "clang", "nvcc", "hipcc")


@dataclass(frozen=True, kw_only=True)
class KernelFact:
    """Whether one kernel can run one layer here; `reason` is why not."""

    kernel: str
    layer: str
    reason: str | None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Whether the table covers one layer at one token count, and by what or why not."""

    layer: str
    tokens: int
    hit: bool
    certificate: str
    why: str

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return asdict(self)


def machine_facts(here: Environment) -> dict[str, Json]:
    """Return what is known of this machine without measuring."""
    from tilecast.kernels.cpu.isa import host_isa
    from tilecast.kernels.cpu.jit import available_threads, openmp_path

    isa = host_isa()
    return {
        "tilecast": VERSION,
        "device": here.device,
        "arch": here.arch,
        "instruction set": f"{isa.name}: {isa.lanes} float32 lanes, {isa.registers} registers",
        "features": here.features.replace(",", ", "),
        "cores" if here.device_kind == "cpu" else "multiprocessors": here.units,
        "last-level cache": f"{here.llc_bytes / (1 << 20):.0f} MiB",
        "driver": here.driver,
        "threads": available_threads(),
        "openmp": openmp_path(),
        "system": here.system,
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "compilers on PATH (none is needed)": ", ".join(name for name in COMPILERS if shutil.which(name)) or "none",
        "environment": here.digest[:12],
    }


def peak_facts() -> dict[str, Json]:
    """Measure and return this machine's peaks; takes a few seconds."""
    from tilecast.kernels.cpu.peak import measure_peaks

    peaks = measure_peaks()
    return {
        "read bandwidth": f"{peaks.read_gb_s:.1f} GB/s",
        "float32 multiply-add": f"{peaks.fma_gflop_s:.1f} GFLOP/s",
        "bf16 dot product": f"{peaks.dot_bf16_gflop_s:.1f} GFLOP/s",
        "peaks measured on": f"{peaks.threads} threads",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def kernel_facts(here: Environment, layers: Iterable[ExpertLayer] | None) -> list[KernelFact]:
    """Return for every registered kernel and layer whether it runs; without layers, for one layer of each dtype."""
    from tilecast.kernels import registry

    samples = layers or [ExpertLayer(hidden=1024, intermediate=3584, experts=8, top_k=2, dtype=d) for d in DTYPES]
    facts = []
    for layer in samples:
        for kernel in registry:
            if kernel.device_kind != here.device_kind:
                told = [f"runs on {kernel.device_kind}, this is {here.device_kind}"]
            else:
                reasons = {gemm.name: kernel.rejects(gemm, here) for gemm in layer.gemms}
                told = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
                if len(set(reasons.values())) == 1:
                    told = [reason for reason in set(reasons.values()) if reason is not None]
            facts.append(KernelFact(kernel=kernel.name, layer=layer.label, reason="; ".join(told) or None))
    return facts


def coverage(
    layers: Iterable[ExpertLayer], found: TuningTable | None, here: Environment, counts: tuple[int, ...], policy: str,
    routing: str,
) -> list[Point]:  # fmt: skip
    """Return for every layer and token count which decision would run, or why none; `found` None: no table."""
    from tilecast.cache_store.match import Match, match
    from tilecast.engine.table_index import alike_under
    from tilecast.kernels import registry

    alike = alike_under(registry, here, policy)
    no_table = Match(reasons=("no table is in use",))
    points = []
    for layer in layers:
        for tokens in counts:
            result = no_table if found is None else match(found, here, layer, tokens, policy, routing, alike=alike)
            decision = result.decision
            points.append(
                Point(
                    layer=layer.label,
                    tokens=tokens,
                    hit=decision is not None,
                    certificate="—" if decision is None else decision.certificate,
                    why="; ".join(result.reasons) if decision is None else _configs(decision),
                )
            )
    return points


def _configs(decision: Decision) -> str:
    return f"up {config_text(decision.up.config)}; down {config_text(decision.down.config)}"
