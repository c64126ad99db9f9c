"""Every kind of error ends in its own exit code and one line."""

from __future__ import annotations

import pytest

from tilecast import errors
from tilecast.cli._exit import Interrupted, complain, exit_code, guarded, resumable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TilecastError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.InputError("x"), 3),
        (errors.ModelError("x"), 3),
        (errors.SchemaError("x"), 3),
        (errors.CoverageError("x"), 4),
        (errors.AgreementError("x"), 5),
        (errors.DeviceError("x"), 6),
    ],
)
def test_codes(error: errors.TilecastError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert exit_code(error) == code
    assert guarded(fail, debug=False) == code
    assert capsys.readouterr() == ("", "tilecast: x\n")


def test_an_unexpected_error_shows_its_traceback_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("two\nlines")

    assert guarded(fail, debug=False) == 1
    assert capsys.readouterr().err == (
        "tilecast: unexpected ValueError: two lines; run it with --debug for the traceback\n"
    )
    assert guarded(fail, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupts_say_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def tuning() -> None:
        with resumable("measurements made"):
            raise KeyboardInterrupt

    def other() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        tuning()
    assert guarded(tuning, debug=False) == 130
    assert "measurements made so far are kept and the same command continues" in capsys.readouterr().err
    assert guarded(other, debug=False) == 130
    assert capsys.readouterr().err == "tilecast: interrupted\n"


def test_a_complaint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a\n  b\tc")
    complain("")
    assert capsys.readouterr().err == "tilecast: a b c\ntilecast: failed without a message\n"
