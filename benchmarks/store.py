"""Seconds and memory of export, merge and explain over a store of many measurements.

python benchmarks/store.py [--measurements N] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from report import write_result

from tilecast.cache_store.measurement_rows import measurement_row
from tilecast.cache_store.merge import copy_file, merge_files
from tilecast.cache_store.store import open_store
from tilecast.cache_store.streams import COLUMNS
from tilecast.canonical import Json
from tilecast.environment import cpu_environment
from tilecast.evidence import Choice, Decision, Measurement
from tilecast.kernels import registry
from tilecast.problem import ExpertLayer, TileConfig, buckets

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS = 200
CONFIGS = 250
SAMPLES = 5


@cache
def layers() -> tuple[ExpertLayer, ...]:
    return tuple(ExpertLayer(hidden=1024, intermediate=64 * (n + 1), experts=8, top_k=2) for n in range(LAYERS))


@cache
def configs() -> tuple[TileConfig, ...]:
    """Return different configs of the default kernel, which are only stored here, never run."""
    gemm, environment = layers()[0].up, cpu_environment()
    base = registry.default_kernel(gemm, environment).default(gemm, 1, environment)
    return (base, *(base.with_params(block_n=8 * n) for n in range(1, CONFIGS)))


def measurements(count: int, run: int) -> Iterator[Measurement]:
    """Yield `count` measurements, of as many rounds of the same races as that takes."""
    environment = cpu_environment().digest
    races = [(gemm, tokens) for layer in layers() for gemm in layer.gemms for tokens in EDGES]
    made = 0
    for number in range(count):
        for gemm, tokens in races:
            for place, config in enumerate(configs()):
                if made == count:
                    return
                made += 1
                us = 100.0 + place + tokens + number / 7
                yield Measurement(
                    environment=environment, gemm=gemm, tokens=tokens, config=config, run=run, round=number,
                    samples_us=tuple(us + sample / 3 for sample in range(SAMPLES)), measured_at=1.7e9 + made,
                )  # fmt: skip


def decisions() -> list[Decision]:
    environment = cpu_environment().digest

    base = configs()[0]
    kept = Choice(config=base, p50_us=100.0, default=base, default_us=100.0, noise=0.01, numerics="a" * 64)
    return [
        Decision(environment=environment, layer=layer, bucket=bucket, policy="reproducible", up=kept, down=kept)
        for layer in layers()
        for bucket in buckets(EDGES)
    ]


def fill(path: Path, count: int, run: int) -> None:
    """Make a store. Rows go in directly: how fast tuners write is another benchmark."""
    with open_store(path) as store:
        store.add_environment(cpu_environment())
        store.put_decisions(decisions())
        # One of each config first, so that all are there; layers come with the decisions.
        store.add_measurements(list(measurements(CONFIGS, run)))
    marks = ", ".join("?" for _ in COLUMNS)
    sql = f"INSERT OR IGNORE INTO measurement ({', '.join(COLUMNS)}) VALUES ({marks})"
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = map(measurement_row, measurements(count, run))
        connection.executemany(sql, (tuple(row[name] for name in COLUMNS) for row in rows))


def explain(path: Path) -> None:
    """Explain a decision, as the command does."""
    from typer.testing import CliRunner

    from tilecast.cli.app import app

    result = CliRunner().invoke(app, ["cache", "explain", str(path), "3", "64", "--json"])
    if result.exit_code:
        raise SystemExit(result.stderr)


def apart(work: Callable[..., object], *arguments: object) -> dict[str, Json]:
    """Call `work` in a new process; return its seconds, its CPU seconds, and its largest memory in MiB."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_timed, args=(answers, work, arguments))
    process.start()
    process.join()
    if process.exitcode or answers.empty():
        raise SystemExit(f"{getattr(work, '__name__', work)} ended with exit code {process.exitcode}")
    seconds, cpu_seconds, peak_mib = answers.get()
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "peak_mib": round(peak_mib)}


def _timed(answers: Any, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    start, cpu_start = time.perf_counter(), time.process_time()
    work(*arguments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    answers.put((seconds, cpu_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _explain_warm(small: Path, path: Path) -> float:
    # What the process imports is not what is asked for here.
    explain(small)
    start = time.perf_counter()
    explain(path)
    return time.perf_counter() - start


def measure(count: int) -> dict[str, Json]:
    """Time each step over a store of `count` measurements; the merge is with an export of half as many others."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, other, small = root / "store.db", root / "other.db", root / "small.db"
        for path, size, run in ((store, count, 0), (other, count // 2, 1), (small, CONFIGS, 0)):
            print(f"  filled {path.name}: {apart(fill, path, size, run)}", flush=True)
        export, half, merged = (root / name for name in ("export.db", "half.db", "merged.db"))
        steps: dict[str, Json] = {
            "export": apart(copy_file, store, export),
            "export_half": apart(copy_file, other, half),
        }
        steps["merge"] = apart(merge_files, [export, half], merged)
        steps["explain"] = {"seconds": round(_explain_warm(small, store), 3)}
        print(f"  {steps}", flush=True)
        sizes: dict[str, Json] = {path.name: path.stat().st_size for path in sorted(root.glob("*.db"))}
        return {"measurements": count, "merged_with": count // 2, "layers": LAYERS, "steps": steps, "bytes": sizes}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time export, merge and explain over many measurements.")
    parser.add_argument("--measurements", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    options = parser.parse_args()
    print(f"wrote {write_result('store', measure(options.measurements), options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
