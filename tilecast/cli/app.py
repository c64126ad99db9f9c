"""The `tilecast` application: its commands, its global options and `main`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tilecast._version import VERSION
from tilecast.cli import (
    bench,
    cache_coverage,
    cache_diff,
    cache_explain,
    cache_export,
    cache_gc,
    cache_import,
    cache_lint,
    cache_merge,
    cache_show,
    cache_verify,
    certify,
    check,
    compare,
    demo,
    doctor,
    generate,
    prescreen,
    quantize,
    tune,
)
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


class _Commands(TyperGroup):
    """The group of all commands, with one boundary for every error."""

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


_COMMANDS: tuple[tuple[typer.Typer, str, Callable[..., None]], ...] = (
    (app, "tune", tune.tune),
    (app, "bench", bench.bench),
    (app, "doctor", doctor.doctor),
    (app, "check", check.check),
    (app, "generate", generate.generate),
    (app, "prescreen", prescreen.prescreen),
    (app, "certify", certify.certify),
    (app, "compare", compare.compare),
    (app, "quantize", quantize.quantize),
    (app, "demo", demo.demo),
    (_cache, "show", cache_show.show),
    (_cache, "explain", cache_explain.explain),
    (_cache, "export", cache_export.export),
    (_cache, "import", cache_import.import_),
    (_cache, "merge", cache_merge.merge),
    (_cache, "diff", cache_diff.diff),
    (_cache, "coverage", cache_coverage.coverage),
    (_cache, "verify", cache_verify.verify),
    (_cache, "gc", cache_gc.gc),
    (_cache, "lint", cache_lint.lint),
)
for _group, _name, _command in _COMMANDS:
    _group.command(_name, help=_help_of(_command))(_command)
app.add_typer(_cache, name="cache")


def main() -> None:
    """Run the command line of this process and exit with its code."""
    app(prog_name="tilecast")
