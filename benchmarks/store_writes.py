"""Many processes on one store: cold starts at the same instant, and measurements written by all at once.

python benchmarks/store_writes.py                              16 processes: 50 cold starts, 10,000 measurements each
python benchmarks/store_writes.py --url postgresql+psycopg://… the same on a server, in the store that is there

Prints JSON: what failed, how many measurements are in the store, and how many a second came in; --save keeps it among
the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tilecast.cache_store.store import open_store
from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.evidence import Measurement
from tilecast.problem import ExpertLayer, TileConfig

ENVIRONMENT = Environment(
    device_kind="cpu", device="Benchmark CPU", arch="x86_64", features="avx2,fma", units=8, llc_bytes=32 << 20,
    kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0",
)  # fmt: skip
LAYERS = tuple(ExpertLayer(hidden=64 * number, intermediate=96, experts=4, top_k=2) for number in range(1, 9))
CONFIGS = tuple(TileConfig("llvm.moe_gemm", {"mr": mr, "nr": nr}) for mr in range(1, 13) for nr in (16, 32, 48))


def measurement(process: int, number: int) -> Measurement:
    """One of the measurements of a process; no two are of the same key."""
    layer = LAYERS[number % len(LAYERS)]
    return Measurement(
        environment=ENVIRONMENT.digest, gemm=layer.gemms[number % 2], tokens=1 << number % 13,
        config=CONFIGS[number % len(CONFIGS)], samples_us=tuple(100.0 + number % 7 + 0.1 * n for n in range(10)),
        run=process, round=number,
    )  # fmt: skip


def together(processes: int, work: Callable[[int], None]) -> tuple[list[str], float]:
    """Run `work` in forked processes from the same instant on; return what failed and the seconds until all ended."""
    gate_read, gate_write = os.pipe()
    told_read, told_write = os.pipe()
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            os.close(gate_write)
            os.close(told_read)
            os.read(gate_read, 1)
            _work(work, number, told_write)
        children.append(child)
    for end in (gate_read, told_write):
        os.close(end)
    begin = time.perf_counter()
    os.close(gate_write)
    with os.fdopen(told_read) as told:
        failures = told.read().splitlines()
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    assert bool(failed) == bool(failures), f"{failed} processes failed, told are {failures}"
    return failures, time.perf_counter() - begin


def _work(work: Callable[[int], None], number: int, told: int) -> None:
    code = 1
    try:
        work(number)
        code = 0
    except BaseException:
        # Shorter than what a pipe takes in one piece, so lines of two processes never mix.
        os.write(told, (traceback.format_exc().strip().splitlines()[-1][:2000] + "\n").encode())
    finally:
        os._exit(code)


def cold_starts(folder: Path, processes: int, starts: int) -> list[str]:
    """Let all processes open a fresh store at the same instant and write, again and again; return what failed."""
    failures = []
    with open_store(folder / "first.db"):
        pass  # What is imported only now is imported once, not by each process.
    for start in range(starts):
        path = folder / f"start-{start}" / "store.db"

        def work(number: int, path: Path = path) -> None:
            with open_store(path) as store:
                store.add_environment(ENVIRONMENT)
                store.add_measurements([measurement(number, 0)])

        failed, _ = together(processes, work)
        failures += failed
        with open_store(path) as store:
            found = len(store.measurements())
        if found != processes:
            failures.append(f"start {start}: {found} measurements, expected {processes}")
    return failures


def writes(where: str, processes: int, each: int, batch: int) -> dict[str, Json]:
    """Let all processes write into one store; return what failed, what it holds and the rate."""

    def work(number: int) -> None:
        with open_store(where) as store:
            for first in range(0, each, batch):
                numbers = range(first, min(first + batch, each))
                new = store.add_measurements([measurement(number, n) for n in numbers])
                assert new == len(numbers), f"{new} of {len(numbers)} were new"

    with open_store(where) as store:
        store.add_environment(ENVIRONMENT)
    failures, seconds = together(processes, work)
    found: set[tuple[int, int]] = set()
    rows = 0
    with open_store(where, read_only=True) as store:
        for process in range(processes):
            kept = store.measurements(run=process)
            rows += len(kept)
            found |= {(m.run, m.round) for m in kept}
    expected = {(process, number) for process in range(processes) for number in range(each)}
    return {
        "failures": failures,
        "processes": processes,
        "measurements_each": each,
        "batch": batch,
        "lost": len(expected - found),
        "doubled": rows - len(found),
        "seconds": round(seconds, 3),
        "measurements_per_s": round(rows / seconds),
    }


def measure(
    processes: int = 16, starts: int = 50, each: int = 10_000, batch: int = 100, url: str = ""
) -> dict[str, Json]:
    """Return the figures of cold starts (SQLite only) and of writing."""
    with tempfile.TemporaryDirectory(prefix="tilecast-writes-") as folder:
        failures = [] if url else cold_starts(Path(folder), processes, starts)
        return {
            "cold_starts": {"processes": processes, "starts": 0 if url else starts, "failures": failures},
            "writes": writes(url or str(Path(folder) / "store.db"), processes, each, batch),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description="Many processes on one store.")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--each", type=int, default=10_000, help="measurements of each process")
    parser.add_argument("--batch", type=int, default=100, help="measurements of one transaction")
    parser.add_argument("--url", default="", help="a server's store instead of a new SQLite file")
    parser.add_argument("--save", action="store_true", help="write the result to the folder of this device's results")
    options = vars(parser.parse_args())
    save = options.pop("save")
    result = measure(**options)
    print(json.dumps(result, indent=1))
    if save:
        # Imports torch, which the processes forked above do without.
        from report import write_result

        write_result("store_writes", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
