"""What placing experts costs: one layer on one device, and the same one with half of its experts near and half far.

python benchmarks/placement.py                                   as published
python benchmarks/placement.py --near cuda --tokens 1,64         with the near half on a GPU

Both run in turns in one process on the table's defaults, with fresh routing in each call; ratios are of one
turn.
Without a GPU both halves run on the CPU, one after the other, so that the figure is the cost of the way, not its gain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import write_result
from shapes import mixtral_tp8

from tilecast.canonical import Json
from tilecast.engine.experts import prepare_experts
from tilecast.engine.placement import place_experts
from tilecast.engine.runtime import use_table
from tilecast.errors import TilecastError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import ExpertLayer
from tilecast.settings import parse_tokens

ROUTINGS = 8
"""Sets of operands that calls take in turn."""


def waited(near: torch.device, call: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...]) -> float:
    """Return the seconds of a call until its result is there."""
    begin = time.perf_counter()
    call(*operands)
    if near.type == "cuda":
        torch.cuda.synchronize(near)
    return time.perf_counter() - begin


def measure(layer: ExpertLayer, tokens: int, near: torch.device, seconds: float) -> dict[str, Json]:
    """Time both, print one line and return the figures."""
    generator, dtype = torch.Generator().manual_seed(0), TORCH_DTYPES[layer.dtype]
    shapes = ((layer.experts, 2 * layer.intermediate, layer.hidden), (layer.experts, layer.hidden, layer.intermediate))
    w13, w2 = ((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for shape in shapes)
    whole = prepare_experts(w13.to(near), w2.to(near), top_k=layer.top_k)
    placed = place_experts(w13, w2, top_k=layer.top_k, near_experts=range(0, layer.experts, 2), near=near)
    drawn = [
        (
            torch.randn(tokens, layer.hidden, generator=generator).to(dtype).to(near),
            torch.rand(tokens, layer.experts, generator=generator).argsort(1)[:, : layer.top_k].int().to(near),
            torch.rand(tokens, layer.top_k, generator=generator).to(near),
        )
        for _ in range(ROUTINGS)
    ]
    times: tuple[list[float], list[float]] = ([], [])
    end, turn = time.perf_counter() + seconds, -ROUTINGS
    while time.perf_counter() < end or turn < ROUTINGS:
        for call, seen in zip((whole, placed), times, strict=True):
            took = waited(near, call, drawn[turn % ROUTINGS])
            if turn >= 0:
                seen.append(took * 1e6)
        turn += 1
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
    one, two = map(statistics.median, times)
    print(
        f"  {layer.label} T={tokens}: one device {one:.0f} µs, placed {two:.0f} µs, "
        f"{middle:.2f} times ({low:.2f} to {high:.2f})"
    )
    return {
        "layer": layer.to_json(), "label": layer.label, "tokens": tokens, "near": near.type, "rounds": len(times[0]),
        "one_device_us": one, "placed_us": two, "ratio": middle, "quartiles": [low, high],
    }  # fmt: skip


def main() -> int:
    """Run and write the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--near", default="cpu", choices=("cpu", "cuda"), help="device of the near half")
    parser.add_argument("--tokens", default="1,16", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=6.0, help="a point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    if options.near == "cuda" and not torch.cuda.is_available():
        parser.error("--near is cuda, but torch sees no GPU here")
    try:
        counts = parse_tokens(options.tokens)
    except TilecastError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    use_table(None)
    layers = (
        ExpertLayer(hidden=64, intermediate=96, experts=8, top_k=2, dtype="fp32"),
        ExpertLayer(hidden=2048, intermediate=768, experts=32, top_k=8),
        mixtral_tp8(),
    )
    try:
        points = [
            measure(layer, tokens, torch.device(options.near), options.seconds) for layer in layers for tokens in counts
        ]
    except TilecastError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(f"  written to {write_result('placement', {'points': list(points)}, options.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
