"""`tilecast demo`: the whole way once: tune, export, serve in a new process, and on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tilecast.cli._exit import complain, resumable
from tilecast.cli._layers import sharded
from tilecast.cli._options import StoreOption, check_writable, parse_budget
from tilecast.cli._output import Output, duration, percent, plural, ratio
from tilecast.cli._run import tune_layers, use_threads
from tilecast.cli._stores import store_location
from tilecast.cli._tables import decision_tables
from tilecast.settings import Settings, child_environment

MODEL, TP = "mixtral-8x7b", 8
TOKENS = (1, 4, 16, 64, 256)
COUNTS = ",".join(map(str, TOKENS))
POLICY = "reproducible"
BENCH_BUDGET_S = 45
RANKS = 2
PEER = "torch loop"
SIGNALLED = 128
"""Shells report a process that signal N ended as exit code 128 + N."""


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
    counts = ", ".join(map(str, TOKENS))
    check_writable("--out", out)
    use_threads(None)
    start = time.monotonic()
    output.heading(f"1. Tune {split.layers[0].label} for {counts} tokens ({POLICY})")
    split.explain(output)
    table = tune_layers(
        split.layers, TOKENS, policy=POLICY, where=store_location(store, settings), group=Group.alone(),
        output=output, budget_s=budget_s, fresh=fresh,
    )  # fmt: skip
    output.show(*decision_tables(table.decisions))
    export_table(table, out)
    output.show(f"{out}: {plural(len(table), 'decision')}, table {table.digest[:12]}")
    output.heading(f"2. Run it in a new process: TM_GEMM_IMPORT={out} tilecast bench {model} --tp {tp} …")
    found = _bench(model, tp, out)
    output.heading(f"3. Run it on {RANKS} ranks: TM_GEMM_IMPORT={out} torchrun --nproc-per-node {RANKS} …")
    _check(model, tp, out)
    output.heading("What this showed")
    output.show(
        f"  table: {table.digest[:12]}, {plural(len(table), 'decision')} in {out}, the same in every process",
        f"  speed: {_speed(found)}",
        f"  bits:  equal on {RANKS} ranks, and for a token alone and in a batch, at {counts} tokens",
        f"done in {duration(time.monotonic() - start)}",
    )


def _bench(model: str, tp: int, table: Path) -> dict[str, Any]:
    """Time the layer in a new process on the exported table and return the JSON document."""
    with tempfile.TemporaryDirectory(prefix="tilecast-") as folder:
        saved = Path(folder) / "bench.json"
        bench = ["bench", model, "--tp", str(tp), "--tokens", COUNTS, "--peers", PEER, "--no-tune"]
        _run([*bench, "--budget", f"{BENCH_BUDGET_S}s", "--save", str(saved)], [], table)
        document: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8"))
        return document


def _check(model: str, tp: int, table: Path) -> None:
    """Compare tables and bits of several ranks; ends the command unless all are equal."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m"]
    _run(["check", model, "--tp", str(tp), "--tokens", COUNTS], launch, table, OMP_NUM_THREADS="1")


def _speed(document: dict[str, Any]) -> str:
    """Sum up a bench document: against the plain loop, and against what this machine can do."""
    found = {summary["against"]: summary for summary in document["summaries"]}
    parts = []
    if (loop := found.get(PEER)) is not None:
        parts.append(
            f"{ratio(loop['geometric_mean'])} a plain PyTorch loop over experts (worst {ratio(loop['worst'])})"
        )
    if (limit := found.get("limit")) is not None:
        reached, worst = percent(limit["geometric_mean"]), percent(limit["worst"])
        parts.append(f"{reached} of this machine's limit (worst {worst})")
    return ", ".join(parts) or "nothing could be compared"


def _run(arguments: list[str], launch: list[str], table: Path, **variables: str) -> None:
    """Run one step in a new process on the exported table; its output goes where ours goes, its failure too."""
    sys.stdout.flush()
    environment = child_environment(
        {"TM_GEMM_IMPORT": str(table), "TM_GEMM_POLICY": POLICY, "TM_GEMM_EXPORT": "", "TM_GEMM_TUNE": "", **variables}
    )
    command = [sys.executable, "-m", *launch, "tilecast", *arguments]
    with resumable("the measurements and the exported table"):
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        code = code if code > 0 else SIGNALLED - code
        complain(f"demo ended with its step `tilecast {' '.join(arguments[:2])}`, exit code {code}")
        raise typer.Exit(code)
