"""The command line: one command a file. `main` runs it and maps errors to exit codes."""

from tilecast.cli.app import main

__all__ = ["main"]
