"""The environment: the device, toolchain and kernel-source fingerprint that a measurement holds for.

Fields are stored beside the digest so that a mismatch can be explained field by field. A difference in a
*hard* field means that a decision made there says nothing here; a *soft* difference is reported and allowed.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from tilecast.canonical import Json, digest, fields_of

PACKAGE = Path(__file__).parent
CPU_FEATURES = frozenset(
    {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"}
    | {"amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"}
)
"""CPU feature flags, by their Linux names, that can change which instructions a kernel uses."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One field in which two environments differ."""

    field: str
    here: str
    there: str
    hard: bool

    def __str__(self) -> str:
        """Return `device: here 'A', there 'B'`."""
        return f"{self.field}: here {self.here!r}, there {self.there!r}"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a measurement holds.

    device_kind is `cpu` or `cuda`; `features` the instruction-set flags, comma-joined; `units` cores of a CPU
    or SMs of a GPU; `llc_bytes` the last-level cache; `threads` what torch uses on a CPU (a cap, no bits
    depend on it); `kernel_source` the SHA-256 of the kernels' source text; versions are `major.minor.patch`.
    """

    device_kind: str
    device: str
    arch: str
    features: str
    units: int
    llc_bytes: int
    kernel_source: str
    torch: str
    compiler: str
    threads: int = 0
    driver: str = ""
    system: str = ""

    HARD = ("device_kind", "device", "arch", "features", "units", "kernel_source")
    """Fields whose difference makes a decision unusable."""
    HARD_TO_MINOR = ("torch", "compiler")
    """Version fields: hard to `major.minor`, soft below."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, value: object) -> Environment:
        """Build from parsed JSON. Raises InputError."""
        kinds = {f.name: int if str(f.type) == "int" else str for f in fields(cls)}
        return cls(**cast(Any, fields_of(value, kinds, "environment")))

    def compare(self, there: Environment) -> tuple[Mismatch, ...]:
        """Return every field in which `there` differs from this environment, hard ones first."""
        found = []
        for f in fields(self):
            mine, other = getattr(self, f.name), getattr(there, f.name)
            if mine == other:
                continue
            hard = f.name in self.HARD
            if f.name in self.HARD_TO_MINOR:
                hard = _minor(str(mine)) != _minor(str(other))
            found.append(Mismatch(field=f.name, here=str(mine), there=str(other), hard=hard))
        return tuple(sorted(found, key=lambda m: not m.hard))

    def accepts(self, there: Environment) -> bool:
        """Whether decisions made in `there` may be used here: no hard field differs."""
        return not any(mismatch.hard for mismatch in self.compare(there))


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


@cache
def kernel_source_digest(device_kind: str) -> str:
    """Return the SHA-256 over the source text of every kernel module that `device_kind` can reach."""
    root = PACKAGE / "kernels"
    folder = {"cpu": "cpu", "cuda": "gpu"}[device_kind]
    total = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(root / folder).glob("**/*.py")]):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _llc_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes) or 32 << 20


def gpu_toolchain() -> dict[str, str]:
    """Return the versions that GPU kernels depend on: torch's and Triton's (`absent` where it is not installed)."""
    return {"torch": _version("torch"), "triton": _version("triton")}


@cache
def cpu_environment() -> Environment:
    """Return this machine's CPU environment. The thread count is torch's at the first call."""
    import torch

    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']} model {info.get('model', '?')} stepping {info.get('stepping', '?')})"
    return Environment(
        device_kind="cpu",
        device=name,
        arch=platform.machine(),
        features=",".join(sorted(flags & CPU_FEATURES)),
        units=os.cpu_count() or 1,
        llc_bytes=_llc_bytes(),
        kernel_source=kernel_source_digest("cpu"),
        torch=torch.__version__,
        compiler=_version("llvmlite"),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release()} python {platform.python_version()}",
    )
