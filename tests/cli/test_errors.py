"""Wrong input: one line on standard error, the right code, nothing on standard output, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SPEC, Command

BAD_LINES = [
    (2, ["nope"], "No such command"),
    (2, ["tune"], "neither MODEL nor --from-record"),
    (2, ["tune", SPEC, "--tp", "0"], "--tp"),
    (2, ["tune", SPEC, "--tokens", "8-4-2"], "--tokens"),
    (2, ["tune", SPEC, "--tokens", ""], "--tokens"),
    (2, ["tune", SPEC, "--tokens", "4,1"], "--tokens"),
    (2, ["tune", SPEC, "--budget", "soon"], "--budget"),
    (2, ["tune", SPEC, "--budget", "0s"], "--budget"),
    (2, ["tune", SPEC, "--budget", "-3m"], "--budget"),
    (2, ["tune", SPEC, "--budget", "9999h"], "--budget"),
    (2, ["tune", SPEC, "--policy", "best"], "--policy"),
    (2, ["tune", SPEC, "--threads", "4096"], "--threads"),
    (2, ["bench", SPEC, "--dtype", "fp8"], "--dtype"),
    (2, ["bench", SPEC, "--peers", "nobody"], "nobody"),
    (2, ["bench", SPEC, "--layer", SPEC], "--layer"),
    (2, ["check"], "MODEL"),
    (2, ["demo", "--budget", "x"], "--budget"),
    (3, ["tune", "mixtrl-8x7b"], "mixtral-8x7b"),
    (3, ["tune", "E=0,H=64,I=96,k=1"], "E is 0"),
    (3, ["tune", "E=4,H=64,I=96,k=5"], "top-k is 5"),
    (3, ["tune", "E=4,H=64,I=96"], "k"),
    (3, ["tune", SPEC, "--tp", "97"], "tp is 97"),
    (3, ["tune", SPEC, "--dtype", "fp8"], "fp8"),
    (3, ["doctor", "no/such/config.json"], "no/such/config.json"),
    (3, ["cache", "show", "no/such.db"], "no/such.db"),
    (3, ["cache", "show", ""], "empty"),
    (3, ["bench", SPEC, "--table", "no/such.db"], "no/such.db"),
    (3, ["check", SPEC, "--table", "no/such.db"], "no/such.db"),
    (3, ["tune", SPEC, "--export", "no/folder/t.db"], "no/folder"),
    (3, ["tune", SPEC, "--export", "/proc/t.db"], "/proc/t.db"),
    (3, ["demo", "--out", "no/folder/t.db"], "no/folder"),
]


@pytest.mark.parametrize(("code", "line", "word"), BAD_LINES, ids=[" ".join(line)[:60] for _, line, _ in BAD_LINES])
def test_a_bad_line_is_told_in_one_line(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(*line).failed(code, word)
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_opened_ends_before_measuring(cli: Command) -> None:
    done = cli("tune", SPEC, "--store", "redis://host/x")
    assert (done.code, done.out) == (3, "")
    assert "redis" in done.err.splitlines()[-1]


@pytest.mark.parametrize("variable", ["TM_GEMM_POLICY", "TM_GEMM_MISS", "TM_GEMM_TUNE"])
def test_a_bad_variable_is_told_by_name(cli: Command, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "nonsense")
    cli("tune", SPEC).failed(2, variable)


def _truncated(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:3000])


def _text(table: Path) -> None:
    table.write_text("tile configs\n" * 100)


def _empty(table: Path) -> None:
    table.write_bytes(b"")


def _flipped(table: Path) -> None:
    data = bytearray(table.read_bytes())
    at = data.index(b"uniform")
    data[at : at + 7] = b"Uniform"
    table.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncated, _text, _empty, _flipped])
@pytest.mark.parametrize("command", ["show", "import", "export", "doctor", "check", "bench"])
def test_a_damaged_file_is_refused_everywhere(
    cli: Command, table: Path, tmp_path: Path, damage: object, command: str
) -> None:
    assert callable(damage)
    damage(table)
    lines = {
        "show": ["cache", "show", table],
        "import": ["cache", "import", table, "--store", tmp_path / "store.db"],
        "export": ["cache", "export", table, tmp_path / "out.db"],
        "doctor": ["doctor", "--table", table, "--json"],
        "check": ["check", SPEC, "--table", table],
        "bench": ["bench", SPEC, "--table", table],
    }
    cli(*lines[command]).failed(3, "table.db")
    assert [path.name for path in tmp_path.iterdir()] == ["table.db"]


@pytest.mark.parametrize(
    "line",
    [["cache", "import"], ["doctor", "--json", "--table"], ["check", SPEC, "--table"], ["bench", SPEC, "--table"]],
)
def test_an_impossible_config_is_an_error_that_names_the_entry(
    cli: Command, impossible: Path, tmp_path: Path, line: list[str]
) -> None:
    done = cli(*line, impossible)
    done.failed(3, "E4 H64 I96 top2 bf16", "registers")


def test_an_impossible_config_is_not_imported(cli: Command, impossible: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    cli("cache", "import", impossible, "--store", store).failed(3, "nothing of the file is used")
    assert not store.exists()


def test_a_table_of_another_device_is_stale_where_it_is_to_run(cli: Command, foreign: Path) -> None:
    cli("check", SPEC, "--table", foreign).failed(4, "another CPU")
    done = cli("bench", SPEC, "--table", foreign, "--tokens", "1")
    assert (done.code, done.out) == (4, "")
    assert "another CPU" in done.err.splitlines()[-1]


def test_export_leaves_other_files_alone(cli: Command, table: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("keep me")
    cli("cache", "export", table, other).failed(3, "notes.txt")
    cli("tune", SPEC, "--export", other).failed(3, "notes.txt")
    cli("tune", SPEC, "--export", tmp_path).failed(3, "--export", "directory")
    assert other.read_text() == "keep me"


def test_exporting_nothing_is_a_coverage_gap(cli: Command, foreign: Path, tmp_path: Path) -> None:
    cli("cache", "export", foreign, tmp_path / "out.db", "--here").failed(4, "nothing was written")
    assert not (tmp_path / "out.db").exists()
