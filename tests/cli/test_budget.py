"""What `tilecast tune` says where a budget ends its search."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tilecast.autotune.race import Progress
from tilecast.cli._output import Output
from tilecast.cli._run import reported_tuning

TINY = "E=2,H=40,I=24,k=1"


def event(label: str, cut: int) -> Progress:
    return Progress(
        task=0, tasks=2, label=label, round=0, rounds=1, alive=1, candidates=1, best_us=None, default_us=None,
        elapsed_s=0.0, remaining_s=None, fraction=0.5, cut=cut,
    )  # fmt: skip


@pytest.mark.parametrize(("last", "said"), [(0, False), (7, True)])
def test_what_counts_is_what_was_left_out_in_the_end(last: int, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with reported_tuning(Output(json_wanted=False)) as progress:
        for label, cut in (("up", 3), ("down", 0), ("up", last)):
            progress(event(label, cut))
    assert ("ended the search early for 1 of 2 GEMMs and token counts" in capsys.readouterr().err) == said


def test_a_tuning_that_a_budget_ends_says_so_and_that_it_can_go_on(cli: Command, tmp_path: Path) -> None:
    line = ("tune", TINY, "--tokens", "1", "--store", tmp_path / "store.db")
    cut = cli(*line, "--budget", "0.001s")
    assert cut.code == 0
    assert "the budget ended the search early for 2 of 2 GEMMs and token counts" in cut.err
