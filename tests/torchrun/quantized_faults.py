"""Every way in which loading a quantised checkpoint on ranks may fail. Run on ranks without a launcher.

Faults come one after the other, each in a group of its own; the last one in the command itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.distributed.rendezvous import rendezvous

import tilecast
from tilecast.cli.app import app
from tilecast.engine import agreement
from tilecast.engine.group import Group, KeyValueStore
from tilecast.engine.load import load_model
from tilecast.errors import TilecastError


def ours(folder: Path, mode: str) -> None:
    load_model(folder, dtype="float32", **{mode: int(os.environ["WORLD_SIZE"])})  # type: ignore[arg-type]


def theirs(folder: Path, mode: str) -> None:
    """As somebody else's program loads it."""
    from transformers.distributed import DistributedConfig

    tilecast.register_transformers()
    ranks = int(os.environ["WORLD_SIZE"])
    config = DistributedConfig(tp_size=ranks, tp_plan="auto", **({"ep_size": ranks} if mode == "ep" else {}))
    transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="tilecast", distributed_config=config
    )


CASES: dict[str, tuple[str, str, Callable[[Path, str], None]]] = {
    "no scales": ("no-scales", "ep", ours),
    "words of another order": ("other-words", "tp", ours),
    "version of another order": ("gemv", "tp", ours),
    "cut groups": ("groups", "tp", ours),
    "cut words": ("words", "tp", ours),
    "not finite": ("not-finite", "ep", ours),
    "missing on one rank": ("one-rank", "tp", ours),
    "missing on one rank, theirs": ("one-rank", "tp", theirs),
    "not finite, theirs": ("not-finite", "ep", theirs),
}
"""Each fault's folder, how it is loaded and by whom. Of `one-rank` only rank 0 has the files."""


def fail(folder: Path, name: str, rank: int, ranks: int, store: KeyValueStore) -> list[object]:
    group = Group(store, rank=rank, world_size=ranks, name=name, beat_s=0.5, dead_after_s=5.0)
    # What every rank of the job is in, which fails only once.
    agreement._group = group
    place, mode, load = CASES[name]
    place = f"{place}-{rank}" if place == "one-rank" else place
    began = time.monotonic()
    try:
        load(folder / place, mode)
    except TilecastError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "it loaded", time.monotonic() - began]


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    found, rank, ranks = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
    store = cast(KeyValueStore, found)
    report: dict[str, Any] = {name: fail(folder, name, rank, ranks, store) for name in CASES}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    agreement._group = None
    began = time.monotonic()
    sys.argv = ["tilecast", "generate", str(folder / "not-finite"), "--ep", str(ranks), "--ids", "5,6,7"]
    try:
        app(prog_name="tilecast")
    finally:
        sys.stderr.write(f"{time.monotonic() - began}\n")


if __name__ == "__main__":
    main()
