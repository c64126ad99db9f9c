"""`tilecast generate`: prompts from everywhere, text or ids, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.programs import run
from tests.tiny_models import save_tiny, save_tokenizer
from tests.torchrun.launch import environment


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_tiny("qwen3_moe", tmp_path_factory.mktemp("texts"), vocab_size=300))


def test_ids_stream_and_speed_is_told(cli: Command, mixtral: Path) -> None:
    done = cli("generate", mixtral, "--ids", "5,6,7", "--max-new-tokens", "4")
    assert done.code == 0, done.err
    assert len(done.out.split()) == 4 and done.out.endswith("\n")
    assert "experts of 2 of 2 layers run on Tilecast: table none" in done.err
    assert "4 new tokens; prefill 3 tokens in " in done.err
    document = json.loads(cli("generate", mixtral, "--ids", "5,6,7", "--max-new-tokens", "4", "--json").out)
    assert document["outputs"][0]["text"] == done.out.strip()
    assert document["outputs"][0]["prompt_ids"] == [5, 6, 7] and "logits_sha256" not in document["outputs"][0]
    assert document["decode_tokens"] == 3 and document["experts"] == "tilecast"


def test_a_file_gives_a_line_for_each_prompt(cli: Command, mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("5,6,7\n\n11 3 60\n5,6,7\n")
    options = ("--max-new-tokens", "3", "--reproducible")
    done = cli("generate", mixtral, "--prompts", path, "--batch", "2", *options)
    first, _, third = done.out.splitlines()
    assert first.startswith("[1] ") and first[4:] == third[4:]
    alone = json.loads(cli("generate", mixtral, "--ids", "11,3,60", *options, "--json").out)["outputs"][0]
    batch = json.loads(cli("generate", mixtral, "--prompts", path, *options, "--json").out)["outputs"][1]
    assert alone["logits_sha256"] == batch["logits_sha256"] and alone["ids"] == batch["ids"]


def test_text_in_text_out(cli: Command, texts: Path) -> None:
    options = ("generate", texts, "--prompt", "Once", "--max-new-tokens", "6", "--experts", "eager")
    document = json.loads(cli(*options, "--json").out)
    assert document["outputs"][0]["prompt_ids"] and len(document["outputs"][0]["ids"]) == 6
    assert cli(*options).out == document["outputs"][0]["text"] + "\n"
    assert document["experts"] == "eager"


def test_sampling_follows_its_seed(cli: Command, mixtral: Path) -> None:
    def run(*options: str) -> str:
        done = cli("generate", mixtral, "--ids", "5,6", "--experts", "eager", "--max-new-tokens", "8", *options)
        assert done.code == 0, done.err
        return done.out

    greedy = run("--greedy")
    assert greedy == run() == run("--top-k", "1")
    warm = run("--temperature", "3", "--seed", "1")
    assert warm == run("--temperature", "3", "--seed", "1") != run("--temperature", "3", "--seed", "2")
    assert warm != greedy


def test_standard_input_holds_prompts_in_a_process(mixtral: Path, tmp_path: Path) -> None:
    words = ("generate", mixtral, "--experts", "eager", "--max-new-tokens", "2")
    done = run("tilecast", *words, environment=environment(tmp_path), text="1,2\n3\n")
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in done.stdout.splitlines()] == ["[1] ", "[2] "]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--ids", "1", "--prompt", "x"), 2, "--prompt and --ids are given, expected one of them"),
        (("--ids", "1", "--greedy", "--top-k", "3"), 2, "--greedy and --top-k contradict"),
        (("--ids", "1", "--temperature", "-1"), 2, "temperature is -1.0"),
        (("--ids", "1", "--dtype", "int9"), 2, "int9"),
        (("--ids", "1", "--policy", "best"), 2, "--policy is 'best'"),
        (("--ids", "1", "--policy", "fastest", "--reproducible"), 2, "contradict each other"),
        (("--ids", "1", "--tp", "2"), 2, "start with torchrun --nproc-per-node 2"),
        (("--ids", "1", "--tp", "2", "--ep", "2"), 2, "one way or the other"),
        (("--prompts", "absent.txt"), 3, "absent.txt cannot be read"),
        (("--ids", "1", "--import", "absent.db"), 3, "absent.db"),
        (("--ids", "a"), 3, "'a' is not a token id"),
        (("--ids", ""), 3, "the prompt is empty"),
        (("--ids", "97"), 3, "token 97, expected 0 to 96"),
        (("--prompt", "Once upon"), 3, "without a tokenizer"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    cli: Command, mixtral: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    experts = () if "--import" in options else ("--experts", "eager")
    cli("generate", mixtral, *options, *experts).failed(code, words)


def test_the_folder_is_looked_at_before_prompts_are(cli: Command, tmp_path: Path) -> None:
    cli("generate", tmp_path / "none").failed(3, "is not a folder")


def test_a_folder_without_a_checkpoint_is_told(cli: Command, tmp_path: Path) -> None:
    cli("generate", tmp_path, "--ids", "1").failed(3, "config.json does not exist")
