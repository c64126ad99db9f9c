"""Loads tiny checkpoints of many families on all ranks and generates greedily, beside transformers' own single process.

Arguments: the folder (one checkpoint a family, saved by the test), then MODE (tp or ep) and families.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from tests.tiny_models import VOCABULARY
from tilecast.engine.load import load_model
from tilecast.errors import TilecastError

PROMPT = torch.arange(2, 12)[None] * 7 % VOCABULARY


def greedy(model: torch.nn.Module) -> list[int]:
    out = model.generate(PROMPT, max_new_tokens=10, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return out[0, PROMPT.shape[1] :].tolist()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.double()


def compare(folder: Path, parallel: dict[str, int]) -> dict[str, object]:
    begin = time.monotonic()
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    wanted, exact = greedy(own), logits_of(own)
    loaded = load_model(folder, **parallel)  # type: ignore[arg-type]
    seen = logits_of(loaded.model)
    return {
        "wanted": wanted,
        "tokens": greedy(loaded.model),
        "difference": float((seen - exact).abs().max()),
        "bits": seen.flatten()[::17].tolist(),
        "experts": loaded.experts,
        "seconds": time.monotonic() - begin,
    }


def main() -> None:
    folder, mode, *families = Path(sys.argv[1]), *sys.argv[2:]
    warnings.filterwarnings("ignore")
    ranks = int(os.environ["WORLD_SIZE"])
    parallel = {"tp": {"tp": ranks}, "ep": {"ep": ranks}}[mode]
    report: dict[str, object] = {}
    for family in families:
        try:
            report[family] = compare(folder / family, parallel)
        except TilecastError as error:
            report[family] = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{mode}{ranks}-rank{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
