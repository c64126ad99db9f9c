"""What commands that compute have in common: threads, ranks, and tuning with progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tilecast.cli._exit import resumable
from tilecast.cli._output import Output, Reporter, microseconds, plural
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer

if TYPE_CHECKING:
    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.autotune.tuner import Progress
    from tilecast.engine.group import Group
    from tilecast.engine.tuning import Search
    from tilecast.environment import Environment


def use_threads(threads: int | None) -> int:
    """Set torch's thread count, if one is given, before anything asks for it, and return what is used.

    Raises UsageError for more threads than cores: they would only wait for one another.
    """
    import os

    import torch

    cores = os.cpu_count() or 1
    if threads is not None:
        if threads > cores:
            raise UsageError(f"--threads is {threads}, expected at most {cores}, the cores of this machine")
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def launched_rank() -> int:
    """Return this process's rank, 0 without a launcher. Raises UsageError for a broken launcher environment."""
    from tilecast.settings import launcher

    started = launcher()
    return 0 if started is None else started.rank


class _Notes(logging.Handler):
    """Shows what is logged, such as which table runs the experts, as remarks of the command."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        show = self._output.warn if record.levelno >= logging.WARNING else self._output.note
        show(record.getMessage())


@contextmanager
def logged(output: Output, level: int = logging.INFO) -> Iterator[None]:
    """Show what is logged from `level` on as remarks of the command, warnings marked as such."""
    log, handler = logging.getLogger("tilecast"), _Notes(output)
    handler.setLevel(level)
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def tune_layers(
    layers: Iterable[ExpertLayer],
    tokens: tuple[int, ...],
    *,
    policy: str,
    where: str,
    group: Group,
    output: Output,
    routing: RoutingProfile | None = None,
    search: Search | None = None,
    budget_s: float | None = None,
    fresh: bool = False,
    on: Environment | None = None,
) -> TuningTable:
    """Tune layers on all ranks of `group`, on the device of `on` (by default the current GPU or the CPU), keeping
    measurements in the store at `where`, with a progress bar.

    Raises what the tuner raises, and Interrupted on Ctrl-C.
    """
    from tilecast import environment
    from tilecast.autotune.plan import make_plan
    from tilecast.cache_store.store import open_store
    from tilecast.engine.tuning import tune_together

    plan = make_plan(layers, tokens, on or environment.here(), policy=policy, routing=routing or "uniform")
    with resumable("measurements made"), group.guard(), reported_tuning(output) as progress:
        store = open_store(where) if group.rank == 0 else None
        try:
            return tune_together(plan, store, group, search=search, budget_s=budget_s, fresh=fresh, progress=progress)
        finally:
            if store is not None:
                store.close()


@contextmanager
def reported_tuning(output: Output) -> Iterator[Callable[[Progress], None]]:
    """Show a tuning: yields the tuner's progress callback, and says at the end what a budget cut short."""
    cut: dict[str, int] = {}
    with output.progress("tuning") as reporter:
        yield _reporting(reporter, cut)
    early = sum(count > 0 for count in cut.values())
    if early:
        output.note(
            f"the budget ended the search early for {early} of {plural(len(cut), 'GEMM and token count', TASKS)}; "
            f"the same command goes on from here"
        )


TASKS = "GEMMs and token counts"


def _reporting(reporter: Reporter, cut: dict[str, int]) -> Callable[[Progress], None]:
    """Return a progress callback that shows events on `reporter`, and notes in `cut` what the budget left out."""

    def report(event: Progress) -> None:
        cut[event.label] = event.cut
        best = "" if event.best_us is None else f", best {microseconds(event.best_us)} µs"
        reporter.update(
            done=event.fraction,
            total=1.0,
            text=f"{event.task + 1} of {event.tasks}: {event.label}, round {event.round + 1}, "
            f"{plural(event.alive, 'config')}{best}",
            remaining_s=event.remaining_s,
        )

    return report
