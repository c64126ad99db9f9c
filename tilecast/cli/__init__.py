"""The command line: one command a file. `main` runs it and maps errors to exit codes."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its code; Ctrl-C is one line from the first import on."""
    try:
        from tilecast.cli.app import main as run
    except KeyboardInterrupt:
        from tilecast.cli._exit import ExitCode, complain

        complain("interrupted")
        raise SystemExit(ExitCode.INTERRUPTED) from None
    run()
