"""What the commands print: results to standard output, progress and notes to standard error.

With `--json`, standard output gets exactly one JSON document. Ranks above 0 print nothing but errors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tilecast.canonical import Json

PIPE_WIDTH = 160
"""Columns of tables where standard output is no terminal."""
JSON_LEVELS = 4
"""Objects and lists within each other that are indented: the fields of a document, its entries, and their fields."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to the boundary in `_exit`."""
        raise BrokenPipeError


class Reporter(Protocol):
    """Where a long piece of work says how far it is."""

    def update(self, *, done: float, total: float, text: str, remaining_s: float | None) -> None:
        """Show that `done` of `total` is behind us; `remaining_s` is the expected rest in seconds."""
        ...


class Output:
    """One command's output."""

    def __init__(self, *, json_wanted: bool = False, rank: int = 0) -> None:
        """Print tables, or with `json_wanted` one JSON document; nothing at all on ranks above 0."""
        self.json_wanted = json_wanted
        self.quiet = rank != 0
        self._out = _console(sys.stdout)
        self._notes = _console(sys.stderr)

    def emit(self, document: Json) -> None:
        """Write the one JSON document, where JSON is wanted."""
        if self.json_wanted and not self.quiet:
            sys.stdout.write(json_text(document))
            sys.stdout.flush()

    def show(self, *things: Table | str) -> None:
        """Print tables and lines, where people read the result. Strings are taken literally."""
        if self.json_wanted or self.quiet:
            return
        for thing in things:
            if isinstance(thing, Table) and thing.title:
                # Rich would fold a title to the width of its table.
                self._out.print(f"\n[bold]{thing.title}[/bold]", highlight=False)
                thing.title = None
            self._out.print(escape(thing) if isinstance(thing, str) else thing, highlight=False)

    def line(self, text: str) -> None:
        """Print one line of a list, never folded, so that other programs can read it by lines."""
        if not (self.json_wanted or self.quiet):
            self._out.print(escape(text), highlight=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Print a line that starts a part of the result."""
        if not (self.json_wanted or self.quiet):
            self._out.print(f"\n[bold]{escape(text)}[/bold]", highlight=False)

    def note(self, text: str) -> None:
        """Write a remark to standard error."""
        if not self.quiet:
            self._notes.print(escape(text), highlight=False, style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write a remark that nobody should miss to standard error."""
        if not self.quiet:
            self._notes.print(f"[bold yellow]warning:[/bold yellow] {escape(text)}", highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Reporter]:
        """Show a progress bar on a terminal, and now and then a line elsewhere; gone or complete afterwards."""
        if self.quiet:
            yield _Silent()
        elif self._notes.is_terminal:
            with _Bar(self._notes, title) as bar:
                yield bar
        else:
            yield _Lines(self, title)


class _Silent:
    def update(self, *, done: float, total: float, text: str, remaining_s: float | None) -> None:
        pass


class _Lines:
    """Progress for logs: a line for each tenth of the work, and one a minute where a tenth takes longer."""

    STEPS = 10
    EVERY_S = 60.0

    def __init__(self, output: Output, title: str) -> None:
        self._output = output
        self._title = title
        self._step = -1
        self._next = 0.0

    def update(self, *, done: float, total: float, text: str, remaining_s: float | None) -> None:
        now = time.monotonic()
        share = done / total if total else 1.0
        step = int(self.STEPS * share)
        if step == self._step and now < self._next:
            return
        self._step, self._next = step, now + self.EVERY_S
        self._output.note(f"{self._title}: {100 * share:3.0f}% {text}{_rest(remaining_s)}")


class _BarAbove(Progress):
    """A bar with a line of its own below it for what is being done: in one line the text would push the bar out."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['text']}", style="dim", no_wrap=True, overflow="ellipsis")


class _Bar:
    def __init__(self, console: Console, title: str) -> None:
        self._progress = _BarAbove(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rest]}"),
            console=console,
            transient=True,
            refresh_per_second=2,  # a renderer thread that wakes often would disturb what is being timed
        )
        self._task = self._progress.add_task(title, total=None, text="", rest="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, *, done: float, total: float, text: str, remaining_s: float | None) -> None:
        self._progress.update(self._task, completed=done, total=total, text=text, rest=_rest(remaining_s).strip(" ,"))


def _rest(remaining_s: float | None) -> str:
    return "" if remaining_s is None else f", {duration(remaining_s)} left"


def _console(stream: TextIO) -> Console:
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    # The stream is looked up at each use by Rich only if none is given, which is not wanted for captured output.
    return _Console(file=stream, width=None if terminal else PIPE_WIDTH)


def table(title: str, columns: Iterable[str], *, left: Iterable[str] = ()) -> Table:
    """Return an empty table. Columns are right-aligned but for those named in `left`; `left` ones may fold."""
    result = Table(title=escape(title) or None, header_style="bold")
    folding = set(left)
    for name in columns:
        if name in folding:
            result.add_column(name, justify="left", overflow="fold")
        else:
            result.add_column(name, justify="right", no_wrap=True)
    return result


def json_text(document: Json) -> str:
    """Write the JSON document of a command."""
    return _indented(document, "\n", JSON_LEVELS) + "\n"


def _indented(value: Json, newline: str, levels: int) -> str:
    """Write what is deep in one line, shorter to read: indenting makes Python's encoder ten times slower."""
    if levels == 0 or not value or isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return _ENCODER.encode(value)
    inner = newline + "  "
    if isinstance(value, Mapping):
        parts = [f"{_ENCODER.encode(key)}: {_indented(entry, inner, levels - 1)}" for key, entry in value.items()]
        return f"{{{inner}{f',{inner}'.join(parts)}{newline}}}"
    return f"[{inner}{f',{inner}'.join(_indented(entry, inner, levels - 1) for entry in value)}{newline}]"


def add_row(into: Table, *cells: str, style: str | None = None, end_section: bool = False) -> None:
    """Add a row of literal texts."""
    into.add_row(*(escape(cell) for cell in cells), style=style, end_section=end_section)


def microseconds(value: float | None) -> str:
    """Write a time given in µs with at least three significant digits; `—` for None."""
    if value is None:
        return "—"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """Write a speed-up such as `1.37×`; `—` for None."""
    return "—" if value is None else f"{value:.2f}×"


def percent(value: float | None, *, sign: bool = False) -> str:
    """Write a fraction as a percentage; `—` for None."""
    return "—" if value is None else f"{100 * value:{'+' if sign else ''}.1f}%"


def duration(seconds: float) -> str:
    """Write a time span in words short enough for a progress bar: `45 s`, `3 min 05 s`, `1 h 02 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(count: int, noun: str, many: str = "") -> str:
    """Write a count with its noun: `1 decision`, `3 decisions`."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"
