"""Compares a tiny checkpoint on all ranks, as it is and with collectives that are wrong on one rank or in a batch."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilecast.engine.agreement import process_group
from tilecast.engine.compare import Request, check_ranks, compare
from tilecast.engine.compare_invariance import check_arrangements, random_prompts
from tilecast.engine.load import load_model

PROMPTS = random_prompts(97, lengths=(6, 4))
RANK = int(os.environ["RANK"])


class WrongSum(TorchDispatchMode):
    """Adds a little to what is reduced if it has more than `above` values."""

    def __init__(self, above: int) -> None:
        super().__init__()
        self.above = above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "all_reduce" in func._schema.name:
            result = torch.ops._c10d_functional.wait_tensor(result)
            return result * (1 + 2**-18) if result.numel() > self.above else result
        return result


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    checkpoint = str(folder / "mixtral")
    request = Request(folder=checkpoint, tp=2, checks=("batch", "ranks"), prompts=PROMPTS)
    report: dict[str, object] = {"whole": compare(request).to_json()}
    group = process_group()
    loaded = load_model(checkpoint, tp=2, group=group, experts="eager")
    with WrongSum(0 if RANK == 1 else 1 << 30):
        report["one_rank"] = check_ranks(request, loaded, PROMPTS, group).to_json()
    with WrongSum(4 * 64):
        agree = lambda here: any(one == b"1" for one in group.gather("x", b"1" if here else b"0"))  # noqa: E731
        report["batch"] = check_arrangements(loaded.model, PROMPTS, "batch", anywhere=agree).to_json()
    (folder / f"rank{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
