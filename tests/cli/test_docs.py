"""The documentation names every command, option, exit code and environment variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from tilecast.cli._exit import ExitCode
from tilecast.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "cli.md").read_text()
GROUP = typer.main.get_command(app)
COMMANDS = {
    **{name: command for name, command in GROUP.commands.items() if name != "cache"},  # type: ignore[attr-defined]
    **{f"cache {name}": command for name, command in GROUP.commands["cache"].commands.items()},  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    start = TEXT.index(f"## tilecast {name}")
    end = TEXT.find("\n## ", start + 1)
    section = TEXT[start : end if end > 0 else None]
    options = [text for parameter in COMMANDS[name].params for text in parameter.opts if text.startswith("--")]
    assert options
    missing = [option for option in options if option != "--help" and f"`{option}" not in section]
    assert not missing


def test_every_exit_code_is_documented() -> None:
    found = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    assert found == set(ExitCode)


def test_every_variable_is_documented() -> None:
    source = (DOCS.parent / "tilecast" / "settings.py").read_text()
    read = set(re.findall(r'"((?:TM_GEMM|TILECAST)_[A-Z_]+)"', source))
    assert read
    assert read == set(re.findall(r"^\| `((?:TM_GEMM|TILECAST)_[A-Z_]+)`", TEXT, re.MULTILINE))


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_quickstart_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    assert len(code) == 1
    small = code[0].replace("8, 4096, 1792, 2, 16", "4, 64, 96, 2, 3")
    assert small != code[0]
    names: dict[str, object] = {}
    exec(small, names)
    assert names["output"].shape == (3, 64)  # type: ignore[attr-defined]
