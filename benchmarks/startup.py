"""Seconds until a fresh process has run ten distinct configs of an imported table, compiled code cached or not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

if TYPE_CHECKING:
    from tilecast.evidence import TuningTable

TOKENS = (1, 4, 16, 64, 256)
LAYER = ExpertLayer(hidden=512, intermediate=1024, experts=8, top_k=2, dtype="bf16")
"""Small, so that compiling or loading the code, not running it, is what takes the time."""


def distinct_configs(gemm: ExpertGemm, count: int) -> list[TileConfig]:
    """Return configs of one layout and numerics class that differ in what is compiled, the default among them."""
    from tilecast.environment import cpu_environment
    from tilecast.kernels import registry
    from tilecast.kernels.spec import numerics_class

    environment = cpu_environment()
    kernel = registry.default_kernel(gemm, environment)
    default = kernel.default(gemm, TOKENS[0], environment)

    def group(config: TileConfig) -> tuple[str, str]:
        return kernel.layout(gemm, config), numerics_class(kernel, gemm, config, environment)

    found = {_compiled(default): default}
    for tokens in TOKENS:
        for config in kernel.space(gemm, tokens, environment):
            usable = registry.invalid(gemm, config, environment) is None and group(config) == group(default)
            if usable and len(found) < count:
                found.setdefault(_compiled(config), config)
    return list(found.values())


def _compiled(config: TileConfig) -> tuple[tuple[str, int | str], ...]:
    """The parameters that select code rather than how it is called."""
    return tuple((name, value) for name, value in config.params if name not in ("threads", "block_n", "block_k"))


def write_table(path: Path) -> int:
    """Export a table that runs another config in each bucket; return the number of distinct configs."""
    from tilecast.cache_store.bundle import export_table
    from tilecast.environment import cpu_environment
    from tilecast.evidence import Choice, Decision, TuningTable
    from tilecast.problem import buckets

    environment = cpu_environment()
    spans = buckets(TOKENS)
    ups, downs = (distinct_configs(gemm, len(spans)) for gemm in LAYER.gemms)

    def choice(config: TileConfig, default: TileConfig) -> Choice:
        return Choice(config=config, p50_us=1.0, default=default, default_us=1.0)

    decisions = [
        Decision(
            environment=environment.digest, layer=LAYER, bucket=bucket, policy="reproducible",
            up=choice(ups[place % len(ups)], ups[0]), down=choice(downs[place % len(downs)], downs[0]),
        )
        for place, bucket in enumerate(spans)
    ]  # fmt: skip
    export_table(TuningTable((environment,), tuple(decisions)), path)
    return len({("up", c) for c in ups[: len(spans)]} | {("down", c) for c in downs[: len(spans)]})


def thousand() -> dict[str, float]:
    """Return the milliseconds in which a table of 1,000 decisions is read and checked: the first time, and at best.

    50 layers of 20 buckets, 250 distinct configs. Imports are done by then, as in a process that serves.
    """
    from tilecast.cache_store.bundle import export_table, import_table

    with tempfile.TemporaryDirectory(prefix="tilecast-startup-") as folder:
        path = Path(folder) / "table.db"
        export_table(table_of_a_thousand(), path)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            assert len(import_table(path)) == 1000
            times.append(1e3 * (time.perf_counter() - begin))
    return {"first_ms": times[0], "median_ms": sorted(times)[len(times) // 2], "best_ms": min(times)}


def table_of_a_thousand() -> TuningTable:
    """A table as large as a large deployment's."""
    from tilecast.environment import cpu_environment
    from tilecast.evidence import Choice, Decision, TuningTable
    from tilecast.problem import buckets

    chance, environment = random.Random(1), cpu_environment()
    configs = [
        TileConfig("llvm.moe_gemm", {"mr": n % 12 + 1, "nr": 16, "block_n": 16 * n, "block_k": 64, "threads": 8})
        for n in range(1, 251)
    ]

    def choice() -> Choice:
        config, default, runner_up = chance.sample(configs, k=3)
        times = {name: chance.uniform(5, 5000) for name in ("p50_us", "default_us", "runner_up_us")}
        return Choice(
            config=config, default=default, runner_up=runner_up, noise=chance.random(), numerics="a" * 64, **times
        )

    layers = [ExpertLayer(hidden=1024 + 16 * n, intermediate=512, experts=8, top_k=2) for n in range(50)]
    decisions = [
        Decision(
            environment=environment.digest, layer=layer, bucket=bucket, policy="reproducible",
            up=choice(), down=choice(),
        )
        for layer in layers for bucket in buckets([*(1 << n for n in range(14)), *(3 << n for n in range(1, 7))])
    ]  # fmt: skip
    return TuningTable((environment,), tuple(decisions))


def measure() -> dict[str, object]:
    """Return seconds by phase of a first start (nothing compiled) and of the best of three later ones."""
    with tempfile.TemporaryDirectory(prefix="tilecast-startup-") as folder:
        table = Path(folder) / "table.db"
        configs = write_table(table)
        starts = [_start(table, Path(folder) / "cache") for _ in range(4)]
    return {
        "distinct_configs": configs,
        "layer": LAYER.to_json(),
        "first_start_s": starts[0],
        "table_of_1000_decisions": thousand(),
        "later_start_s": min(starts[1:], key=lambda start: start["process"]),
    }


def _start(table: Path, cache: Path) -> dict[str, float]:
    environ = {**os.environ, "TM_GEMM_IMPORT": str(table), "TILECAST_CACHE_DIR": str(cache), "TM_GEMM_MISS": "error"}
    for name in ("TM_GEMM_POLICY", "TM_GEMM_TUNE", "TM_GEMM_EXPORT"):
        environ.pop(name, None)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--child"], env=environ, check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    seconds: dict[str, float] = json.loads(done.stdout)
    return {"process": time.perf_counter() - begin, **seconds}


def child() -> None:
    """Import, read the table, prepare the layer and run every bucket once; print the seconds of each phase."""
    marks = [time.perf_counter()]
    import torch

    marks.append(time.perf_counter())
    from tilecast.engine import runtime
    from tilecast.engine.experts import prepare_experts
    from tilecast.kernels.dtypes import TORCH_DTYPES

    marks.append(time.perf_counter())
    runtime.current()
    marks.append(time.perf_counter())
    dtype = TORCH_DTYPES[LAYER.dtype]
    shapes = [(LAYER.experts, gemm.n, gemm.k) for gemm in LAYER.gemms]
    experts = prepare_experts(*(torch.full(shape, 0.01, dtype=dtype) for shape in shapes), top_k=LAYER.top_k)
    for tokens in TOKENS:
        ids = torch.arange(tokens * LAYER.top_k).view(tokens, -1) % LAYER.experts
        experts(torch.ones(tokens, LAYER.hidden, dtype=dtype), ids, torch.full(ids.shape, 0.5))
    marks.append(time.perf_counter())
    names = ("import_torch", "import_tilecast", "read_table", "prepare_and_run")
    print(json.dumps({name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}))


if __name__ == "__main__":
    if "--child" in sys.argv[1:]:
        child()
    elif "--thousand" in sys.argv[1:]:
        print(json.dumps(thousand()))
    else:
        print(json.dumps(measure(), indent=1))
