"""Loads quantised checkpoints on all ranks and generates greedily, beside their dequantised twins in one process.

Arguments: the folder (NAME/quantized and NAME/dense for each NAME, saved by the test), then MODE:NAME, tp or ep, each.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import transformers

from tests.torchrun.models import greedy, logits_of
from tilecast.engine.adapted import adapted_of
from tilecast.engine.load import load_model
from tilecast.engine.tensor_files import TensorFiles
from tilecast.engine.transformers import experts_modules
from tilecast.errors import TilecastError

read_bytes = 0


def count_reading() -> None:
    """Count the bytes of experts' tensors that this rank is given from files."""
    read = TensorFiles.read

    def counted(self: TensorFiles, name: str, *ranges: range | None) -> torch.Tensor:
        global read_bytes
        found = read(self, name, *ranges)
        read_bytes += found.nbytes if ".experts." in name else 0
        return found

    TensorFiles.read = counted  # type: ignore[method-assign]


def compare(folder: Path, parallel: dict[str, int]) -> dict[str, object]:
    global read_bytes
    report: dict[str, object] = {}
    if os.environ["RANK"] == "0":
        dense = folder / "dense"
        own = transformers.AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, experts_implementation="eager"
        )
        report = {"wanted": greedy(own), "logits": logits_of(own).flatten().tolist()}
    read_bytes = 0
    model = load_model(folder / "quantized", dtype="float32", **parallel).model  # type: ignore[arg-type]
    states = [adapted_of(module) for _, module in experts_modules(model)]
    held = [weights for state in states if state is not None for weights in (state.plain().w13, state.plain().w2)]
    return report | {
        "tokens": greedy(model),
        "seen": logits_of(model).flatten().tolist(),
        "formats": sorted({str(getattr(weights, "format", "dense")) for weights in held}),
        "reasons": [state.reason for state in states if state is not None and state.reason],
        "held_bytes": sum(weights.nbytes for weights in held),
        "read_bytes": read_bytes,
    }


def main() -> None:
    folder, *cases = Path(sys.argv[1]), *sys.argv[2:]
    warnings.filterwarnings("ignore")
    count_reading()
    ranks = int(os.environ["WORLD_SIZE"])
    report: dict[str, object] = {}
    for case in cases:
        mode, _, name = case.partition(":")
        try:
            report[case] = compare(folder / name, {mode: ranks})
        except TilecastError as error:
            report[case] = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{ranks}-rank{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
