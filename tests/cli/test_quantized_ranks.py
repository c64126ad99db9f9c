"""A checkpoint is quantised, tuned for two ranks and generates on both, as three commands in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.tiny_models import save_tiny
from tests.torchrun.launch import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.torchrun]
LAUNCHED = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
PROMPTS = ("1,2,3", "11,3,60,8,9", "5")


def run(folder: Path, *words: str | Path, ranks: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    launch = LAUNCHED if ranks else ()
    done = subprocess.run(
        [sys.executable, "-m", *launch, "tilecast", *map(str, words)], timeout=120,
        cwd=ROOT, env=environment(folder, **variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("form", ["awq", "fp8"])
def test_a_quantised_checkpoint_is_tuned_and_served_on_two_ranks(tmp_path: Path, form: str) -> None:
    # fp8 has a scale for each block of 128 by 128, and a rank keeps whole blocks.
    sizes = {"awq": 128, "fp8": 256}
    save_tiny("mixtral", tmp_path / "model", intermediate_size=sizes[form], num_hidden_layers=1)
    group = ("--group", "32") if form == "awq" else ()
    quantised, table = tmp_path / "quantised", tmp_path / "table.db"
    run(tmp_path, "quantize", tmp_path / "model", quantised, "--format", form, *group)
    tune = ("tune", quantised, "--tp", "2", "--tokens", "1,4,16", "--effort", "quick", "--budget", "8s")
    run(tmp_path, *tune, "--threads", "1", "--export", table)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ("--max-new-tokens", "5", "--reproducible", "--threads", "1", "--json")

    def generate(*words: str | Path, ranks: bool) -> dict[str, Any]:
        given = {"TM_GEMM_IMPORT": str(table), "TM_GEMM_MISS": "error"} if ranks else {}
        tp = ("--tp", "2") if ranks else ()
        done = run(tmp_path, "generate", quantised, *words, *tp, *options, ranks=ranks, **given)
        if ranks:
            assert "1 of 1 distinct layers covered" in done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        assert document["uncovered"] == []
        return document

    together = generate("--prompts", prompts, "--batch", "3", ranks=True)
    alone = generate("--ids", PROMPTS[0], ranks=True)
    assert alone["outputs"][0]["logits_sha256"] == together["outputs"][0]["logits_sha256"]
    whole = generate("--prompts", prompts, ranks=False)
    assert [one["ids"] for one in whole["outputs"]] == [one["ids"] for one in together["outputs"]]
