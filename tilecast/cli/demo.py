"""`tilecast demo`: the whole way once: tune, export, serve in a new process, and on two ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tilecast.cli._exit import resumable
from tilecast.cli._layers import sharded
from tilecast.cli._options import (
    StoreOption,
    check_writable,
    parse_budget,
)
from tilecast.cli._output import Output, duration, plural
from tilecast.cli._run import tune_layers, use_threads
from tilecast.cli._stores import store_location
from tilecast.cli._tables import decision_tables
from tilecast.errors import TilecastError
from tilecast.settings import Settings, child_environment

MODEL, TP = "mixtral-8x7b", 8
TOKENS = (1, 4, 16, 64, 256)
POLICY = "reproducible"
BENCH_BUDGET_S = 45
RANKS = 2


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to export the table.")] = Path("demo.db"),
    budget: Annotated[str, typer.Option("--budget", metavar="TIME", help="Time for tuning.")] = "4m",
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", metavar="SPEC", help="Another layer than mixtral-8x7b's on one of 8 ranks.", show_default=False
        ),
    ] = None,
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew instead of going on from the store.")] = False,
) -> None:
    """Tune one layer here, export it, run it in a new process and on two ranks.

    The layer is mixtral-8x7b's as one of 8 tensor-parallel ranks sees it: E=8, H=4096, I=1792, top-2, bf16.

    Example:

        tilecast demo --budget 2m
    """
    from tilecast.cache_store.bundle import export_table
    from tilecast.engine.group import Group

    output = Output()
    settings = Settings.from_environment()
    budget_s = parse_budget(budget)
    model, tp = (MODEL, TP) if layer is None else (layer, 1)
    split = sharded(model, tp=tp)
    check_writable("--out", out)
    use_threads(None)
    start = time.monotonic()
    where = store_location(store, settings)
    output.heading(f"1. Tune {split.layers[0].label} for {', '.join(map(str, TOKENS))} tokens ({POLICY})")
    split.explain(output)
    table = tune_layers(
        split.layers, TOKENS, policy=POLICY, where=where, group=Group.alone(), output=output, budget_s=budget_s,
        fresh=fresh,
    )  # fmt: skip
    output.show(*decision_tables(table.decisions))
    export_table(table, out)
    output.show(f"{out}: {plural(len(table), 'decision')}, table {table.digest[:12]}")
    counts = ",".join(map(str, TOKENS))
    output.heading(f"2. Run it in a new process: TM_GEMM_IMPORT={out} tilecast bench {model} --tp {tp} …")
    bench = ["bench", model, "--tp", str(tp), "--tokens", counts, "--peers", "torch loop", "--no-tune"]
    _run([sys.executable, "-m", "tilecast", *bench, "--budget", f"{BENCH_BUDGET_S}s"], out)
    output.heading(f"3. Run it on {RANKS} ranks: TM_GEMM_IMPORT={out} torchrun --nproc-per-node {RANKS} …")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "tilecast"]
    _run([sys.executable, *launch, "check", model, "--tp", str(tp), "--tokens", counts], out, OMP_NUM_THREADS="1")
    output.show(f"\ndone in {duration(time.monotonic() - start)}")


def _run(command: list[str], table: Path, **variables: str) -> None:
    """Run one step in a new process on the exported table; its output goes where ours goes."""
    sys.stdout.flush()
    environment = child_environment(
        {"TM_GEMM_IMPORT": str(table), "TM_GEMM_POLICY": POLICY, "TM_GEMM_EXPORT": "", "TM_GEMM_TUNE": "", **variables}
    )
    with resumable("the measurements and the exported table"):
        done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise TilecastError(f"the step `{' '.join(command[1:6])} …` ended with exit code {done.returncode}")
