"""Every kernel's defaults, and configs drawn from every kernel's space, compiled for the targets that they are for."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import pytest

from tilecast.kernels import registry
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import Target, parse_target
from tilecast.kernels.gpu.tiles import instruction, shared_bytes, tile_shape
from tilecast.kernels.static import MAX_SPILL_BYTES, Report, analyse, verdict
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

QWEN3 = ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8)
LAYERS = {
    "Mixtral-8x7B TP2": ExpertLayer(hidden=4096, intermediate=7168, experts=8, top_k=2),
    "Qwen3-30B-A3B": QWEN3,
    "gpt-oss-120b": ExpertLayer(
        hidden=2880, intermediate=2880, experts=128, top_k=4, activation="swiglu_oai", bias=True
    ),
    "DeepSeek-V3 EP8": ExpertLayer(hidden=7168, intermediate=2048, experts=32, top_k=8, global_experts=256),
    "odd": ExpertLayer(hidden=333, intermediate=201, experts=5, top_k=3, dtype="fp32", activation="gelu", gated=False),
}
SAMPLED_LAYERS = {**LAYERS, "Qwen3 in fp16": replace(QWEN3, dtype="fp16")}
DEFAULT_TOKENS, SAMPLED_TOKENS = (1, 8, 64, 512, 4096), (1, 16, 128, 2048)
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")
SHORT = "cuda:90"
SAMPLED_TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
DEFAULTS, SAMPLES, SEED = 18, 50, 20
REDUCTION = {"hip:gfx950": 32}
"""K of the 16-bit instruction where it is not 16: sums of other lengths would be another numerics class."""
GEMMS = ("grouped", "persistent", "tma_tiles", "split_tiles", "decode_up", "decode_down")
KERNELS = tuple(kernel for kernel in registry if isinstance(kernel, TritonExperts) and "dense" in kernel.formats)


@dataclass(frozen=True)
class Case:
    """One build of a config for a GEMM of a layer."""

    layer: str
    gemm: ExpertGemm
    config: TileConfig
    build: Build

    @property
    def multiplies(self) -> bool:
        return self.build.function in GEMMS

    @property
    def sixteen_bits(self) -> bool:
        return self.gemm.layer.dtype != "fp32"

    @property
    def label(self) -> str:
        return f"{self.layer} {self.gemm.name} {self.build.function} {self.config.label}"


def kernels_for(gemm: ExpertGemm, target: Target) -> Iterator[TritonExperts]:
    return (kernel for kernel in KERNELS if kernel.rejects(gemm, target.environment()) is None)


def cases_of(layer: str, gemm: ExpertGemm, config: TileConfig, target: Target) -> list[Case]:
    kernel = registry[config.kernel]
    assert isinstance(kernel, TritonExperts)
    return [Case(layer, gemm, config, build) for build in kernel.builds(gemm, config, target)]


def defaults(target: Target) -> list[Case]:
    """Return every different build of the kernels' own defaults."""
    found: dict[str, Case] = {}
    for name, layer in LAYERS.items():
        for gemm in layer.gemms:
            for kernel in kernels_for(gemm, target):
                for tokens in DEFAULT_TOKENS:
                    config = kernel.default(gemm, tokens, target.environment())
                    reason = registry.invalid(gemm, config, target.environment())
                    if kernel.name == "triton.moe_split_k" and reason is not None:
                        assert "does not cut K" in reason, reason
                        continue
                    assert reason is None, f"{name} {gemm.name} {config.label}: {reason}"
                    found.update((case.build.digest, case) for case in cases_of(name, gemm, config, target))
    return list(found.values())


def thinned(cases: list[Case], count: int, target: Target) -> list[Case]:
    """Return `count` of the cases, every function and GEMM in turn, drawn differently for each target."""
    groups: dict[tuple[str, str, bool], list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.build.function, case.gemm.name, case.sixteen_bits].append(case)
    chance = random.Random(f"{SEED} {target.name}")
    for group in groups.values():
        chance.shuffle(group)
    # The GEMMs' functions first: what adds up their parts is small and much the same everywhere.
    order = sorted(groups, key=lambda key: (key[0] not in GEMMS, not key[2], key))
    longest = max(map(len, groups.values()))
    return [groups[key][turn] for turn in range(longest) for key in order if turn < len(groups[key])][:count]


def sampled(target: Target) -> list[Case]:
    """Return the GEMMs of valid configs from every kernel's space, spread over layers, GEMMs and token counts."""
    chance = random.Random(f"{SEED} {target.name}")
    corners: dict[str, list[tuple[str, ExpertGemm, int]]] = defaultdict(list)
    for name, layer in SAMPLED_LAYERS.items():
        for gemm in layer.gemms:
            for kernel in kernels_for(gemm, target):
                corners[kernel.name] += [(name, gemm, tokens) for tokens in SAMPLED_TOKENS]
    for each in corners.values():
        chance.shuffle(each)
    found: dict[str, Case] = {}
    while len(found) < SAMPLES:
        for kernel_name, left in corners.items():
            # Some spaces are empty for some token counts: the next one takes the turn.
            while left:
                name, gemm, tokens = left.pop()
                space = list(registry[kernel_name].space(gemm, tokens, target.environment()))
                valid = [config for config in space if not registry.invalid(gemm, config, target.environment())]
                if valid:
                    case = cases_of(name, gemm, chance.choice(valid), target)[0]
                    found[case.build.digest] = case
                    break
        assert any(corners.values()), f"only {len(found)} different builds for {target.name}"
    return list(found.values())[:SAMPLES]


def compiled(cases: list[Case], target: Target) -> list[tuple[Case, Report]]:
    """Return cases with their reports."""
    reports = analyse([case.build for case in cases], target, workers=2, cache=None)
    return list(zip(cases, reports, strict=True))


def unrolled(case: Case, report: Report, target: Target) -> bool:
    """Whether LLVM left no loop over K: a program has the instructions of all of K, one after the other."""
    if target.kind != "hip":
        return False
    shapes = [(re.search(r"m(\d+)n(\d+)k(\d+)", name), count) for name, count in report.instructions.items()]
    products = sum(count * prod(map(int, shape.groups())) for shape, count in shapes if shape)
    m, n, _ = tile_shape(case.config)
    return products * case.config.integer("num_warps") >= m * n * case.gemm.k


def faults(case: Case, report: Report, target: Target) -> list[str]:
    """Return what is wrong with any build of a valid config, but for what it spills."""
    kind = instruction(case.gemm, case.config, target) if case.multiplies else "fma"
    reason = verdict(report, target, tensor_cores=kind != "fma", max_spill_bytes=MAX_SPILL_BYTES)
    if reason is not None:
        return [reason]
    found = []
    kinds = [each.removesuffix(".mma") for each in report.mma_kinds]
    if kinds != ([] if kind == "fma" else [kind]):
        found.append(f"multiplies by {kinds}, {kind} was said")
    if case.multiplies and report.shared_bytes > shared_bytes(case.gemm, case.config, target):
        bound = shared_bytes(case.gemm, case.config, target)
        found.append(f"takes {report.shared_bytes} bytes of shared memory, at most {bound} were said")
    if case.multiplies and case.sixteen_bits:
        if report.mma_k != REDUCTION.get(target.name, 16):
            found.append(f"an instruction sums {report.mma_k} products")
        if report.loop_float_ops and not unrolled(case, report, target):
            found.append(f"{report.loop_float_ops} roundings in the loop over K")
    return found


def default_spill(case: Case, report: Report, target: Target) -> int:
    """Return the most that a default may spill: nothing, where that is for the tile to say."""
    # ptxas for sm_100 and later may stop at 64 registers for the sake of occupancy, and spill a few.
    return MAX_SPILL_BYTES if target.arch in ("100", "120") and report.registers <= 64 else 0


def sampled_spill(case: Case, report: Report, target: Target) -> int:
    return MAX_SPILL_BYTES


def check(pairs: list[tuple[Case, Report]], target: Target, most_spill: Callable[[Case, Report, Target], int]) -> None:
    lines = []
    for case, report in pairs:
        found = faults(case, report, target)
        spill = max(report.spill_bytes, report.stack_bytes)
        if spill > most_spill(case, report, target):
            found.append(f"spills {spill} bytes with {report.registers} registers")
        lines += [f"{case.label}: {'; '.join(found)}"] if found else []
    assert not lines, "\n".join([f"{len(lines)} of {len(pairs)} on {target.name}", *lines])


@pytest.mark.parametrize("name", [SHORT, *(pytest.param(t, marks=pytest.mark.long) for t in TARGETS if t != SHORT)])
def test_defaults_compile_to_what_is_said_of_them(name: str) -> None:
    target = parse_target(name)
    pairs = compiled(thinned(defaults(target), DEFAULTS, target), target)
    assert len(pairs) == DEFAULTS
    check(pairs, target, default_spill)


@pytest.mark.parametrize(
    "name", [t if t == "hip:gfx942" else pytest.param(t, marks=pytest.mark.long) for t in SAMPLED_TARGETS]
)
def test_valid_configs_compile_to_what_is_said_of_them(name: str) -> None:
    target = parse_target(name)
    pairs = compiled(sampled(target), target)
    assert len(pairs) == SAMPLES
    assert {case.config.kernel for case, _ in pairs} >= {k.name for k in KERNELS if "tma" not in k.name}
    check(pairs, target, sampled_spill)
