"""GPU targets: what each architecture allows, in one place, with its source.

A target is an instruction set, not a device: everything here is known without one. Sources: NVIDIA, CUDA C++
Programming Guide, "Technical Specifications per Compute Capability" (shared memory per block, registers), and
the datasheets of the reference devices (SMs, L2); AMD, "CDNA 3" and "CDNA 4" ISA guides (LDS, VGPRs, wave size).
The tensor-core sums (g, F) are those of docs/numerics.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.environment import Environment, gpu_toolchain, kernel_source_digest
from tilecast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One GPU architecture.

    kind is Triton's backend (`cuda` or `hip`); shared_bytes the most that one program may use; registers the
    most 32-bit ones of a thread; units and llc_bytes those of `device`, a typical part, used where no device is
    asked. group and fraction_bits describe the sum of one 16-bit tensor-core instruction: `group` products
    and the accumulator are added at once, aligned to the largest exponent, cut to `fraction_bits`; 0 if unknown.
    """

    kind: str
    arch: str
    device: str
    warp_size: int
    shared_bytes: int
    registers: int
    units: int
    llc_bytes: int
    tma: bool
    mma: tuple[str, ...]
    group: int = 0
    fraction_bits: int = 0

    @property
    def name(self) -> str:
        """The target as the command line takes it: `cuda:90`, `hip:gfx942`."""
        return f"{self.kind}:{self.arch}"

    @property
    def triton_arch(self) -> int | str:
        """The architecture as Triton's GPUTarget takes it."""
        return int(self.arch) if self.kind == "cuda" else self.arch

    @property
    def environment_arch(self) -> str:
        """The architecture as `Environment.arch` has it: `sm_90`, `gfx942`."""
        return f"sm_{self.arch}" if self.kind == "cuda" else self.arch

    def environment(self) -> Environment:
        """Return the environment of the typical part, for questions that need no device."""
        toolchain = gpu_toolchain()
        return Environment(
            device_kind="cuda",
            device=self.device,
            arch=self.environment_arch,
            features="",
            units=self.units,
            llc_bytes=self.llc_bytes,
            kernel_source=kernel_source_digest("cuda"),
            torch=toolchain["torch"],
            compiler=toolchain["triton"],
        )


_KIB, _MIB = 1 << 10, 1 << 20

TARGETS = (
    Target(
        kind="cuda", arch="80", device="NVIDIA A100-SXM4-80GB", warp_size=32, shared_bytes=163 * _KIB, registers=255,
        units=108, llc_bytes=40 * _MIB, tma=False, mma=("mma.sync",), group=8, fraction_bits=24,
    ),
    Target(
        kind="cuda", arch="86", device="NVIDIA RTX A6000", warp_size=32, shared_bytes=99 * _KIB, registers=255,
        units=84, llc_bytes=6 * _MIB, tma=False, mma=("mma.sync",), group=8, fraction_bits=24,
    ),
    Target(
        kind="cuda", arch="89", device="NVIDIA L40S", warp_size=32, shared_bytes=99 * _KIB, registers=255,
        units=142, llc_bytes=96 * _MIB, tma=False, mma=("mma.sync",), group=8, fraction_bits=24,
    ),
    Target(
        kind="cuda", arch="90", device="NVIDIA H100 80GB HBM3", warp_size=32, shared_bytes=227 * _KIB, registers=255,
        units=132, llc_bytes=50 * _MIB, tma=True, mma=("wgmma", "mma.sync"), group=16, fraction_bits=25,
    ),
    Target(
        kind="cuda", arch="100", device="NVIDIA B200", warp_size=32, shared_bytes=227 * _KIB, registers=255,
        units=148, llc_bytes=126 * _MIB, tma=True, mma=("tcgen05", "mma.sync"),
    ),
    Target(
        kind="cuda", arch="120", device="NVIDIA RTX PRO 6000 Blackwell", warp_size=32, shared_bytes=99 * _KIB,
        registers=255, units=188, llc_bytes=128 * _MIB, tma=True, mma=("mma.sync",),
    ),
    Target(
        kind="hip", arch="gfx942", device="AMD Instinct MI300X", warp_size=64, shared_bytes=64 * _KIB, registers=512,
        units=304, llc_bytes=256 * _MIB, tma=False, mma=("mfma",),
    ),
    Target(
        kind="hip", arch="gfx950", device="AMD Instinct MI355X", warp_size=64, shared_bytes=160 * _KIB, registers=512,
        units=256, llc_bytes=256 * _MIB, tma=False, mma=("mfma",),
    ),
)  # fmt: skip
"""Every architecture that kernels are compiled for and checked against."""


def parse_target(text: str) -> Target:
    """Return the target named `cuda:90`, `sm_90`, `hip:gfx942` or `gfx942`. Raises InputError."""
    for target in TARGETS:
        if text in (target.name, target.environment_arch):
            return target
    raise InputError(f"target is {text!r}, expected one of {', '.join(t.name for t in TARGETS)}")


def target_of(environment: Environment) -> Target | None:
    """Return the target that an environment's device has; None for one that kernels are not checked against.

    A device of the same generation counts as it where the instruction set is the same: sm_87 as sm_86,
    sm_103 as sm_100, sm_121 as sm_120.
    """
    arch = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}.get(environment.arch, environment.arch)
    return next((target for target in TARGETS if target.environment_arch == arch), None)
