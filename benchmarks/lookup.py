"""µs of one lookup on the serving path, in a table of many layers and buckets."""

from __future__ import annotations

import dataclasses
import statistics
import timeit
from collections.abc import Callable

from shapes import mixtral_tp8

from tilecast.canonical import Json
from tilecast.engine import runtime
from tilecast.environment import cpu_environment
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.kernels import registry
from tilecast.kernels.spec import numerics_class
from tilecast.problem import ExpertGemm, ExpertLayer, buckets

LAYERS = 32
EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CALLS = 20_000
REPEATS = 15


def synthetic_table() -> tuple[TuningTable, list[ExpertLayer]]:
    """Return a table in which every decision keeps the default, and its layers."""
    environment = cpu_environment()
    layers = [dataclasses.replace(mixtral_tp8(), intermediate=1792 + 64 * number) for number in range(LAYERS)]
    decisions = [
        Decision(
            environment=environment.digest, layer=layer, bucket=bucket, policy="reproducible",
            up=_kept_default(layer.up), down=_kept_default(layer.down),
        )
        for layer in layers
        for bucket in buckets(EDGES)
    ]  # fmt: skip
    return TuningTable((environment,), tuple(decisions)), layers


def _kept_default(gemm: ExpertGemm) -> Choice:
    environment = cpu_environment()
    kernel = registry.default_kernel(gemm, environment)
    config = kernel.default(gemm, 1, environment)
    numerics = numerics_class(kernel, gemm, config, environment)
    return Choice(config=config, p50_us=1.0, default=config, default_us=1.0, numerics=numerics)


def measure() -> dict[str, Json]:
    """Return µs per lookup: a hit, a hit through the table in use, and a repeated miss."""
    table, layers = synthetic_table()
    index = runtime.use_table(table, policy="reproducible", miss="default", warn_miss=False)
    layer, unknown = layers[LAYERS // 2], dataclasses.replace(layers[0], top_k=1)
    found = {
        "hit": lambda: index.lookup(layer, 48),
        "hit_through_table_in_use": lambda: runtime.lookup(layer, 48),
        "repeated_miss": lambda: index.lookup(unknown, 48),
    }
    times: dict[str, Json] = {name: _microseconds(call) for name, call in found.items()}
    runtime.forget_table()
    return {"decisions": len(table), "layers": LAYERS, "calls": CALLS, "repeats": REPEATS, "us": times}


def _microseconds(call: Callable[[], object]) -> dict[str, Json]:
    samples = [total / CALLS * 1e6 for total in timeit.repeat(call, number=CALLS, repeat=REPEATS)]
    return {"p50": statistics.median(samples), "least": min(samples)}
