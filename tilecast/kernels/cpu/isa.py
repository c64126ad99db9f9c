"""What the generator must know of an instruction set: lanes, registers, and which multiply-adds there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


@dataclass(frozen=True, kw_only=True)
class Isa:
    """One target of the generator.

    lanes: float32 lanes of a vector register; registers: vector registers; fma: fused multiply-add exists
    (without it products are rounded before they are added, another numerics class); half: fp16 converts in
    one instruction; dot_bf16: pairwise bf16 dot product (`vdpbf16ps`) exists; byte_pairs: bytes are multiplied
    and pairs of products added in one instruction (`pmaddubsw`). `cpu` and `features` are LLVM's names, `triple`
    its target triple.
    """

    name: str
    lanes: int
    registers: int
    fma: bool
    half: bool
    dot_bf16: bool
    triple: str
    cpu: str
    features: str = ""
    byte_pairs: bool = False


def _from_features(triple: str, cpu: str, features: frozenset[str], text: str) -> Isa:
    arch = triple.split("-")[0]
    if arch in ("x86_64", "amd64"):
        if {"avx512f", "avx512bw", "avx512vl", "fma"} <= features:
            dot = "avx512bf16" in features
            name = "avx512_bf16" if dot else "avx512"
            # Without this LLVM splits vectors in two on CPUs whose clock used to drop with 512-bit code.
            return Isa(
                name=name, lanes=16, registers=32, fma=True, half=True, dot_bf16=dot,
                triple=triple, cpu=cpu, features=text + ",-prefer-256-bit", byte_pairs=True,
            )  # fmt: skip
        if {"avx2", "fma"} <= features:
            half = "f16c" in features
            return Isa(
                name="avx2", lanes=8, registers=16, fma=True, half=half, dot_bf16=False,
                triple=triple, cpu=cpu, features=text, byte_pairs=True,
            )  # fmt: skip
        return Isa(
            name="sse2", lanes=4, registers=16, fma=False, half=False, dot_bf16=False,
            triple=triple, cpu=cpu, features=text,
        )  # fmt: skip
    if arch in ("aarch64", "arm64"):
        return Isa(
            name="neon", lanes=4, registers=32, fma=True, half=True, dot_bf16=False,
            triple=triple, cpu=cpu, features=text,
        )  # fmt: skip
    return Isa(
        name="portable", lanes=4, registers=16, fma=False, half=False, dot_bf16=False,
        triple=triple, cpu=cpu, features=text,
    )  # fmt: skip


@cache
def host_isa() -> Isa:
    """Return the best instruction set of this machine's CPU."""
    features = llvm.get_host_cpu_features()
    present = frozenset(name for name, on in features.items() if on)
    return _from_features(llvm.get_process_triple(), llvm.get_host_cpu_name(), present, features.flatten())


CROSS = {
    "avx512_bf16": Isa(
        name="avx512_bf16", lanes=16, registers=32, fma=True, half=True, dot_bf16=True,
        triple="x86_64-unknown-linux-gnu", cpu="znver5", features="-prefer-256-bit", byte_pairs=True,
    ),
    "avx512": Isa(
        name="avx512", lanes=16, registers=32, fma=True, half=True, dot_bf16=False,
        triple="x86_64-unknown-linux-gnu", cpu="skylake-avx512", features="-prefer-256-bit", byte_pairs=True,
    ),
    "avx2": Isa(
        name="avx2", lanes=8, registers=16, fma=True, half=True, dot_bf16=False,
        triple="x86_64-unknown-linux-gnu", cpu="haswell", byte_pairs=True,
    ),
    "sse2": Isa(
        name="sse2", lanes=4, registers=16, fma=False, half=False, dot_bf16=False,
        triple="x86_64-unknown-linux-gnu", cpu="x86-64",
    ),
    "neon": Isa(
        name="neon", lanes=4, registers=32, fma=True, half=True, dot_bf16=False,
        triple="aarch64-unknown-linux-gnu", cpu="neoverse-n1",
    ),
}  # fmt: skip
"""Named targets, for compiling without the CPU."""
