"""Sparse experts against the dense kernel: one relu layer at several shares of dead neurons, and the memory roofline.

python benchmarks/sparse.py                                              as published
python benchmarks/sparse.py --sparsity 0.9 --tokens 1 --seconds 10

Each round times both kernels' default configs on the same operands, cold, one after the other: first calls of a whole
layer, routing, sorting and Python around them included, then single launches of its two GEMMs. Ratios are taken within
a round, and of the least times, which other processes disturbed least. The roofline is the time to read what has to be
read: gate rows, or their codes and those that the screen leaves open; and of up and down the live neurons' rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from report import write_result
from shapes import mixtral_tp8

from tilecast.autotune.draws import typical_active_experts
from tilecast.autotune.routing_profiles import RoutingProfile, parse_profile
from tilecast.autotune.workload import Workload, launch, poisoned_output
from tilecast.canonical import Json
from tilecast.engine.experts import PreparedExperts
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import TilecastError
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.kernels.cpu.peak import measure_peaks
from tilecast.kernels.cpu.screen_work import CODE_BYTES, open_share
from tilecast.kernels.cpu.sparse import SCREEN
from tilecast.problem import DTYPES, Bucket, ExpertGemm, ExpertLayer, TileConfig

KERNELS = ("llvm.moe_gemm", "llvm.sparse_experts")
MAX_COPIES = 8
"""Copies of the weights at most: 10% of as many of a layer as published are more than a last-level cache holds."""


def needed_bytes(gemm: ExpertGemm, tokens: int, dead: float, layout: str) -> dict[str, float]:
    """Return the weight bytes that each kernel has to read for this many tokens under uniform routing.

    layout: of the sparse kernel.
    """
    layer = gemm.layer
    experts = typical_active_experts(layer, tokens)
    whole = gemm.weight_bytes(experts)
    # A neuron is read if it is alive in any row of its expert.
    rows = tokens * layer.top_k * layer.experts / layer.global_experts / experts
    alive = 1 - dead**rows
    rest = whole / 2 if gemm.name == "up" else 0.0
    gates = rest
    if layout == SCREEN:
        code = CODE_BYTES / DTYPES[gemm.layer.dtype]
        gates *= code + 1 - (1 - open_share(dead)) ** rows
    return {KERNELS[0]: float(whole), KERNELS[1]: gates + alive * (whole - rest)}


def alternate(
    workload: Workload, gemm: ExpertGemm, tokens: int, configs: dict[str, TileConfig], seconds: float
) -> dict[str, list[float]]:
    """Return µs of single launches of each config, in turns on the same operands, weights rotating past the cache."""
    copies, out = min(MAX_COPIES, workload.copies(gemm)), poisoned_output(gemm, tokens)
    launches = []
    for copy in range(copies):
        inputs = workload.inputs(gemm, tokens, copy)
        for name, config in configs.items():
            kernel = registry[name]
            weights = workload.weights(gemm, kernel, kernel.layout(gemm, config), copy)
            launches.append((copy, name, partial(launch, kernel, config, weights, inputs, out)))
            launches[-1][-1]()
    times: dict[str, list[float]] = {name: [] for name in configs}
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < 2 * copies:
        for copy, name, run in launches if turn // copies % 2 else reversed(launches):
            if copy == turn % copies:
                begin = time.perf_counter_ns()
                run()
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
        turn += 1
    return times


def layer_calls(
    layer: ExpertLayer, tokens: int, profile: RoutingProfile, seconds: float
) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Return configs and µs of calls of the prepared layer by each kernel, in turns, weights past the cache."""
    environment = cpu_environment()
    sides = [Workload(environment, routing=profile) for _ in layer.gemms]
    copies = min(MAX_COPIES, *(side.copies(gemm) for side, gemm in zip(sides, layer.gemms, strict=True)))
    made: dict[tuple[str, int], PreparedExperts] = {}
    labels = {}
    for name in KERNELS:
        configs = {gemm.name: default_of(name, gemm, tokens, environment) for gemm in layer.gemms}
        labels[name] = "; ".join(config.label for config in configs.values())
        choice = {gemm: Choice(config=c, p50_us=1.0, default=c, default_us=1.0) for gemm, c in configs.items()}
        decision = Decision(
            environment=environment.digest, layer=layer, bucket=Bucket(above=0, tokens=tokens), policy="reproducible",
            up=choice["up"], down=choice["down"],
        )  # fmt: skip
        runtime = Runtime(TuningTable((environment,), (decision,)), environment=environment, registry=registry)
        for copy in range(copies):
            up, down = (
                side.weights(gemm, registry[name], registry[name].layout(gemm, configs[gemm.name]), copy)
                for side, gemm in zip(sides, layer.gemms, strict=True)
            )
            made[name, copy] = PreparedExperts(layer=layer, runtime=runtime, up=up, down=down)
    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    for experts in made.values():
        inputs = sides[0].inputs(layer.up, tokens, 0)
        experts(inputs.rows, inputs.route.ids, inputs.topk_weights)
    end = time.perf_counter() + seconds
    turn = 0
    with torch.inference_mode():
        while time.perf_counter() < end or turn < 2 * copies:
            inputs = sides[0].inputs(layer.up, tokens, turn % (4 * copies))
            given = inputs.rows, inputs.route.ids, inputs.topk_weights
            for name in KERNELS if turn // copies % 2 else reversed(KERNELS):
                run = made[name, turn % copies]
                begin = time.perf_counter_ns()
                run(*given)
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
            turn += 1
    return labels, times


def default_of(name: str, gemm: ExpertGemm, tokens: int, environment: Environment) -> TileConfig:
    """Return a kernel's default config; the dense kernel's is of the class whose bits are compared: fused."""
    config = registry[name].default(gemm, tokens, environment)
    return config.with_params(dot="fma") if name == KERNELS[0] else config


def measure_layer(layer: ExpertLayer, tokens: int, sparsity: str, seconds: float) -> dict[str, Json]:
    """Time calls of the whole layer, print one line and return the figures."""
    labels, times = layer_calls(layer, tokens, parse_profile(f"uniform+sparsity:{sparsity}"), seconds)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    least = {name: min(seen) for name, seen in times.items()}
    print(
        f"  {layer.label} T={tokens} {float(sparsity):.0%} dead, calls of the layer: {middle:.2f}× the dense kernel "
        f"({low:.2f} to {high:.2f}; least times {least[KERNELS[0]] / least[KERNELS[1]]:.2f}×); {len(ratios)} rounds",
        flush=True,
    )
    return {
        "rounds": len(ratios), "speedup": middle, "quartiles": [low, high],
        "speedup_of_least": least[KERNELS[0]] / least[KERNELS[1]], "least_us": dict(least), "configs": dict(labels),
        "p50_us": {name: statistics.median(seen) for name, seen in times.items()},
    }  # fmt: skip


def measure(layer: ExpertLayer, tokens: int, sparsity: str, seconds: float) -> dict[str, Json]:
    """Time both kernels, print one line and return the figures; times are µs of up and down together."""
    environment = cpu_environment()
    workload = Workload(environment, routing=parse_profile(f"uniform+sparsity:{sparsity}"))
    parts: dict[str, dict[str, Json]] = {}
    samples: dict[str, list[float]] = {}
    least, bytes_read = dict.fromkeys(KERNELS, 0.0), dict.fromkeys(KERNELS, 0.0)
    for gemm in layer.gemms:
        configs = {name: default_of(name, gemm, tokens, environment) for name in KERNELS}
        times = alternate(workload, gemm, tokens, configs, seconds / 2)
        for name, seen in times.items():
            rounds = min(len(seen), len(samples.get(name, seen)))
            before = samples.get(name, [0.0] * rounds)
            samples[name] = [a + b for a, b in zip(before[:rounds], seen[:rounds], strict=True)]
            least[name] += min(seen)
        layout = str(configs[KERNELS[1]]["layout"])
        for name, needed in needed_bytes(gemm, tokens, float(sparsity), layout).items():
            bytes_read[name] += needed
        parts[gemm.name] = {
            name: {"config": configs[name].label, "p50_us": statistics.median(seen), "least_us": min(seen)}
            for name, seen in times.items()
        }  # fmt: skip
        workload.release()
    ratios = sorted(a / b for a, b in zip(*samples.values(), strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    # On a busy machine a kernel's best launch may find more bandwidth than the peak's few tries.
    rates = {name: bytes_read[name] / least[name] / 1e3 for name in KERNELS}
    bandwidth = max(measure_peaks().read_gb_s, *rates.values())
    shares = {name: rate / bandwidth for name, rate in rates.items()}
    print(
        f"  {layer.label} T={tokens} {float(sparsity):.0%} dead: {middle:.2f}× the dense kernel "
        f"({low:.2f} to {high:.2f}; least times {least[KERNELS[0]] / least[KERNELS[1]]:.2f}×, bytes "
        f"{bytes_read[KERNELS[0]] / bytes_read[KERNELS[1]]:.2f}×); share of the memory roofline "
        f"{shares[KERNELS[1]]:.0%}, dense {shares[KERNELS[0]]:.0%}; {len(ratios)} rounds",
        flush=True,
    )
    return {
        "layer": layer.to_json(), "label": layer.label, "tokens": tokens, "sparsity": float(sparsity),
        "rounds": len(ratios), "speedup": middle, "quartiles": [low, high],
        "speedup_of_least": least[KERNELS[0]] / least[KERNELS[1]], "least_us": dict(least),
        "bytes": dict(bytes_read), "read_gb_s": bandwidth, "roofline_share": dict(shares), "gemms": dict(parts),
    }  # fmt: skip


def main() -> int:
    """Run and write the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sparsity", default="0,0.5,0.9,0.97", help="shares of dead neurons, comma-separated")
    parser.add_argument("--tokens", default="1,4,16", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=20.0, help="a point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activation", default="relu", choices=("relu", "relu2", "drelu"))
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    # Before anything asks for the environment, which records the thread count.
    torch.set_num_threads(options.threads)
    layer = ExpertLayer(**{**mixtral_tp8().to_json(), "activation": options.activation})  # type: ignore[arg-type]
    try:
        points = [
            {
                **measure(layer, int(tokens), sparsity, options.seconds / 2),
                "calls": measure_layer(layer, int(tokens), sparsity, options.seconds / 2),
            }
            for tokens in options.tokens.split(",")
            for sparsity in options.sparsity.split(",")
        ]
    except TilecastError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    result: dict[str, Json] = {"threads": options.threads, "points": list(points)}
    name = "sparse" if options.threads != 1 else "sparse-one-thread"
    print(f"  written to {write_result(name, result, options.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
