"""Every way in which loading and generating on ranks may fail. Run on ranks without a launcher.

Faults before the first collective come one after the other, each in a group of its own. At the end the command
itself runs, and the last rank kills itself or fails in it, as the second argument says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import transformers
from torch.distributed.rendezvous import rendezvous

from tilecast.cli.app import app
from tilecast.engine import generate
from tilecast.engine.group import Group
from tilecast.engine.group_store import KeyValueStore
from tilecast.engine.load import load_model
from tilecast.errors import TilecastError

FAULTS: dict[str, dict[str, Any]] = {
    "missing": {"folder": "incomplete"},
    "another_checkpoint": {"folder": "other"},
    "another_dtype": {"dtype": "bfloat16"},
    "another_table": {"table": "other.db"},
    "too_many_ranks": {"tp": 3},
    "damaged_tokenizer": {"folder": "damaged"},
}
"""What the last rank asks for instead of the others' folder `model`, dtype float32, table `one.db` and so on."""


def fail(folder: Path, name: str, rank: int, ranks: int, store: KeyValueStore) -> list[object]:
    group = Group(store, rank=rank, world_size=ranks, name=name, beat_s=0.5, dead_after_s=5.0)
    given: dict[str, Any] = {"folder": "model", "dtype": "float32", "tp": ranks, "table": "one.db"}
    if rank == ranks - 1:
        given |= FAULTS[name]
    began = time.monotonic()
    try:
        load_model(
            folder / given["folder"],
            dtype=given["dtype"],
            tp=given["tp"],
            table=str(folder / given["table"]),
            group=group,
        )
    except TilecastError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "it loaded", time.monotonic() - began]


def stumble(ending: str) -> None:
    """Have this rank end in loading, or in its third step of generating."""

    def die() -> None:
        if ending.startswith("error"):
            raise OSError("the network file system went away")
        os.kill(os.getpid(), signal.SIGKILL)

    if ending.endswith("load"):
        load = transformers.AutoModelForCausalLM.from_pretrained

        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            load(*args, **kwargs)
            die()

        transformers.AutoModelForCausalLM.from_pretrained = from_pretrained
        return
    choose = generate._Steps._choose

    def chosen(self: generate._Steps, scores: Any) -> list[int]:
        if self.step == 2:
            die()
        return choose(self, scores)

    generate._Steps._choose = chosen  # type: ignore[method-assign]


def from_python(folder: Path, ranks: int) -> None:
    """Generate as a program does that says nothing of stuck ranks, and that goes on after an error."""
    loaded = load_model(folder / "model", tp=ranks)
    try:
        generate.generate(loaded, [[5, 6, 7]], max_new_tokens=8)
    except TilecastError as error:
        sys.stderr.write(f"raised: {error}\n{time.monotonic()}\n")
        sys.stderr.flush()
        # Its connections stay open, so that nothing but the watch ends the others.
        time.sleep(8)
        os._exit(0)


def main() -> None:
    folder, ending = Path(sys.argv[1]), sys.argv[2]
    warnings.filterwarnings("ignore")
    found, rank, ranks = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
    store = cast(KeyValueStore, found)
    if ending == "kill in generate":
        report = {name: fail(folder, name, rank, ranks, store) for name in FAULTS}
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
    if rank == ranks - 1:
        stumble(ending)
    if ending == "error in python":
        return from_python(folder, ranks)
    began = time.monotonic()
    sys.argv = ["tilecast", "generate", str(folder / "model"), "--tp", str(ranks), "--ids", "5,6,7"]
    try:
        app(prog_name="tilecast")
    finally:
        sys.stderr.write(f"{time.monotonic() - began}\n")


if __name__ == "__main__":
    main()
