"""Starts workers on several ranks and collects what they wrote, never waiting longer than a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    errors: str


def environment(folder: Path, **extra: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TM_GEMM_", "TILECAST_")) or name == "TILECAST_LOCK_DIR"
    }
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TILECAST_CACHE_DIR": str(folder / "cache")}
    return {**kept, **own, **extra}


def torchrun(script: str, folder: Path, ranks: int, **extra: str) -> list[dict[str, Any]]:
    """Run a script of this folder under torchrun; return what each rank wrote to `folder/rank<r>.json`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", f"tests.torchrun.{script}", str(folder)],
        cwd=ROOT, env=environment(folder, **extra), timeout=TIMEOUT_S, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def processes(script: str, folder: Path, ranks: int, **extra: str) -> list[Ended]:
    """Run a script on ranks of our own, without a launcher that kills the others when one ends."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.torchrun.{script}", str(folder)],
            cwd=ROOT, env=environment(folder, RANK=str(rank), **meeting, **extra),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, text) for process, text in zip(started, errors, strict=True)]
