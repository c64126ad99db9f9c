"""Exit codes, and the one boundary where errors become one line on standard error and a code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum

import typer

from tilecast.errors import (
    AgreementError,
    CoverageError,
    DeviceError,
    InputError,
    TilecastError,
    UsageError,
)

LONGEST_WORD = 300
"""Characters of a word, such as a path, beyond which an error shows its two ends alone."""

_PARSER_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What Typer raises for a bad command line; its home differs between Typer releases, its descendants do not."""


class ExitCode(IntEnum):
    """What the process's exit code means."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    COVERAGE = 4
    AGREEMENT = 5
    DEVICE = 6
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_CODES: tuple[tuple[type[TilecastError], ExitCode], ...] = (
    (UsageError, ExitCode.USAGE),
    (InputError, ExitCode.INPUT),
    (CoverageError, ExitCode.COVERAGE),
    (AgreementError, ExitCode.AGREEMENT),
    (DeviceError, ExitCode.DEVICE),
)


class Interrupted(Exception):
    """Ctrl-C, with a line that says what happens to the work done so far."""


@contextmanager
def resumable(what: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into an `Interrupted` that says `what` is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {what} so far are kept and the same command continues from them") from None


def exit_code(error: TilecastError) -> ExitCode:
    """Return the exit code that an error of the tree stands for."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)


def complain(message: str) -> None:
    """Write `tilecast: <message>` to standard error as one line, of words that a terminal has room for."""
    half = LONGEST_WORD // 2
    words = (w if len(w) <= LONGEST_WORD else f"{w[:half]}…{w[-8:]}" for w in message.split())
    line = " ".join(words) or "failed without a message"
    # A closed standard error must not hide the exit code.
    with suppress(OSError):
        sys.stderr.write(f"tilecast: {line}\n")
        sys.stderr.flush()


def end_process(error: TilecastError) -> None:
    """End a rank that is stuck in a collective after another failed: its main thread cannot."""
    complain(str(error))
    os._exit(exit_code(error))


def guarded(call: Callable[[], object], *, debug: bool) -> int:
    """Run `call`, report whatever it raises as one line and return the exit code.

    With `debug`, errors also show their traceback. Typer's own exits and a returned integer pass through.
    """
    try:
        result = call()
        sys.stdout.flush()
        code = result if isinstance(result, int) else ExitCode.DONE
        if code == ExitCode.INTERRUPTED:  # newer Typers turn Ctrl-C into this code themselves
            complain("interrupted")
        return int(code)
    except BrokenPipeError:
        return quiet_broken_pipe()
    except Interrupted as error:
        complain(str(error))
        return ExitCode.INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return ExitCode.INTERRUPTED
    except typer.Exit as error:
        return error.exit_code
    except TilecastError as error:
        _trace(debug)
        complain(str(error))
        return exit_code(error)
    except _PARSER_ERROR as error:
        return _parser_error(error)
    except Exception as error:
        _trace(debug)
        hint = "" if debug else "; run it with --debug for the traceback"
        complain(f"unexpected {type(error).__name__}: {error}{hint}")
        return ExitCode.UNEXPECTED


def _parser_error(error: BaseException) -> ExitCode:
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
        sys.stderr.write(f"{error}\n")
        return ExitCode.USAGE
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    complain(f"{text.rstrip('.')}{where}")
    return ExitCode.USAGE


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)


def quiet_broken_pipe() -> ExitCode:
    """Point standard output at nothing, so that the last flush does not complain, and return the exit code."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.BROKEN_PIPE
