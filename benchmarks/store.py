"""Seconds and memory of export, merge and explain over a store of many measurements.

python benchmarks/store.py [--measurements N] [--results FOLDER]
python benchmarks/store.py --folder FOLDER --steps fill             stores are made and kept in FOLDER, and then
python benchmarks/store.py --folder FOLDER --steps export,merge     steps are timed one by one, the result is
python benchmarks/store.py --folder FOLDER --steps explain          written once all of them were
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
from tilecast.evidence import Choice, Decision, Measurement, measurement_key
from tilecast.kernels import registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, buckets

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS = 200
CONFIGS = 250
SAMPLES = 5
STEPS = ("fill", "export", "export_half", "merge", "explain")


@cache
def layers() -> tuple[ExpertLayer, ...]:
    return tuple(ExpertLayer(hidden=1024, intermediate=64 * (n + 1), experts=8, top_k=2) for n in range(LAYERS))


@cache
def configs() -> tuple[TileConfig, ...]:
    """Return different configs of the default kernel, which are only stored here, never run."""
    gemm, environment = layers()[0].up, cpu_environment()
    base = registry.default_kernel(gemm, environment).default(gemm, 1, environment)
    return (base, *(base.with_params(block_n=8 * n) for n in range(1, CONFIGS)))


def races() -> Iterator[tuple[ExpertGemm, int, int]]:
    """Yield GEMMs, token counts and rounds without end."""
    for number in itertools.count():
        for layer in layers():
            for gemm in layer.gemms:
                for tokens in EDGES:
                    yield gemm, tokens, number


def measurement(gemm: ExpertGemm, tokens: int, number: int, place: int, run: int) -> Measurement:
    """Return what `rows` makes rows of."""
    return Measurement(
        environment=cpu_environment().digest, gemm=gemm, tokens=tokens, config=configs()[place], run=run, round=number,
        samples_us=samples_us(tokens, number, place), measured_at=1.7e9 + number,
    )  # fmt: skip


def samples_us(tokens: int, number: int, place: int) -> tuple[float, ...]:
    us = 100.0 + place + tokens + number / 7
    return tuple(us + sample / 3 for sample in range(SAMPLES))


def rows(count: int, run: int) -> Iterator[tuple[object, ...]]:
    """Yield the rows of `count` measurements, of as many rounds of the same races as that takes.

    They are written out here, since making a million measurements takes minutes; `fill` checks the first of them.
    """
    environment, digests = cpu_environment().digest, [config.digest for config in configs()]
    made = 0
    for gemm, tokens, number in races():
        layer, name = gemm.layer.digest, gemm.name
        for place, config in enumerate(digests):
            if made == count:
                return
            made += 1
            key = measurement_key(
                environment=environment, layer=layer, gemm=name, tokens=tokens, routing="uniform", config=config,
                rank=0, run=run, round=number,
            )  # fmt: skip
            yield (
                key, environment, layer, name, tokens, config, "uniform", 0, 1, run, number, "ok",
                f"[{','.join(map(repr, samples_us(tokens, number, place)))}]", "", None, "", 1.7e9 + number,
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
    first = [measurement(*next(races()), place, run) for place in range(min(count, CONFIGS))]
    with open_store(path) as store:
        store.add_environment(cpu_environment())
        store.put_decisions(decisions())
        # One of each config first, so that all are there; layers come with the decisions.
        store.add_measurements(first)
    if [tuple(measurement_row(m).values()) for m in first] != list(rows(len(first), run)):
        raise SystemExit("the rows written here are not those that a store would write")
    marks = ", ".join("?" for _ in COLUMNS)
    sql = f"INSERT INTO measurement ({', '.join(COLUMNS)}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"
    with closing(sqlite3.connect(path)) as connection:
        for pragma in ("synchronous=OFF", "cache_size=-262144"):
            connection.execute(f"PRAGMA {pragma}")
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'measurement' AND sql IS NOT NULL"
        ).fetchall()
        with connection:
            for name, _ in indexes:
                connection.execute(f"DROP INDEX {name}")
            connection.executemany(sql, rows(count, run))
            for _, made in indexes:
                connection.execute(made)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


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


def _explain_warm(small: Path, path: Path) -> dict[str, Json]:
    """Return the seconds, wall and CPU, of explaining a decision once all is imported: the median of five."""
    # What the process imports is not what is asked for here.
    explain(small)
    taken = []
    for _ in range(5):
        start, cpu_start = time.perf_counter(), time.process_time()
        explain(path)
        taken.append((time.perf_counter() - start, time.process_time() - cpu_start))
    seconds, cpu_seconds = (round(statistics.median(each), 3) for each in zip(*taken, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def steps_of(folder: Path, count: int) -> dict[str, Callable[[], dict[str, Json]]]:
    """Return what each step does, in their order; the merge is with an export of half as many others."""
    store, other, small, export, half, merged = (
        folder / f"{name}.db" for name in ("store", "other", "small", "export", "half", "merged")
    )

    def filled() -> dict[str, Json]:
        stores = ((store, count, 0), (other, count // 2, 1), (small, CONFIGS, 0))
        return {path.stem: apart(fill, path, size, run) for path, size, run in stores}

    return {
        "fill": filled,
        "export": lambda: apart(copy_file, store, export),
        "export_half": lambda: apart(copy_file, other, half),
        "merge": lambda: apart(merge_files, [export, half], merged),
        "explain": lambda: {**_explain_warm(small, store), "command": _explain_command(store)},
    }


def _explain_command(path: Path) -> dict[str, Json]:
    """Return the seconds of the whole command in a new process, the best of five."""
    command = [sys.executable, "-m", "tilecast", "cache", "explain", str(path), "3", "64", "--json"]
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        taken.append(round(time.perf_counter() - start, 3))
    return {"seconds": min(taken)}


def measure(folder: Path, count: int, wanted: Sequence[str]) -> dict[str, Json] | None:
    """Do some steps and return all figures, those of earlier calls included; None while a step is missing."""
    known = folder / "steps.json"
    found: dict[str, Json] = json.loads(known.read_text()) if known.exists() else {}
    every = steps_of(folder, count)
    for name in wanted:
        found[name] = every[name]()
        print(f"  {name}: {found[name]}", flush=True)
        known.write_text(json.dumps(found))
    if not every.keys() <= found.keys():
        return None
    sizes: dict[str, Json] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.db"))}
    steps: dict[str, Json] = {name: found[name] for name in every}
    return {"measurements": count, "merged_with": count // 2, "layers": LAYERS, "steps": steps, "bytes": sizes}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time export, merge and explain over many measurements.")
    parser.add_argument("--measurements", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, help="folder for the result; none: by device")
    parser.add_argument("--folder", type=Path, help="where the stores are made and kept; none: a temporary folder")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of " + ", ".join(STEPS))
    options = parser.parse_args()
    wanted = options.steps.split(",")
    if not set(wanted) <= set(STEPS):
        parser.error(f"--steps is {options.steps!r}, expected some of {', '.join(STEPS)}")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, options.measurements, wanted)
        if result is not None:
            print(f"wrote {write_result('store', result, options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
