from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from tilecast.cli._options import parse_budget, parse_dtypes
from tilecast.cli._output import Output, add_row, duration, json_text, microseconds, percent, plural, ratio, table
from tilecast.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("3m", 180), ("180s", 180), ("1h", 3600), ("90", 90), ("0.5m", 30), (" 2 min ", 120)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


def test_no_budget_is_none() -> None:
    assert parse_budget(None) is None


@pytest.mark.parametrize("text", ["", "m", "3x", "1e9", "0", "-1", "3m4s", "nan", "inf", "999999999s"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_budget(text)


def test_dtypes_keep_their_order_once_each() -> None:
    assert parse_dtypes("fp16, bf16,fp16") == ("fp16", "bf16")


def test_figures() -> None:
    assert [microseconds(value) for value in (1234.5, 45.67, 0.5, None)] == ["1,234", "45.7", "0.50", "—"]
    assert [duration(value) for value in (-1, 45, 185, 3720)] == ["0 s", "45 s", "3 min 05 s", "1 h 02 min"]
    assert [percent(0.125, sign=True), percent(None), ratio(1.5), ratio(None)] == ["+12.5%", "—", "1.50×", "—"]
    assert [plural(1, "bucket"), plural(0, "bucket"), plural(2, "entry", "entries")] == [
        "1 bucket",
        "0 buckets",
        "2 entries",
    ]


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json_wanted=True)
    output.show("a result", table("t", ("a",)))
    output.heading("a heading")
    output.note("a note")
    with output.progress("working") as reporter:
        reporter.update(done=1, total=2, text="half", remaining_s=1.0)
    output.emit({"a": 1})
    found = capsys.readouterr()
    assert json.loads(found.out) == {"a": 1}
    assert "a note" in found.err
    assert "half" in found.err


def test_progress_in_a_log_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("working") as reporter:
        for done in range(1000):
            reporter.update(done=done, total=1000, text=f"step {done}", remaining_s=None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"working: {10 * tenth:3d}% step {100 * tenth}" for tenth in range(10)]


def test_progress_in_a_log_shows_life_where_a_tenth_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", iter((0.0, 59.0, 61.0)).__next__)
    with Output().progress("working") as reporter:
        for step in "abc":
            reporter.update(done=1, total=100, text=step, remaining_s=None)
    assert capsys.readouterr().err.splitlines() == ["working:   1% a", "working:   1% c"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_keeps_its_room_beside_a_long_text(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    output = Output()
    output._notes = Console(file=screen, force_terminal=True, width=columns, color_system=None)
    with output.progress("tuning") as reporter:
        reporter.update(done=1, total=4, text="3 of 10: E8 H4096 I1792 " + "long " * 30, remaining_s=185.0)
    last = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines() if line.strip()]
    assert re.fullmatch(r"tuning [━╸╺ ]{10,} 25% \d:\d\d:\d\d 3 min 05 s left *", last[-2]), last
    assert last[-1].startswith("  3 of 10: E8 H4096")
    assert len(last[-1]) <= columns


def test_people_get_no_json_and_texts_are_literal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    shown = table("[bold]t", ("a", "b"), left=("b",))
    add_row(shown, "[1]", "[red]x")
    output.show(shown, "[/] text")
    output.emit({"a": 1})
    found = capsys.readouterr().out
    for text in ("[bold]t", "[1]", "[red]x", "[/] text"):
        assert text in found
    assert "{" not in found


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for json_wanted in (False, True):
        output = Output(json_wanted=json_wanted, rank=1)
        output.show("x")
        output.heading("x")
        output.note("x")
        output.warn("x")
        with output.progress("x") as reporter:
            reporter.update(done=1, total=2, text="x", remaining_s=None)
        output.emit({})
    assert capsys.readouterr() == ("", "")


def test_json_says_what_the_document_does_and_keeps_what_is_deep_in_one_line() -> None:
    document = {
        "empty": [], "none": None, "text": 'é "quoted"\n', "number": 1.5, "nothing": {}, "pair": (1, 2),
        "races": [{"gemm": "up", "entrants": [{"config": {"params": {"mr": 6}}, "us": [1, 2]}, {"us": None}]}],
    }  # fmt: skip
    text = json_text(document)
    assert json.loads(text) == json.loads(json.dumps(document))
    assert '        {"config": {"params": {"mr": 6}}, "us": [1, 2]},\n' in text and text.endswith("\n}\n")
    assert '\n  "number": 1.5,\n' in text
    with pytest.raises(ValueError):
        json_text({"us": float("nan")})
