"""The environment: the device, toolchain and kernel-source fingerprint that a measurement holds for.

Fields are stored beside the digest so that a mismatch can be explained field by field. A difference in a
*hard* field means that a decision made there says nothing here; a *soft* difference is reported and allowed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tilecast.canonical import Json, canonical_json, digest_of_text, fields_of
from tilecast.errors import DeviceError

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).parent
CPU_FEATURES = frozenset(
    {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"}
    | {"amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"}
)
"""CPU feature flags, by their Linux names, that can change which instructions a kernel uses."""

NEVER_LAUNCHED = frozenset({"reference.py", "static.py", "compilers.py", "assembly.py", "_compile.py", "work.py"})
"""Modules of `tilecast.kernels` that judge kernels and launch none: no bit and no time depends on them."""
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
"""The distributions that Triton comes in, the usual one first."""


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
    depend on it; 0 where it is not known); `kernel_source` the SHA-256 of the kernels' source text; versions are
    `major.minor.patch`.
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
    def canonical(self) -> str:
        """The canonical JSON form."""
        return canonical_json(self.to_json())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_of_text(self.canonical)

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
            # Threads are 0 where they are not known: on GPUs, and where nobody asked torch.
            if mine == other or (f.name == "threads" and 0 in (mine, other)):
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


@cache
def _version(*packages: str) -> str:
    """Return the version of the first of `packages` that is installed; `absent` if none is."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "absent"


@cache
def kernel_source_digest(device_kind: str) -> str:
    """Return the SHA-256 over the source text of every module that a launch on `device_kind` can run through."""
    root = PACKAGE / "kernels"
    folder = {"cpu": "cpu", "cuda": "gpu"}[device_kind]
    total = hashlib.sha256()
    common = [path for path in root.glob("*.py") if path.name not in NEVER_LAUNCHED]
    own = [path for path in (root / folder).glob("**/*.py") if path.name != "work.py"]
    for path in sorted([*common, *own]):
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
    return {"torch": _version("torch"), "triton": _version(*TRITON_PACKAGES)}


@cache
def cpu_environment() -> Environment:
    """Return this machine's CPU environment. The thread count is torch's at the first call."""
    import torch

    return _cpu_environment(torch.__version__, torch.get_num_threads())


def _cpu_environment(torch_version: str, threads: int) -> Environment:
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
        torch=torch_version,
        compiler=_version("llvmlite"),
        threads=threads,
        system=_system(),
    )


def cuda_environment(index: int | None = None) -> Environment:
    """Return the environment of GPU `index` (None: the current device), NVIDIA's or AMD's.

    Raises DeviceError where torch sees no such GPU, or Triton is missing.
    """
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("torch sees no GPU here; install a build of torch for it and its driver, or use the CPU")
    count = torch.cuda.device_count()
    chosen = torch.cuda.current_device() if index is None else index
    if not 0 <= chosen < count:
        raise DeviceError(f"there is no GPU {chosen}; torch sees {count}, numbered from 0")
    return _cuda_environment(chosen)


@cache
def _cuda_environment(index: int) -> Environment:
    import torch

    properties = torch.cuda.get_device_properties(index)
    toolchain = gpu_toolchain()
    if toolchain["triton"] == "absent":
        raise DeviceError(
            f"{properties.name} needs Triton, which is not installed; install the version that goes with torch "
            f"{torch.__version__} (pip install triton), or hide the GPU (CUDA_VISIBLE_DEVICES=) to use the CPU"
        )
    arch, features = f"sm_{properties.major}{properties.minor}", ""
    if torch.version.hip is not None:
        # Such as `gfx942:sramecc+:xnack-`.
        arch, _, rest = properties.gcnArchName.partition(":")
        features = rest.replace(":", ",")
    return Environment(
        device_kind="cuda",
        device=properties.name,
        arch=arch,
        features=features,
        units=properties.multi_processor_count,
        llc_bytes=properties.L2_cache_size,
        kernel_source=kernel_source_digest("cuda"),
        torch=torch.__version__,
        compiler=toolchain["triton"],
        driver=_driver(),
        system=_system(),
    )


def environment_for(device: torch.device | str) -> Environment:
    """Return the environment of a torch device, such as `cpu`, `cuda` (the current one) or `cuda:1`.

    Raises DeviceError for other kinds of device, and as `cuda_environment` does.
    """
    import torch

    chosen = torch.device(device)
    if chosen.type == "cpu":
        return cpu_environment()
    if chosen.type == "cuda":
        return cuda_environment(chosen.index)
    raise DeviceError(f"no kernel runs on {chosen}; move the tensors to a GPU (cuda) or the CPU")


def here() -> Environment:
    """Return this process's environment: the current GPU's where torch sees one, else the CPU's."""
    import torch

    return cuda_environment() if torch.cuda.is_available() else cpu_environment()


GPU_FILES = tuple(map(Path, ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia/version")))
"""What the drivers of NVIDIA (also on Jetson and under WSL) and AMD put there: without one torch sees no GPU."""


def seen() -> Environment:
    """Return what `here` does without importing torch, where no GPU can be: for commands that only look at tables.

    The threads of a CPU that torch was not asked about are 0, not known.
    """
    if sys.modules.get("torch") is not None or sys.platform == "win32" or any(path.exists() for path in GPU_FILES):
        return here()
    return _cpu_environment(_version("torch"), 0)


def _system() -> str:
    return f"{platform.system()} {platform.release()} python {platform.python_version()}"


DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
"""Where the kernel drivers of NVIDIA and AMD tell their versions, without a tool or a library."""


def _driver() -> str:
    """Return the GPU driver's version, or the newest CUDA that it supports; empty if neither is known."""
    import torch

    for path in DRIVER_FILES:
        try:
            found = re.search(r"\d+\.\d+(\.\d+)*", path.read_text())
        except OSError:
            continue
        if found is not None:
            return found.group()
    # Private, but torch has no other name for it; builds without CUDA lack it.
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    version = 0 if ask is None or torch.version.hip is not None else ask()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else ""
