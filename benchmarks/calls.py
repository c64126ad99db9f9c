"""Calls of a layer with few tokens: its sort and both GEMMs in one call of compiled code, or launched one by one.

python benchmarks/calls.py
python benchmarks/calls.py --tokens 1,4,16 --seconds 20

Each round calls the same prepared layer both ways, in turns, after the last-level cache was filled with other numbers:
in a model other layers run in between. Ratios are taken within a round, medians with their quartiles. Weights are
random, dense, in the layer's default layout, and no table is in use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from report import write_result
from shapes import mixtral_tp8

from tilecast.autotune.workload import weight_stack
from tilecast.canonical import Json
from tilecast.engine import at_once
from tilecast.engine.experts import prepare_experts
from tilecast.environment import cpu_environment
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import ExpertLayer

LAYERS = {
    "Mixtral-8x7B, TP 8": mixtral_tp8(),
    "Qwen3-30B-A3B, TP 8": ExpertLayer(hidden=2048, intermediate=96, experts=128, top_k=8, dtype="bf16"),
    "Qwen3-30B-A3B": ExpertLayer(hidden=2048, intermediate=768, experts=128, top_k=8, dtype="bf16"),
}
WAYS = ("one by one", "at once")


def measure(name: str, layer: ExpertLayer, tokens: int, seconds: float) -> dict[str, Json]:
    """Time both ways, print one line and return the figures, µs."""
    w13, w2 = (weight_stack(gemm, 5) for gemm in layer.gemms)
    assert isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor)
    made = {way: prepare_experts(w13, w2, top_k=layer.top_k) for way in WAYS}
    del w13, w2
    generator = torch.Generator().manual_seed(tokens)
    rounds = [
        (
            torch.randn(tokens, layer.hidden, generator=generator).to(TORCH_DTYPES[layer.dtype]),
            torch.rand(tokens, layer.experts, generator=generator).topk(layer.top_k).indices,
            torch.rand(tokens, layer.top_k, generator=generator),
        )
        for _ in range(64)
    ]
    others = torch.zeros(2 * cpu_environment().llc_bytes // 4)
    most = at_once.MAX_TOKENS
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.inference_mode():
        # The first call of each way compiles, or learns.
        for way in WAYS:
            at_once.MAX_TOKENS = most if way == "at once" else 0
            made[way](*rounds[0])
        end, turn = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or turn < 10:
            for way in WAYS if turn % 2 else reversed(WAYS):
                at_once.MAX_TOKENS = most if way == "at once" else 0
                run, given = made[way], rounds[turn % len(rounds)]
                others.add_(1.0)
                begin = time.perf_counter_ns()
                run(*given)
                times[way].append((time.perf_counter_ns() - begin) / 1e3)
            turn += 1
    at_once.MAX_TOKENS = most
    ratios = [a / b for a, b in zip(times["one by one"], times["at once"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {way: statistics.median(seen) for way, seen in times.items()}
    print(
        f"  {name} ({layer.label}) T={tokens}: {medians['one by one']:.0f} µs one by one, {medians['at once']:.0f} at "
        f"once, {middle:.2f} times faster ({low:.2f} to {high:.2f}); {len(ratios)} rounds",
        flush=True,
    )
    return {
        "name": name, "layer": layer.to_json(), "tokens": tokens, "rounds": len(ratios), "p50_us": dict(medians),
        "least_us": {way: min(seen) for way, seen in times.items()}, "speedup": middle, "quartiles": [low, high],
    }  # fmt: skip


def main() -> int:
    """Run and write the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=8.0, help="a point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points = [
        measure(name, layer, int(tokens), options.seconds)
        for name, layer in LAYERS.items()
        for tokens in options.tokens.split(",")
    ]
    print(
        f"  written to {write_result('calls', {'threads': options.threads, 'points': list(points)}, options.results)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
