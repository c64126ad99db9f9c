"""The path of a newcomer in docs/quickstart.md, from tuning a checkpoint to two ranks: its commands, as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny, save_tokenizer
from tests.torchrun.launch import environment

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"
SECTION = QUICKSTART.read_text().partition("## 7. A whole checkpoint")[2]
COMMANDS = [line.strip() for line in re.findall(r"^    (\S.*)$", SECTION, re.MULTILINE)]

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]


def test_a_checkpoint_is_tuned_and_generates_on_two_ranks(tmp_path: Path) -> None:
    assert COMMANDS[0] == 'pip install "tilecast[hf]"', "what the tests' environment was made with"
    save_tokenizer(save_tiny("mixtral", tmp_path / "mixtral", vocab_size=300))
    python = f"{sys.executable} -m"
    outputs = []
    for command in COMMANDS[1:]:
        # Only the time for tuning differs from what a newcomer types, and where the programs are.
        words = command.replace("--budget 10m", "--budget 8s").replace("torchrun", f"{python} torch.distributed.run")
        words = re.sub(r"(^|(?<=\.db ))tilecast ", f"{python} tilecast ", words)
        done = subprocess.run(
            ["bash", "-c", words], cwd=tmp_path, env=environment(tmp_path), timeout=280, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr[-3000:])
        outputs.append(done)
    tuned, looked, generated = outputs
    assert (tmp_path / "mixtral-tp2.db").exists() and tuned.stdout
    assert "not covered" not in looked.stdout
    assert re.search(r"experts of 2 of 2 layers run on Tilecast: table [0-9a-f]{12}, ", generated.stderr)
    assert re.search(r"\d+ new tokens; prefill 16 tokens in ", generated.stderr)
