"""The `tilecast` application: its commands, its global options and `main`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tilecast._version import VERSION
from tilecast.cli._exit import guarded, quiet_broken_pipe

_HELP = (
    "Tune the expert GEMMs of Mixture-of-Experts models before deploy and run them with reproducible bits.\n\n"
    "Start with [bold]tilecast tune mixtral-8x7b --tp 8 --export mixtral.db[/bold], then serve with "
    "[bold]TM_GEMM_IMPORT=mixtral.db[/bold]."
)
_EPILOG = (
    "Exit codes: 0 done · 1 unexpected failure · 2 usage · 3 bad input · 4 coverage gap or stale table · "
    "5 ranks disagree · 6 nothing usable on this device"
)


_COMMANDS = {
    "tune": "tilecast.cli.tune",
    "bench": "tilecast.cli.bench",
    "doctor": "tilecast.cli.doctor",
    "check": "tilecast.cli.check",
    "generate": "tilecast.cli.generate",
    "prescreen": "tilecast.cli.prescreen",
    "certify": "tilecast.cli.certify",
    "compare": "tilecast.cli.compare",
    "quantize": "tilecast.cli.quantize",
    "demo": "tilecast.cli.demo",
}
"""Commands, in the order of the help, with the modules whose functions of the same names they are."""
_CACHE_COMMANDS = {
    "show": "tilecast.cli.cache_show",
    "explain": "tilecast.cli.cache_explain",
    "export": "tilecast.cli.cache_export",
    "import": "tilecast.cli.cache_import",
    "merge": "tilecast.cli.cache_merge",
    "diff": "tilecast.cli.cache_diff",
    "coverage": "tilecast.cli.cache_coverage",
    "verify": "tilecast.cli.cache_verify",
    "gc": "tilecast.cli.cache_gc",
    "lint": "tilecast.cli.cache_lint",
}


class _Lazy(MutableMapping[str, Any]):
    """Commands by name, each imported and built when it is first asked for: one starts without all the others."""

    def __init__(self, build: dict[str, Callable[[], Any]]) -> None:
        """Take what builds each command."""
        self._build = build
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return a command."""
        if name not in self._built:
            self._built[name] = self._build[name]()
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a command, without building it."""
        return name in self._build

    def __setitem__(self, name: str, command: Any) -> None:
        """Put a command in."""
        self._build[name] = lambda: command
        self._built.pop(name, None)

    def __delitem__(self, name: str) -> None:
        """Take a command out."""
        del self._build[name]
        self._built.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of the help."""
        return iter(self._build)

    def __len__(self) -> int:
        """Return how many commands there are."""
        return len(self._build)


def _of_modules(modules: dict[str, str]) -> dict[str, Callable[[], Any]]:
    return {name: partial(_command, name, module) for name, module in modules.items()}


def _command(name: str, module: str) -> Any:
    # A name that Python keeps for itself has an underscore behind it there.
    commands = vars(import_module(module))
    function = commands[name] if name in commands else commands[f"{name}_"]
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name, help=_help_of(function))(function)
    return typer.main.get_command(alone)


class _CacheCommands(TyperGroup):
    """The group of the commands on tables."""

    def __init__(self, **given: Any) -> None:
        """Make the group with its commands."""
        super().__init__(**given)
        self.commands = _Lazy(_of_modules(_CACHE_COMMANDS))


class _Commands(TyperGroup):
    """The group of all commands, with one boundary for every error."""

    def __init__(self, **given: Any) -> None:
        """Make the group with its commands."""
        super().__init__(**given)
        self.commands = _Lazy({**_of_modules(_COMMANDS), "cache": lambda: typer.main.get_command(_cache)})

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse and run; exit with the code, or return it unless standalone."""
        given = list(sys.argv[1:] if args is None else args)
        # Taken out here, so that it may stand anywhere, also behind the command.
        debug = "--debug" in given
        given = [argument for argument in given if argument != "--debug"]
        parse_and_run = super().main
        code = guarded(
            lambda: parse_and_run(
                given, prog_name, complete_var, standalone_mode=False, windows_expand_args=windows_expand_args, **extra
            ),
            debug=debug,
        )
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a closed pipe is met here, before Typer makes a failure of it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(quiet_broken_pipe()) from None


def _help_of(command: Callable[..., None]) -> str:
    """Return a command's docstring with the lines of each paragraph joined; indented examples stay as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs)


app = typer.Typer(
    cls=_Commands,
    name="tilecast",
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_cache = typer.Typer(
    cls=_CacheCommands,
    name="cache",
    add_completion=False,
    help="Look into, explain, export and import tuning tables.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilecast {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere in the command.")
    ] = False,
) -> None:
    pass


@_cache.callback()
def _of_cache() -> None:
    pass


def main() -> None:
    """Run the command line of this process and exit with its code."""
    app(prog_name="tilecast")
