"""What the defaults of the Triton kernels on quantised weights compile to.

`python -m benchmarks.quantized_resources` compiles, writes benchmarks/results/compiled-quantized/*.json and puts their
table into docs/gpu-kernels.md. Needs Triton, no GPU; nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.resources import PAGE, ROOT
from tilecast.environment import gpu_toolchain
from tilecast.kernels import registry
from tilecast.kernels.gpu.fp8 import Fp8
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import Target, parse_target
from tilecast.kernels.static import analyse
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
FORMATS = ("awq_g128", "int8_g128", "fp8_block128")
TOKENS = (1, 64, 4096)
LAYER = ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8)
"""Qwen3-30B-A3B's."""
RESULTS = ROOT / "benchmarks" / "results" / "compiled-quantized"
START, END = "<!-- compiled quantised -->\n", "<!-- /compiled quantised -->"


def asked(target: Target) -> Iterator[tuple[str, ExpertGemm, int, TileConfig]]:
    """Yield (format, GEMM, tokens, default config) of every kernel that takes the format on the target."""
    environment = target.environment()
    for name in FORMATS:
        for gemm in replace(LAYER, weight_format=name).gemms:
            for kernel in (Grouped(), Fp8()):
                if kernel.rejects(gemm, environment) is None:
                    yield from ((name, gemm, tokens, kernel.default(gemm, tokens, environment)) for tokens in TOKENS)


def measure(target: Target, workers: int | None = None) -> dict[str, Any]:
    """Compile a target's defaults and return what a result file holds."""
    cases = list(asked(target))
    builds = []
    for _, gemm, _, config in cases:
        kernel = registry[config.kernel]
        assert isinstance(kernel, TritonExperts)
        # Rounding and combining are launches of their own.
        (build,) = (each for each in kernel.builds(gemm, config, target) if "BLOCK_N" in dict(each.constants))
        builds.append(build)
    rows = [
        {
            "format": name, "gemm": gemm.name, "tokens": tokens,
            "config": {"kernel": config.kernel, **dict(config.params)}, "registers": report.registers,
            "spill_bytes": report.spill_bytes, "stack_bytes": report.stack_bytes,
            "shared_bytes": report.shared_bytes, "instructions": report.instructions,
            "loop_copies": report.loop_copies, "error": report.error,
        }
        for (name, gemm, tokens, config), report in zip(cases, analyse(builds, target, workers=workers), strict=True)
    ]  # fmt: skip
    return {"target": target.name, "triton": gpu_toolchain()["triton"], "rows": rows}


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the page's table: the most over GEMMs and tokens of each kernel, format and target."""
    versions = sorted({result["triton"] for result in results.values()})
    lines = [
        f"Defaults on Qwen3-30B-A3B's layer at {', '.join(map(str, TOKENS))} tokens, compiled by Triton "
        f"{', '.join(versions)}: the most over both GEMMs.",
        "",
        "| target | format | kernel | registers | spilled bytes | shared KiB | instructions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, result in sorted(results.items()):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in result["rows"]:
            groups.setdefault((row["format"], row["config"]["kernel"]), []).append(row)
        for (name, kernel), rows in groups.items():
            kinds = sorted({key.split()[0] for row in rows for key in row["instructions"]})
            lines.append(
                f"| {result['target']} | {name} | `{kernel}` | {max(r['registers'] for r in rows)} "
                f"| {max(r['spill_bytes'] for r in rows)} | {max(r['shared_bytes'] for r in rows) / 1024:.0f} "
                f"| {', '.join(kinds)} |"
            )
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """Return the page with `text` between its two markers."""
    before, _, rest = page.partition(START)
    return before + START + text + "\n" + END + rest.partition(END)[2]


def read_results() -> dict[str, dict[str, Any]]:
    """Return the result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", help="only this one, like cuda:90; may be repeated")
    parser.add_argument("--workers", type=int, help="how many compile at once")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for target in map(parse_target, given.target or TARGETS):
        result = measure(target, given.workers)
        path = RESULTS / f"{target.kind}-{target.arch}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table(read_results())))


if __name__ == "__main__":
    main()
