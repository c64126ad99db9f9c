"""The command that quantises checkpoints: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.tiny_models import save_tiny, save_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_tokenizer(save_tiny("mixtral", folder, intermediate_size=96, vocab_size=257, num_hidden_layers=1))


def test_a_checkpoint_is_quantised_on_a_text(cli: Command, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is cast well is cast once. " * 20, encoding="utf-8")
    out = tmp_path / "out"
    done = cli("quantize", checkpoint, out, "--group", "32", "--calibration", text, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["format"] == "awq_g32" and found["projections"] == 24
    # float32 is quantised here: four bits of 32, and 20 of scale and zero point for each group.
    assert 0.14 < found["bytes_after"] / found["bytes_before"] < 0.15
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_fp8_prints_what_was_made(cli: Command, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("quantize", checkpoint, tmp_path / "out", "--format", "fp8")
    assert done.code == 0 and "24 expert weights as fp8_block128" in done.out and "of what they were" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--format", "int3"), 2, ("--format is 'int3'", "awq, fp8")),
        (("--group", "48"), 2, ("--group is 48", "32, 64, 128")),
        (("--format", "fp8", "--group", "64"), 2, ("--group is 64 with fp8",)),
        (("--format", "fp8", "--calibration", "x"), 2, ("--calibration goes with --format awq",)),
        (("--calibration", "/no/such/text"), 3, ("/no/such/text cannot be read",)),
        (("--group", "64"), 3, ("do not fit words of 8 and groups of 64", "groups of 32 would")),
    ],
)
def test_what_does_not_fit_is_one_line(
    cli: Command, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    cli("quantize", checkpoint, tmp_path / "out", *arguments).failed(code, *words)
    assert not (tmp_path / "out").exists()


def test_a_text_without_a_tokenizer_is_told_before_the_model_is_loaded(cli: Command, tmp_path: Path) -> None:
    folder, text = (
        save_tiny("mixtral", tmp_path / "plain", intermediate_size=96, num_hidden_layers=1),
        tmp_path / "text",
    )
    text.write_text("cast once")
    cli("quantize", folder, tmp_path / "out", "--group", "32", "--calibration", text).failed(3, "has no tokenizer")


def test_what_is_quantised_in_another_way_is_quantised_already(cli: Command, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "gptq", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    cli("quantize", folder, tmp_path / "out").failed(3, "gptq is quantised already")


def test_a_folder_that_is_there_is_not_written_to(cli: Command, checkpoint: Path, tmp_path: Path) -> None:
    cli("quantize", checkpoint, tmp_path).failed(2, "exists already")
