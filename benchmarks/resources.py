"""What the defaults of the Triton kernels compile to, on every target, and a comparison of their tiles with vLLM's.

`python -m benchmarks.resources` compiles, writes benchmarks/results/compiled/*.json and puts their tables into
docs/gpu-kernels.md. Needs Triton, no GPU; nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from math import exp, lgamma, log
from pathlib import Path
from typing import Any

from tilecast.environment import gpu_toolchain
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.defaults import default_config
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.target import TARGETS, Target, parse_target
from tilecast.kernels.static import REGISTER_FILE, Report, analyse
from tilecast.models.find import resolve
from tilecast.models.sharding import layer_for_rank
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

TOKENS = (1, 8, 64, 512, 4096)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compiled"
PAGE = ROOT / "docs" / "gpu-kernels.md"
SHARED_BYTES_A_CYCLE = 128
FLOPS_A_CYCLE = 4096
"""Of one Hopper SM in bf16, dense: the datasheet's peak over SMs and clock."""
KERNELS = {kernel.name: kernel for kernel in (Grouped(), Decode())}


def layers() -> dict[str, ExpertLayer]:
    """Return the layers of the tables, by title."""

    def sharded(preset: str, tp: int) -> ExpertLayer:
        return layer_for_rank(resolve(preset, dtype="bf16").layers[0].layer, 0, tp=tp, ep=1)

    return {"Mixtral-8x7B, TP 2": sharded("mixtral-8x7b", 2), "Qwen3-30B-A3B, TP 1": sharded("qwen3-30b-a3b", 1)}


def vllm_config(layer: ExpertLayer, tokens: int) -> TileConfig:
    """Return the tile of vLLM's rule for 16-bit weights without a tuned file, as a config of our grouped kernel."""
    block_m = 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128
    return TileConfig(
        Grouped.name,
        {
            "block_m": block_m,
            "block_n": 64 if tokens <= 64 else 128,
            "block_k": 128 if tokens <= 64 else 64,
            "group_m": 16 if tokens // layer.experts > 128 else 1,
            "num_warps": 4 if tokens <= 128 else 8,
            "num_stages": 4 if tokens <= 32 else 3,
            "swap": 0,
        },
    )


def expected_tiles(layer: ExpertLayer, tokens: int, block_m: int) -> tuple[float, float]:
    """Return (row tiles, experts with rows) that uniform routing of `tokens` gives on average."""
    chance = layer.top_k / layer.global_experts
    likely = [
        exp(
            lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
            + n * log(chance) + (tokens - n) * log(1 - chance)
        )
        for n in range(tokens + 1)
    ]  # fmt: skip
    tiles = sum(p * -(-n // block_m) for n, p in enumerate(likely))
    return layer.experts * tiles, layer.experts * (1 - likely[0])


def facts(gemm: ExpertGemm, tokens: int, config: TileConfig, target: Target, report: Report) -> dict[str, Any]:
    """Return one row of the tables: the config, what the compiler said, and what follows from both."""
    block_m, block_n, block_k = (config.integer(f"block_{axis}") for axis in "mnk")
    stages = config.integer("num_stages")
    columns = -(-gemm.n // block_n)
    if config.kernel == Decode.name:
        tiles, passes = float(tokens * (gemm.layer.top_k if gemm.name == "up" else 1)), 1.0
        steps = gemm.k * (1 if gemm.name == "up" else gemm.layer.top_k)
    else:
        tiles, active = expected_tiles(gemm.layer, tokens, block_m)
        passes, steps = tiles / active, gemm.k
    programs = tiles * columns
    row: dict[str, Any] = {
        "gemm": gemm.name, "tokens": tokens, "config": {"kernel": config.kernel, **dict(config.params)},
        "registers": report.registers, "spill_bytes": report.spill_bytes, "stack_bytes": report.stack_bytes,
        "shared_bytes": report.shared_bytes, "threads": report.threads, "instructions": report.instructions,
        "loop_copies": report.loop_copies, "error": report.error, "programs": round(programs),
        "weight_passes": round(passes, 2), "operand_megabytes": round(programs * steps * (block_m + block_n) * 2e-6),
    }  # fmt: skip
    if target.kind == "cuda" and not report.error:
        resident = resident_programs(report, target)
        here = min(float(resident), programs / target.units)
        row["resident"] = resident
        row["weight_kib_in_flight"] = round(here * (stages - 1) * block_n * block_k * 2 / 1024)
        row["tensor_core_bound"] = tensor_core_bound(block_m, block_n, report)
    return row


def resident_programs(report: Report, target: Target) -> int:
    """Return how many programs an SM holds; each takes 1 KiB of shared memory beyond its own."""
    registers = -(-report.registers // 8) * 8 * report.threads
    return min(
        REGISTER_FILE[target.kind] // registers,
        (target.shared_bytes + 1024) // (report.shared_bytes + 1024),
        2048 // report.threads,
    )


def tensor_core_bound(block_m: int, block_n: int, report: Report) -> float | None:
    """Return the share of the tensor cores' peak that shared memory leaves to `wgmma`; None for other instructions.

    For 16 of K: each instruction reads 64 rows and its columns, and each operand was written once.
    """
    shapes = [name.split()[1] for name in report.instructions if name.startswith("wgmma")]
    if not shapes:
        return None
    width = int(shapes[0].removeprefix("m64n").partition("k")[0])
    read = block_m // 64 * (block_n // width) * (64 + width) * 32
    written = (block_m + block_n) * 32
    busy = 2 * block_m * block_n * 16 / FLOPS_A_CYCLE
    return round(min(1.0, busy * SHARED_BYTES_A_CYCLE / (read + written)), 2)


def measure(target: Target, *, vllm: bool, workers: int | None = None) -> dict[str, Any]:
    """Compile a target's defaults, or vLLM's tiles, and return what a result file holds."""
    asked = [
        (title, gemm, tokens, vllm_config(layer, tokens) if vllm else default_config(gemm, tokens, target))
        for title, layer in layers().items()
        for tokens in TOKENS
        for gemm in layer.gemms
    ]
    builds = [KERNELS[config.kernel].builds(gemm, config, target)[0] for _, gemm, _, config in asked]
    reports = analyse(builds, target, workers=workers)
    rows = [
        {"layer": title, **facts(gemm, tokens, config, target, report)}
        for (title, gemm, tokens, config), report in zip(asked, reports, strict=True)
    ]
    return {
        "target": target.name,
        "triton": gpu_toolchain()["triton"],
        "tiles": "vllm" if vllm else "own",
        "rows": rows,
    }


def tables(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the page's tables; `results` by file name without its ending."""
    own, other = results["cuda-90"], results["cuda-90-vllm"]
    lines = [
        f"Compiled by Triton {own['triton']} for sm_90; 132 SMs.", "",
        "| layer | T | GEMM | tiles | M×N×K, warps, stages | MMA | registers | spills | shared KiB | programs "
        "| on an SM | weights in flight KiB an SM | weight passes | operands read MB | MMA bound |",
        "|" + " --- |" * 15,
    ]  # fmt: skip
    for ours, theirs in zip(own["rows"], other["rows"], strict=True):
        lines += [_line("Tilecast", ours), _line("vLLM's", theirs)]
    lines += ["", "Defaults on every target: the most over both layers, both GEMMs and all T of the table above.", ""]
    lines += [
        "| target | registers | spilled bytes | shared KiB | MMA kinds | compile errors |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, result in sorted(results.items()):
        if result["tiles"] == "own":
            rows = result["rows"]
            kinds = sorted({key.split()[0] for row in rows for key in row["instructions"]})
            lines.append(
                f"| {result['target']} | {max(r['registers'] for r in rows)} | {max(r['spill_bytes'] for r in rows)} "
                f"| {max(r['shared_bytes'] for r in rows) / 1024:.0f} | {', '.join(kinds)} "
                f"| {sum(bool(r['error']) for r in rows)} |"
            )
    return "\n".join(lines)


def _line(whose: str, row: dict[str, Any]) -> str:
    config = row["config"]
    tile = f"{config['block_m']}×{config['block_n']}×{config['block_k']}, {config['num_warps']}, {config['num_stages']}"
    kind = " ".join(next(iter(row["instructions"]), "none").split()[:2])
    bound = "" if row["tensor_core_bound"] is None else f"{row['tensor_core_bound']:.0%}"
    cells = (
        row["layer"], row["tokens"], row["gemm"], whose, tile, kind, row["registers"], row["spill_bytes"],
        f"{row['shared_bytes'] / 1024:.0f}", row["programs"], row["resident"], row["weight_kib_in_flight"],
        row["weight_passes"], row["operand_megabytes"], bound,
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def with_tables(page: str, text: str) -> str:
    """Return the page with `text` between its two markers."""
    start, end = "<!-- compiled -->\n", "<!-- /compiled -->"
    before, _, rest = page.partition(start)
    return before + start + text + "\n" + end + rest.partition(end)[2]


def read_results() -> dict[str, dict[str, Any]]:
    """Return the result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", help="only this one, like cuda:90; may be repeated")
    parser.add_argument("--workers", type=int, help="how many compile at once")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for target in [parse_target(name) for name in given.target] if given.target else TARGETS:
        for vllm in (False, True) if target.name == "cuda:90" else (False,):
            result = measure(target, vllm=vllm, workers=given.workers)
            name = f"{target.kind}-{target.arch}{'-vllm' if vllm else ''}"
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), tables(read_results())))


if __name__ == "__main__":
    main()
