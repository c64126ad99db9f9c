"""`tilecast compare`: tables, JSON, picture, exit codes and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers")

from tests.cli.conftest import Command
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "mixtral"
    save_tiny("mixtral", path, torch.float32, 0)
    return path


IDS = ("--ids", "3,14,15,92,6,5", "--ids", "35,8,9")


def test_it_prints_tables_and_draws_a_picture(cli: Command, folder: Path, tmp_path: Path) -> None:
    done = cli("compare", folder, *IDS, "--check", "padding,decode", "--picture", tmp_path / "why.svg")
    assert done.code == 0, done.err
    assert "Bits first differ at layer 0 experts" in done.out
    assert "No operation is beyond rounding" in done.out
    assert re.search(r"│ decode +│.*differs: token by token", done.out)
    assert "The next token is the same after 9 of 9 tokens" in done.out
    root = ElementTree.parse(tmp_path / "why.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"layer 0", "layer 1", "outside", "experts", "attention"} <= set(texts)
    assert any("decode" in (text or "") for text in texts)


def test_json_is_one_document(cli: Command, folder: Path) -> None:
    done = cli("compare", folder, *IDS, "--against", "none", "--check", "batch", "--expect", "batch", "--json")
    document = json.loads(done.out)
    assert document["command"] == "compare"
    assert document["reference"] is None
    assert document["prompts"] == [[3, 14, 15, 92, 6, 5], [35, 8, 9]]
    assert [one["check"] for one in document["invariance"]] == ["batch"]
    assert (done.code == 0) == (document["unmet"] is None)


def test_what_is_expected_and_not_so_exits_with_4(cli: Command, folder: Path) -> None:
    done = cli("compare", folder, *IDS, "--check", "none", "--expect", "close,equal", "--json")
    assert done.code == 4
    document = json.loads(done.out)
    assert document["unmet"].startswith("bits differ from the reference's, first at layer 0 experts")
    assert "tilecast: not as expected: bits differ" in done.err


def test_nothing_expected_is_always_met(cli: Command, folder: Path) -> None:
    assert cli("compare", folder, *IDS, "--check", "none", "--expect", "nothing").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--ids", "1,x"], 2, "--ids"),
        (["--ids", "1,97"], 3, "token 97"),
        (["--prompt", "a text"], 3, "tokenizer"),
        (["--prompts", "/no/such/file"], 3, "--prompts"),
        (["--check", "speed"], 2, "batch"),
        (["--expect", "speed"], 2, "close"),
        (["--expect", "equal", "--against", "none"], 2, "no reference"),
        (["--expect", "batch", "--check", "order"], 2, "not asked for"),
        (["--dtype", "int4"], 2, "--dtype"),
        (["--policy", "quickest"], 2, "--policy"),
        (["--experts", "nothing"], 2, "nothing"),
        (["--tp", "2"], 2, "torchrun"),
        (["--picture", "/no/such/folder/why.svg"], 3, "/no/such/folder"),
    ],
)
def test_wrong_input_is_one_line(cli: Command, folder: Path, arguments: list[str], code: int, word: str) -> None:
    done = cli("compare", folder, "--against", "none", "--check", "none", *arguments)
    assert done.code == code, done.err
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith("tilecast: ")
    assert word in last


def test_a_folder_that_is_no_checkpoint_is_bad_input(cli: Command, tmp_path: Path) -> None:
    done = cli("compare", tmp_path)
    assert done.code == 3
    assert str(tmp_path) in done.err.splitlines()[-1]
