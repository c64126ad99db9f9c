"""What commands that compute have in common: threads, ranks, and tuning with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    with resumable("measurements made"), group.guard(), output.progress("tuning") as reporter:
        store = open_store(where) if group.rank == 0 else None
        try:
            return tune_together(
                plan, store, group, search=search, budget_s=budget_s, fresh=fresh, progress=report_tuning(reporter)
            )
        finally:
            if store is not None:
                store.close()


def report_tuning(reporter: Reporter) -> Callable[[Progress], None]:
    """Return the tuner's progress callback that shows its events on `reporter`."""

    def report(event: Progress) -> None:
        best = "" if event.best_us is None else f", best {microseconds(event.best_us)} µs"
        reporter.update(
            done=event.fraction,
            total=1.0,
            text=f"{event.task + 1} of {event.tasks}: {event.label}, round {event.round + 1}, "
            f"{plural(event.alive, 'config')}{best}",
            remaining_s=event.remaining_s,
        )

    return report
