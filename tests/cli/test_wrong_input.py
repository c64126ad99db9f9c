"""Every option of every command, given what it cannot take: one line that says so, the right code, nothing written.

The options are read off the commands themselves, so that a new one without a case here fails a test. `tilecast cache`
has tests of its own, but for `cache coverage`.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("transformers")

from tests.cli.conftest import SPEC, Command, Done, table_of
from tests.tiny_models import save_tiny
from tilecast.cache_store.bundle import export_table
from tilecast.cli import _output
from tilecast.cli.app import app

HUGE = "1" + "0" * 30
LONG = "x" * 5000
PATIENCE_S = 40
ABSENT, FOLDER, LOOP, EMPTY, GARBAGE, BROKEN, LIST, DEEP = (
    "absent", "folder", "loop", "empty", "garbage.bin", "broken.json", "list.json", "deep.json"
)  # fmt: skip

Cases = tuple[tuple[str, int], ...]
"""Values, each with the exit code that it ends in."""

UNREADABLE: Cases = tuple((name, 3) for name in (ABSENT, FOLDER, LOOP, EMPTY, GARBAGE))
"""What no file of any kind is read from: a link to itself cannot be opened even by an administrator."""
UNWRITABLE: Cases = ((FOLDER, 3), ("absent/file", 3), ("/proc/file", 3), ("", 3))
COUNT: Cases = (("x", 2), ("-1", 2), ("0", 2), ("", 2), ("1.5", 2), ("nan", 2))
RANKS: Cases = (*COUNT, (HUGE, 3), ("97", 3))
PROCESSES: Cases = (*COUNT, (HUGE, 2), ("97", 2))
CHOICE: Cases = (("nobody", 2), ("", 2), (LONG, 2))
DTYPE: Cases = (("int9", 3), ("", 3), (LONG, 3))
TOKENS: Cases = (("x", 2), ("", 2), ("-1", 2), ("0", 2), ("1.5", 2), ("4,1", 2), ("8-0-9", 2), (HUGE, 2), (LONG, 2))
BUDGET: Cases = (("x", 2), ("", 2), ("-3m", 2), ("0s", 2), ("nan", 2), ("inf", 2), (HUGE, 2))
THREADS: Cases = (*COUNT, ("4097", 2), (HUGE, 2))
SEED: Cases = (("x", 2), ("-1", 2), ("", 2), ("1.5", 2))
LAYER: Cases = (("", 3), ("E=4", 3), ("E=x,H=1,I=1,k=1", 3), ("E=-1,H=64,I=96,k=1", 3), (f"E={HUGE},H=1,I=1,k=1", 3))
MODEL: Cases = (*LAYER, *UNREADABLE, ("no-such-model", 3), (BROKEN, 3), (LIST, 3), (DEEP, 3), (LONG, 3), ("\0", 3))
TABLE: Cases = (*UNREADABLE, (BROKEN, 3), ("redis://host/x", 3), (LONG, 3))
STORE: Cases = ((FOLDER, 3), (LOOP, 3), (GARBAGE, 3), ("redis://host/x", 3), ("a://", 3))
CHECKPOINT: Cases = ((ABSENT, 3), (FOLDER, 3), (LOOP, 3), (GARBAGE, 3), ("", 3), (LONG, 3))
PLACED: Cases = (
    ("x", 2), ("-1", 2), ("", 2), ("1.5", 2), (HUGE, 2), (FOLDER, 2), (LOOP, 2), (BROKEN, 3), (LIST, 3), (DEEP, 3)
)  # fmt: skip
ROUTING: Cases = (("zipf", 3), ("zipf:x", 3), ("zipf:-1", 3), ("zipf:nan", 3), (BROKEN, 3), (FOLDER, 3))

OPTIONS: dict[str, Cases] = {
    "model": MODEL, "folder": CHECKPOINT, "source": TABLE, "--tp": RANKS, "--ep": RANKS, "--tokens": TOKENS,
    "--dtype": DTYPE, "--policy": CHOICE, "--budget": BUDGET, "--threads": THREADS, "--seed": SEED, "--store": STORE,
    "--layer": LAYER, "--table": TABLE, "--import": TABLE, "--gpu-experts": PLACED, "--effort": CHOICE,
    "--share": CHOICE, "--experts": CHOICE, "--routing": ROUTING, "--save": UNWRITABLE, "--export": UNWRITABLE,
    "--out": UNWRITABLE, "--picture": UNWRITABLE, "--against": CHOICE,
    "--from-record": (*UNREADABLE, (BROKEN, 3), (LIST, 3), (DEEP, 3), (LONG, 3)),
    "--weights": (("x", 2), ("", 2), ("1=x", 2), ("0=1", 2), ("1=-1", 2), ("1=nan", 2), ("1=1,1=1", 2)),
    "--prompts": (*UNREADABLE, (LONG, 3)), "--prompt": (("a text", 3), ("", 3)),
    "--ids": (("x", 3), ("-1", 3), ("", 3), ("1.5", 3), (HUGE, 3), ("97", 3), ("\N{ARABIC-INDIC DIGIT ONE}", 3)),
    "--max-new-tokens": (*COUNT, (HUGE, 3)), "--batch": (*COUNT, ("4097", 2)), "--expert-counts": UNREADABLE,
    "--temperature": (("x", 2), ("-1", 2), ("", 2), ("nan", 2), ("inf", 2)), "--top-k": SEED,
    "--top-p": (("x", 2), ("-1", 2), ("0", 2), ("", 2), ("1.5", 2), ("nan", 2)),
    "--rounds": (*COUNT, (HUGE, 2)), "--peers": CHOICE, "--limit": COUNT,
    "--kernel": (("nobody", 3), ("", 3), (LONG, 3)),
    "--target": (("x", 3), ("", 3), ("cuda", 3), ("cuda:x", 3), ("cuda:-1", 3), ("hip:", 3)),
    "--workers": (*COUNT, (HUGE, 2)), "--inputs": (*COUNT, (HUGE, 2)), "--members": COUNT,
    "--check": CHOICE, "--expect": CHOICE, "--device": CHOICE, "--format": CHOICE, "--group": (*COUNT, ("48", 2)),
    "out": ((FOLDER, 2), (LOOP, 2), (GARBAGE, 2), ("/proc/file", 3)), "--calibration": UNREADABLE,
    "--environment": (("x", 3),), "--relax": CHOICE, "--reach": (("x", 2), ("-1", 2), ("0", 2), ("", 2), ("nan", 2)),
}  # fmt: skip
"""What no command takes for an option of that name, and how each value ends."""

OF_COMMAND: dict[tuple[str, str], Cases] = {
    **{(command, option): PROCESSES for command in ("generate", "compare") for option in ("--tp", "--ep")},
    **{(command, "--dtype"): CHOICE for command in ("bench", "generate", "compare")},
    ("certify", "--seed"): (*SEED, (HUGE, 2)),
    ("certify", "--against"): TABLE,
    ("compare", "--ids"): (("x", 2), ("", 2), ("-1", 3), ("1.5", 2), (HUGE, 3), ("97", 3)),
}
"""The same where a command differs from the others."""

LINES: dict[str, tuple[str, ...]] = {
    "generate": ("--ids", "1,2", "--max-new-tokens", "2", "--experts", "eager"),
    "compare": ("--ids", "1,2", "--check", "none", "--against", "none", "--experts", "eager"),
    "doctor": ("--json",),
    "quantize": ("--group", "32"),
}
"""What commands are given besides, so that the wrong value is all that is wrong."""
INSTEAD: dict[tuple[str, str], tuple[str, ...]] = {
    ("generate", "--prompt"): (), ("generate", "--prompts"): (), ("generate", "--ids"): (),
    ("generate", "--experts"): ("--ids", "1"), ("generate", "--import"): ("--ids", "1"),
    ("generate", "--gpu-experts"): ("--ids", "1"),
    ("generate", "--expert-counts"): ("--ids", "1", "--gpu-experts", "2"),
    ("compare", "--ids"): ("--against", "none", "--check", "none", "--experts", "eager"),
    ("compare", "--prompt"): ("--against", "none", "--experts", "eager"),
    ("compare", "--prompts"): ("--against", "none", "--experts", "eager"),
    ("compare", "--table"): ("--ids", "1,2", "--check", "none", "--against", "none"),
    ("compare", "--experts"): ("--ids", "1,2", "--check", "none", "--against", "none"),
    ("compare", "--against"): ("--ids", "1,2", "--check", "none"),
    ("compare", "--check"): ("--ids", "1,2"), ("compare", "--gpu-experts"): ("--ids", "1,2"),
    ("quantize", "--calibration"): (), ("quantize", "--group"): (),
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, str]] = {
    "generate": {"folder": "checkpoint"}, "compare": {"folder": "checkpoint"},
    "quantize": {"folder": "checkpoint", "out": "written"}, "demo": {},
    "cache coverage": {"model": SPEC, "source": "table.db"},
}  # fmt: skip


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")}
    return {**found, "cache coverage": group.commands["cache"].commands["coverage"]}


PARAMETERS = [(name, parameter) for name, command in _commands().items() for parameter in command.params]
VALUED = [(name, found.opts[0]) for name, found in PARAMETERS if not getattr(found, "is_flag", False)]
FLAGS = [(name, found.opts[0]) for name, found in PARAMETERS if getattr(found, "is_flag", False)]


def _cases(command: str, option: str) -> Cases:
    return OF_COMMAND.get((command, option)) or OPTIONS.get(option) or ()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / FOLDER).mkdir()
    (folder / LOOP).symlink_to(LOOP)
    (folder / EMPTY).touch()
    (folder / GARBAGE).write_bytes(bytes(range(256)) * 40)
    for name, text in ((BROKEN, '{"a": '), (LIST, "[]"), (DEEP, "[" * 100_000)):
        (folder / name).write_text(text)
    save_tiny("mixtral", folder / "checkpoint", num_hidden_layers=1, intermediate_size=64)
    export_table(table_of(), folder / "table.db")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files of every broken kind, that a command must leave as it is."""
    monkeypatch.chdir(made)
    before = _listed(made)
    handler = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE_S)
    try:
        yield made
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert _listed(made) == before


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a command went to work on what it cannot take, for more than {PATIENCE_S} s")


def _listed(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


def _line(command: str, option: str, value: str | None) -> list[str]:
    """Return a command line that is sound but for one value; None leaves out the value."""
    arguments = {**ARGUMENTS.get(command, {"model": SPEC})}
    if option == "--layer" or (command == "tune" and option == "--from-record"):
        arguments.pop("model", None)
    others = INSTEAD.get((command, option), LINES.get(command, ()))
    if option in arguments:
        arguments[option] = value or ""
        return [*command.split(), *others, "--", *arguments.values()]
    given = [] if option == "nothing" else [option] if value is None else [f"{option}={value}"]
    return [*command.split(), *arguments.values(), *others, *given]


def _told(done: Done, code: int) -> None:
    """Check that the last line of standard error, and no other, is the error's."""
    *remarks, last = done.err.splitlines() or [""]
    assert done.code == code, (done.code, done.out[:200], done.err[-500:])
    assert not done.out.strip() or done.out.startswith("\n1. Tune")  # demo's first heading
    assert last.startswith("tilecast: ") and len(last) < 1200, done.err[-2000:]
    assert not last.startswith("tilecast: unexpected") and "Traceback" not in done.err and not last.endswith(": ")
    assert not [line for line in remarks if line.startswith("tilecast: ")], remarks


def test_every_option_has_values_that_it_does_not_take() -> None:
    lacking = [f"{command} {option}" for command, option in VALUED if not _cases(command, option)]
    assert not lacking, f"give wrong values for {lacking} in OPTIONS"
    assert set(OPTIONS) <= {option for _, option in VALUED}
    assert set(OF_COMMAND) | set(INSTEAD) <= set(VALUED)


@pytest.mark.parametrize(("command", "option"), VALUED, ids=map(" ".join, VALUED))
def test_wrong_values_are_told_in_one_line(cli: Command, here: Path, command: str, option: str) -> None:
    for value, code in _cases(command, option)[:2]:
        _told(cli(*_line(command, option, value)), code)


@pytest.mark.long
@pytest.mark.parametrize(("command", "option"), VALUED, ids=map(" ".join, VALUED))
def test_all_wrong_values_are_told_in_one_line(cli: Command, here: Path, command: str, option: str) -> None:
    for value, code in _cases(command, option)[2:]:
        _told(cli(*_line(command, option, value)), code)


@pytest.mark.parametrize(("command", "option"), [*VALUED, *FLAGS])
def test_options_without_a_value_and_flags_with_one_are_told(cli: Command, command: str, option: str) -> None:
    if option.startswith("--"):
        _told(cli(*_line(command, option, "yes" if (command, option) in FLAGS else None)), 2)


@pytest.mark.parametrize("command", _commands())
def test_unknown_options_and_arguments_too_many_are_told(cli: Command, here: Path, command: str) -> None:
    _told(cli(*_line(command, "--no-such-option", "1")), 2)
    _told(cli(*_line(command, "nothing", None), "one", "two", "three"), 2)


# Pairs, checkpoints ------------------------------------------------------------------------------------------------

PAIRS = [
    (2, ["tune", SPEC, "--gpu-experts", "2", "--tp", "2"], "--gpu-experts"),
    (2, ["bench", SPEC, "--layer", SPEC], "--layer"),
    (2, ["certify", SPEC, "--update"], "--update"),
    (2, ["generate", "checkpoint", "--ids", "1", "--prompts", EMPTY], "--prompts"),
    (2, ["generate", "checkpoint", "--ids", "1", "--greedy", "--temperature", "1"], "--greedy"),
    (2, ["generate", "checkpoint", "--ids", "1", "--reproducible", "--policy", "fastest"], "--reproducible"),
    (2, ["generate", "checkpoint", "--ids", "1", "--expert-counts", EMPTY], "--expert-counts"),
    (2, ["generate", "checkpoint", "--ids", "1", "--tp", "2", "--ep", "2"], "one way or the other"),
    (2, ["compare", "checkpoint", "--ids", "1", "--against", "none", "--expect", "close"], "no reference"),
    (2, ["compare", "checkpoint", "--ids", "1", "--check", "order", "--expect", "batch"], "batch"),
    (2, ["quantize", "checkpoint", "written", "--format", "fp8", "--group", "32"], "--group"),
    (2, ["quantize", "checkpoint", "written", "--format", "fp8", "--calibration", EMPTY], "--calibration"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "line", "word"), PAIRS, ids=[" ".join(line)[:70] for _, line, _ in PAIRS])
def test_what_does_not_go_together_is_told(cli: Command, here: Path, code: int, line: list[str], word: str) -> None:
    done = cli(*line)
    _told(done, code)
    assert word in done.err.splitlines()[-1]


def _weights(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def _cut_weights(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).write_bytes(data[: len(data) // 2])


def _changed_header(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


def _no_header(folder: Path) -> None:
    _weights(folder).write_bytes(bytes(range(256)))


def _changed_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut off": _cut_weights,
    "a header of a size that no file has": _changed_header,
    "no header": _no_header,
    "empty weights": lambda folder: _weights(folder).write_bytes(b""),
    "no weights": lambda folder: _weights(folder).unlink(),
    "weights that are a folder": lambda folder: (_weights(folder).unlink(), (folder / "model.safetensors").mkdir())[1],
    "an index of what is not there": lambda folder: (
        _weights(folder).rename(folder / "other.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}'),
    )[0],
    "an index that leads out of the folder": lambda folder: (
        _weights(folder).rename(folder / "other.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../table.db"}}'),
    )[0],
    "a broken config": lambda folder: (folder / "config.json").write_text('{"a": ') and None,
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[]") and None,
    "a config without a bottom": lambda folder: (folder / "config.json").write_text("[" * 100_000) and None,
}
CONFIG_VALUES: dict[str, Callable[[Path], None]] = {
    "a config of an unknown family": _changed_config(model_type="nothing", architectures=["Nothing"]),
    "other sizes than the weights'": _changed_config(hidden_size=128),
    "sizes that are words": _changed_config(hidden_size="wide"),
    "negative sizes": _changed_config(hidden_size=-64),
    "huge sizes": _changed_config(num_local_experts=10**12),
    "a dtype that there is not": _changed_config(dtype="float7", torch_dtype="float7"),
}
"""Damages that `quantize` copies: it goes by the weights, which say their own sizes and dtypes."""


@pytest.mark.parametrize("damage", [*DAMAGES, *CONFIG_VALUES])
def test_a_damaged_checkpoint_is_told_by_all_that_read_it(
    cli: Command, made: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made / "checkpoint", folder)
    {**DAMAGES, **CONFIG_VALUES}[damage](folder)
    before = _listed(tmp_path)
    _told(cli("generate", folder, "--ids", "1", "--experts", "eager"), 3)
    _told(cli("compare", folder, "--ids", "1", "--against", "none", "--check", "none"), 3)
    if damage not in CONFIG_VALUES:
        _told(cli("quantize", folder, tmp_path / "written", "--group", "32"), 3)
    assert _listed(tmp_path) == before


# Ctrl-C and closed pipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", _commands())
@pytest.mark.parametrize(
    ("error", "code", "text"), [(KeyboardInterrupt, 130, "tilecast: interrupted\n"), (BrokenPipeError, 141, "")]
)
def test_ctrl_c_and_closed_pipes_end_every_command_alike(
    cli: Command, here: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: type[BaseException], code: int,
    text: str,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(_output.Output, "__init__", fail)
    done = cli(*_line(command, "nothing", None))
    assert (done.code, done.out, done.err) == (code, "", text)
