"""Time CPU decode and prefill with quantised weights against dense ones, interleaved.

python benchmarks/formats.py --threads 2 --rounds 40 --tokens 1,4,16,64 --formats awq_g128,int8_g128,fp8_block128

Each GEMM of Mixtral-8x7B's layer as one of 8 ranks sees it, default configs, experts taking turns so that no weights
are read from a cache. `speedup` is over the dense GEMM, the median and the quartiles of ratios within a round, and of
the least times; `roofline` is the part of the measured read bandwidth that a launch reaches on the bytes of its active
experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import write_result
from shapes import mixtral_tp8

from tilecast.canonical import Json
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.peak import measure_peaks
from tilecast.kernels.cpu.sorting import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import quantize
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

KERNEL = MoeGemm()


def packed(gemm: ExpertGemm) -> GemmWeights:
    """Random weights in the default config's layout, the same numbers in every format."""
    layer, generator = gemm.layer, torch.Generator().manual_seed(7)
    data = torch.randn(layer.experts, gemm.n, gemm.k, generator=generator).mul_(gemm.k**-0.5)
    stack = data.to(TORCH_DTYPES[layer.dtype]) if layer.weight_format == "dense" else quantize(data, gemm)
    layout = KERNEL.layout(gemm, KERNEL.default(gemm, 1, cpu_environment()))
    return KERNEL.pack(GemmWeights(gemm=gemm, layout=PLAIN, data=stack), layout)


def config_of(weights: GemmWeights, tokens: int) -> TileConfig:
    return KERNEL.default(weights.gemm, tokens, cpu_environment())


def launcher(weights: GemmWeights, tokens: int) -> Callable[[int], float]:
    """Return a function that launches once, for a round's choice of experts, and returns seconds."""
    gemm, layer = weights.gemm, weights.gemm.layer
    config = config_of(weights, tokens)
    dtype, slots = TORCH_DTYPES[layer.dtype], tokens * layer.top_k
    first = torch.arange(slots).view(tokens, layer.top_k)
    routes = [sort_slots((first + layer.top_k * i) % layer.experts, layer.experts) for i in range(4)]
    rows = torch.randn(tokens if gemm.name == "up" else slots, gemm.k).to(dtype)
    shape = (slots, layer.intermediate) if gemm.name == "up" else (tokens, layer.hidden)
    out, scales = torch.empty(shape, dtype=dtype), torch.rand(tokens, layer.top_k)

    def launch(index: int) -> float:
        begin = time.perf_counter()
        if gemm.name == "up":
            KERNEL.up(config, rows, weights, routes[index % 4], out)
        else:
            KERNEL.down(config, rows, weights, routes[index % 4], scales, out)
        return time.perf_counter() - begin

    return launch


def race(layers: list[ExpertLayer], tokens: int, rounds: int, stacks: list[list[GemmWeights]]) -> list[dict[str, Json]]:
    """Time every format's GEMMs in turns; the first is what the others are compared with."""
    launchers = [[launcher(weights, tokens) for weights in both] for both in stacks]
    times: list[list[float]] = [[] for _ in layers]
    for index in range(-2, rounds):
        for taken, both in zip(times, launchers, strict=True):
            seconds = sum(launch(index) for launch in both)
            if index >= 0:
                taken.append(seconds)
    sizes = [sum(g.weight_bytes(min(layer.experts, tokens * layer.top_k)) for g in layer.gemms) for layer in layers]
    # A kernel's best launch may find more bandwidth than the peak's few tries.
    rates = [size / min(taken) / 1e9 for size, taken in zip(sizes, times, strict=True)]
    gb_s = max(measure_peaks().read_gb_s, *rates)
    found = []
    for layer, taken, both, size in zip(layers, times, stacks, sizes, strict=True):
        best, middle = min(taken), statistics.median(taken)
        ratios = [dense / mine for dense, mine in zip(times[0], taken, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        print(
            f"  {layer.weight_format} T={tokens}: {ratio:.2f}× the dense kernel ({low:.2f} to {high:.2f}; least times "
            f"{min(times[0]) / best:.2f}×), {middle * 1e6:.0f} µs, "
            f"{size / middle / 1e9 / gb_s:.0%} of the memory roofline",
            flush=True,
        )
        found.append({
            "format": layer.weight_format, "tokens": tokens, "min_us": best * 1e6, "median_us": middle * 1e6,
            "speedup_min": min(times[0]) / best, "speedup_median": ratio, "quartiles": [low, high],
            "configs": {w.gemm.name: config_of(w, tokens).label for w in both},
            "weight_bytes": size, "read_gb_s": gb_s, "roofline_min": size / best / 1e9 / gb_s,
            "roofline_median": size / middle / 1e9 / gb_s,
        })  # fmt: skip
    return found


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description="Time the CPU kernels on weight formats.")
    parser.add_argument("--formats", default="awq_g128,int4_g128,int8_g128,fp8_block128", help="comma-separated")
    parser.add_argument("--tokens", default="1,4,16,64", help="comma-separated")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = mixtral_tp8(options.dtype)
    names = ["dense", *options.formats.split(",")]
    layers = [ExpertLayer(**{**base.to_json(), "weight_format": name}) for name in names]  # type: ignore[arg-type]
    stacks = [[packed(gemm) for gemm in layer.gemms] for layer in layers]
    rows = [row for tokens in options.tokens.split(",") for row in race(layers, int(tokens), options.rounds, stacks)]
    result: dict[str, Json] = {"layer": base.label, "threads": options.threads, "rows": list(rows)}
    print(f"  written to {write_result('formats', result, options.results)}", flush=True)


if __name__ == "__main__":
    main()
