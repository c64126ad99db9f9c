"""Starts scripts on several ranks and collects what they wrote, never waiting longer than minutes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.cache_folders import cache_folder
from tests.programs import ROOT, start

TIMEOUT_S = 120.0


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
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TILECAST_CACHE_DIR": str(cache_folder(folder / "cache"))}
    return {**kept, **own, **extra}


def processes(
    script: str, folder: Path, ranks: int, *words: str, timeout: float = TIMEOUT_S, sandbox: bool = False
) -> list[Ended]:
    """Run a script of this folder on ranks as torchrun would, except that none is killed when another ends.

    With `sandbox`, what ranks measure they measure in processes of their own, which take seconds to start.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "TM_GEMM_SANDBOX": str(int(sandbox)),
    }  # fmt: skip
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [
        start(f"tests.torchrun.{script}", folder, *words, environment=environment(folder, **meeting, **place))
        for place in places
    ]
    try:
        done = [program.ended(timeout) for program in started]
    finally:
        for program in started:
            program.send_signal(signal.SIGKILL)
    return [Ended(one.returncode, one.stderr) for one in done]


def reports(
    script: str,
    folder: Path,
    ranks: int,
    *words: str,
    prefix: str = "",
    timeout: float = TIMEOUT_S,
    sandbox: bool = False,
) -> list[dict[str, Any]]:
    """Run a script on ranks that all succeed; return what each wrote to its `folder/PREFIXrank<r>.json`."""
    for ended in processes(script, folder, ranks, *words, timeout=timeout, sandbox=sandbox):
        assert ended.code == 0, ended.errors[-4000:]
    return [json.loads((folder / f"{prefix}rank{rank}.json").read_text()) for rank in range(ranks)]
