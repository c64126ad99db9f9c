"""Quantised checkpoints on several ranks as real processes: their dequantised twins' tokens, and how loading fails."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_quantized import FORMS
from tests.quantized_checkpoints import packed, quantized_twins
from tests.torchrun.launch import Ended, processes, reports

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]

RUNS = {
    (2, "few"): ("tp:awq_g32", "tp:fp8_block128", "ep:awq_g32"),
    (2, "all"): tuple(f"{mode}:{form}" for mode in ("tp", "ep") for form in FORMS),
    (4, "all"): tuple(f"tp:{form}" for form in FORMS),
}
PARAMS = [pytest.param(run, id="-".join(map(str, run)), marks=[pytest.mark.long] * (run[1] == "all")) for run in RUNS]
RANKS = 2


@pytest.fixture(scope="module", params=PARAMS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ranks, cases = request.param[0], RUNS[request.param]
    folder = tmp_path_factory.mktemp("checkpoints")
    for form in {case.partition(":")[2] for case in cases}:
        quantize, config = FORMS[form]
        (folder / form).mkdir()
        # A fourth of it is a whole group, or block.
        quantized_twins(folder / form, "mixtral", quantize, config, intermediate_size=512 if "block" in form else 128)
    found = reports("quantized", folder, ranks, *cases, prefix=f"{ranks}-", timeout=280)
    assert [set(report) for report in found] == [set(cases)] * ranks
    return found


def test_all_ranks_give_the_dequantised_twins_tokens(run: list[dict[str, Any]]) -> None:
    for report in run:
        for case, seen in report.items():
            assert "error" not in seen, (case, seen)
            assert seen["formats"] == [case.partition(":")[2].partition(" ")[0]] and not seen["reasons"]
            wanted = run[0][case]
            assert seen["tokens"] == wanted["wanted"], case
            assert seen["seen"] == wanted["seen"], f"{case}: other bits than rank 0"
            difference = (torch.tensor(seen["seen"]) - torch.tensor(wanted["logits"])).abs().max()
            assert difference < 1e-4, case


def test_each_rank_reads_what_it_holds_and_no_more(run: list[dict[str, Any]]) -> None:
    for report in run:
        for case, seen in report.items():
            # Zero points of 4 bits are held in bytes; packed ones say their shape in words of 64 bits.
            assert 0.95 * seen["held_bytes"] < seen["read_bytes"] < 1.02 * seen["held_bytes"], case


FIRST, LAST = "model.layers.1.block_sparse_moe.experts.0.", "model.layers.1.block_sparse_moe.experts.7."


def changed(source: Path, folder: Path, name: str, tensor: torch.Tensor | None, **config: Any) -> None:
    """Save a checkpoint with another tensor, or without it, and with other fields of its quantisation."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors") | ({} if tensor is None else {name: tensor})
    if tensor is None:
        weights.pop(name, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    good, words = (folder / name for name in ("good", "odd"))
    (folder / "good").mkdir()
    (folder / "odd").mkdir()
    quantize, config = FORMS["int4_g32"]
    source, _ = quantized_twins(good, "mixtral", quantize, config, intermediate_size=96)
    source.rename(folder / "groups")
    channel = {**FORMS["int8_channel"][1], "format": "pack-quantized"}
    source, _ = quantized_twins(words, "mixtral", packed(8, 0), channel, intermediate_size=100)
    source.rename(folder / "words")
    (folder / "awq").mkdir()
    quantize, config = FORMS["awq_g32"]
    source, _ = quantized_twins(folder / "awq", "mixtral", quantize, config, intermediate_size=128)
    weights = load_file(source / "model.safetensors")
    changed(source, folder / "no-scales", LAST + "w1.scales", None)
    turned = weights[FIRST + "w1.qweight"].view(128, -1).contiguous()
    changed(source, folder / "other-words", FIRST + "w1.qweight", turned)
    changed(source, folder / "gemv", "", None, version="gemv")
    scales = weights[LAST + "w2.scales"]
    scales[1, 2] = float("nan")
    changed(source, folder / "not-finite", LAST + "w2.scales", scales)
    changed(source, folder / "one-rank-0", "", None)
    shutil.copytree(folder / "one-rank-0", folder / "one-rank-1")
    (folder / "one-rank-1" / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def ended(faulty: Path) -> list[Ended]:
    return processes("quantized_faults", faulty, RANKS)


MESSAGES = {
    "no scales": r"no-scales: .*experts\.7\.w1 has no scales, expected beside qweight, qzeros$",
    "words of another order": r"experts\.0\.w1\.qweight is torch\.int32 \(128, 8\), expected torch\.int32 \(64, 16\)",
    "version of another order": "awq gemv.*others order words otherwise",
    "cut groups": r"tp=2 would cut the 96 columns of I inside a group of 32 .*int4_g32.*; tp that work: 1, 3$",
    "cut words": r"tp=2 would cut the 100 columns of I inside a word of 4 packed codes .*; tp that work: 1, 5, 25$",
    "not finite": r"^rank 1: .*experts\.7\.w2\.scales holds nan, expected scales that are finite and not negative$",
    "missing on one rank": r"^rank 1: .*one-rank-1 has neither model\.safetensors nor",
    "missing on one rank, theirs": r"^rank 1: .*one-rank-1 has neither model\.safetensors nor",
    "not finite, theirs": r"^rank 1: .*experts\.7\.w2\.scales holds nan, expected scales that are finite",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_faults_end_all_ranks_with_one_message(faulty: Path, ended: list[Ended], name: str) -> None:
    reports = [json.loads((faulty / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    for report in reports:
        kind, message, seconds = report[name]
        assert (kind, message) == ("ModelError", reports[0][name][1])
        assert re.search(MESSAGES[name], message) and "\n" not in message
        assert seconds < 60


def test_the_command_ends_on_every_rank_with_one_line_and_code(ended: list[Ended]) -> None:
    for rank in ended:
        assert rank.code == 3, rank.errors[-2000:]
        (line,) = re.findall("^tilecast: .*", rank.errors, re.MULTILINE)
        assert re.search(MESSAGES["not finite"].removeprefix("^"), line)
        assert "Traceback" not in rank.errors and float(rank.errors.strip().splitlines()[-1]) < 60
