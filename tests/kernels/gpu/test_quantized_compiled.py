"""Kernels on quantised weights, compiled: defaults spill nothing, drawn configs hardly, rules say what they take."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tilecast.kernels import registry
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import Target, parse_target
from tilecast.kernels.gpu.tiles import FP8, instruction, shared_bytes
from tilecast.kernels.static import MAX_SPILL_BYTES, Report, analyse, verdict
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, TileConfig

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

QWEN3 = ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8)
BIASED = ExpertLayer(hidden=2880, intermediate=2880, experts=32, top_k=4, activation="swiglu_oai", bias=True)
"""Sizes that end within a step of 128, and a bias beside the sums."""
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
SHORT = "cuda:90"
TOKENS = (1, 16, 512, 4096)
FORMATS = WEIGHT_FORMATS[1:]
KERNELS = tuple(kernel for kernel in registry if isinstance(kernel, TritonExperts) and len(kernel.formats) > 1)
DEFAULTS, SAMPLES, SEED = 16, 16, 7
Drawn = tuple[ExpertGemm, TileConfig, Build]


def built(kernel_name: str, gemm: ExpertGemm, config: TileConfig, target: Target) -> Drawn:
    kernel = registry[kernel_name]
    assert isinstance(kernel, TritonExperts)
    (gemm_build,) = (each for each in kernel.builds(gemm, config, target) if each.module in ("_quantized", "_fp8")
                     and each.function != "round_rows")  # fmt: skip
    return gemm, config, gemm_build


def corners(target: Target) -> list[tuple[TritonExperts, ExpertGemm, int]]:
    """Every kernel, format, GEMM and number of tokens that go together, in an order drawn for the target."""
    layers = [replace(layer, weight_format=name) for layer in (QWEN3, BIASED) for name in FORMATS]
    found = [
        (kernel, gemm, tokens)
        for kernel in KERNELS for layer in layers for gemm in layer.gemms for tokens in TOKENS
        if kernel.rejects(gemm, target.environment()) is None
    ]  # fmt: skip
    random.Random(f"{SEED} {target.name}").shuffle(found)
    # Kernels take turns.
    turns: dict[str, int] = {}
    ranked = []
    for place, (kernel, _, _) in enumerate(found):
        turns[kernel.name] = turns.get(kernel.name, 0) + 1
        ranked.append((turns[kernel.name], place))
    return [found[place] for _, place in sorted(ranked)]


def defaults(target: Target) -> list[Drawn]:
    found: dict[str, Drawn] = {}
    for kernel, gemm, tokens in corners(target):
        config = kernel.default(gemm, tokens, target.environment())
        assert registry.invalid(gemm, config, target.environment()) is None, config.label
        drawn = built(config.kernel, gemm, config, target)
        found[drawn[2].digest] = drawn
        if len(found) == DEFAULTS:
            break
    return list(found.values())


def sampled(target: Target) -> list[Drawn]:
    found: dict[str, Drawn] = {}
    chance = random.Random(f"{SEED} {target.name}")
    for kernel, gemm, tokens in corners(target):
        space = list(kernel.space(gemm, tokens, target.environment()))
        valid = [config for config in space if registry.invalid(gemm, config, target.environment()) is None]
        if valid:
            drawn = built(kernel.name, gemm, chance.choice(valid), target)
            found[drawn[2].digest] = drawn
        if len(found) == SAMPLES:
            break
    return list(found.values())


def compiled(drawn: list[Drawn], target: Target) -> list[tuple[Drawn, Report]]:
    reports = analyse([build for _, _, build in drawn], target, workers=2, cache=None)
    return list(zip(drawn, reports, strict=True))


def faults(drawn: Drawn, report: Report, target: Target, most_spill: int) -> list[str]:
    gemm, config, _ = drawn
    reason = verdict(report, target, tensor_cores=True, max_spill_bytes=MAX_SPILL_BYTES)
    found = [reason] if reason is not None else []
    spill, kind = max(report.spill_bytes, report.stack_bytes), instruction(gemm, config, target)
    if reason is None and spill > most_spill:
        found.append(f"spills {spill} bytes with {report.registers} registers")
    if [each.removesuffix(".mma") for each in report.mma_kinds] != [kind]:
        found.append(f"multiplies by {report.mma_kinds}, {kind} was said")
    if report.shared_bytes > shared_bytes(gemm, config, target):
        found.append(f"takes {report.shared_bytes} bytes of shared memory, {shared_bytes(gemm, config, target)} said")
    if (config.kernel == FP8) != any("e4m3" in each or "f8f6f4" in each for each in report.instructions):
        found.append(f"multiplies by {list(report.instructions)}")
    return found


def check(pairs: list[tuple[Drawn, Report]], target: Target, most_spill: int) -> None:
    lines = []
    for drawn, report in pairs:
        # As for dense weights, ptxas for sm_100 may stop at 64 registers and spill a few.
        allowed = MAX_SPILL_BYTES if target.arch == "100" and report.registers <= 64 else most_spill
        found = faults(drawn, report, target, allowed)
        label = f"{drawn[0].layer.label} {drawn[0].name} {drawn[1].label}"
        lines += [f"{label}: {'; '.join(found)}"] if found else []
    assert not lines, "\n".join([f"{len(lines)} of {len(pairs)} on {target.name}", *lines])


@pytest.mark.parametrize("name", [SHORT, *(pytest.param(t, marks=pytest.mark.long) for t in TARGETS if t != SHORT)])
def test_defaults_spill_nothing(name: str) -> None:
    target = parse_target(name)
    pairs = compiled(defaults(target), target)
    assert len(pairs) == DEFAULTS
    check(pairs, target, 0)


@pytest.mark.parametrize("name", [t if t == "hip:gfx950" else pytest.param(t, marks=pytest.mark.long) for t in TARGETS])
def test_valid_configs_are_what_is_said_of_them(name: str) -> None:
    target = parse_target(name)
    pairs = compiled(sampled(target), target)
    assert len(pairs) == SAMPLES
    check(pairs, target, MAX_SPILL_BYTES)
