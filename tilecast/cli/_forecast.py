"""`tilecast tune --dry-run`: what a tuning would measure, and how long it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tilecast.canonical import Json
from tilecast.cli._output import Output, duration, plural
from tilecast.environment import Environment
from tilecast.problem import ExpertLayer

if TYPE_CHECKING:
    from tilecast.autotune.forecast import TaskForecast
    from tilecast.autotune.rank import CostModel
    from tilecast.autotune.routing_profiles import RoutingProfile
    from tilecast.engine.tuning import Search


def report_forecast(
    output: Output,
    parts: Sequence[tuple[Environment, Mapping[ExpertLayer, tuple[int, ...]]]],
    *,
    policy: str,
    profile: RoutingProfile | None,
    search: Search,
    folder: Path,
) -> None:
    """Print the forecast for layers and their token counts on each device. Raises DeviceError where nothing runs."""
    from tilecast.autotune.rank import CostModel
    from tilecast.autotune.tools import limits_for_forecast
    from tilecast.kernels import registry

    tasks: list[TaskForecast] = []
    more_s, calibrations = 0.0, []
    for here, wanted in parts:
        model = CostModel(here, limits_for_forecast(here, registry, folder=folder))
        found, besides_s = _forecast(model, wanted, policy=policy, profile=profile, search=search)
        calibrations.append(model.calibration)
        tasks, more_s = tasks + found, more_s + besides_s
    total_s = sum(task.seconds for task in tasks) + more_s
    document: dict[str, Json] = {
        "command": "tune", "dry_run": True, "effort": search.effort, "policy": policy, "seconds": total_s,
        "calibration": calibrations[0].to_json(), "tasks": [_to_json(task) for task in tasks],
    }  # fmt: skip
    output.emit(document)
    output.show(_table(tasks))
    output.show(
        f"{plural(len(tasks), 'task')}, {plural(sum(task.started for task in tasks), 'config')} checked, "
        f"{plural(sum(task.samples for task in tasks), 'sample')}: about {duration(total_s)} "
        f"({calibrations[0].source} limits of {', '.join(here.device for here, _ in parts)})"
    )


def _forecast(
    model: CostModel,
    wanted: Mapping[ExpertLayer, tuple[int, ...]],
    *,
    policy: str,
    profile: RoutingProfile | None,
    search: Search,
) -> tuple[list[TaskForecast], float]:
    """Return what would be measured on one device, and the seconds besides."""
    from tilecast.autotune.forecast import forecast, overhead_s
    from tilecast.autotune.plan import make_plan
    from tilecast.autotune.rank import ModelRanker
    from tilecast.cache_store.memory import MemoryStore
    from tilecast.kernels import registry

    tasks: list[TaskForecast] = []
    more_s = 0.0
    by_tokens: dict[tuple[int, ...], list[ExpertLayer]] = {}
    for layer, counts in wanted.items():
        by_tokens.setdefault(counts, []).append(layer)
    for counts, layers in by_tokens.items():
        plan = make_plan(layers, counts, model.environment, policy=policy, routing=profile or "uniform")
        ranker = ModelRanker(model, registry, plan.routing_profile)
        tasks += forecast(plan, MemoryStore(), registry, ranker, search.effort, seed=search.seed)
        more_s += overhead_s(plan, ranker)
    return tasks, more_s


def _to_json(task: TaskForecast) -> Json:
    return {
        "layer": task.gemm.layer.to_json(), "gemm": task.gemm.name, "tokens": task.tokens, "space": task.space,
        "valid": task.valid, "eligible": task.eligible, "started": task.started, "samples": task.samples,
        "seconds": task.seconds,
    }  # fmt: skip


def _table(tasks: list[TaskForecast]) -> Table:
    table = Table(title="What would be measured", title_justify="left")
    for name in ("layer", "GEMM"):
        table.add_column(name)
    for name in ("tokens", "proposed", "valid", "eligible", "start", "samples", "time"):
        table.add_column(name, justify="right")
    for task in tasks:
        table.add_row(
            task.gemm.layer.label, task.gemm.name, *map(str, (task.tokens, task.space, task.valid, task.eligible)),
            str(task.started), str(task.samples), duration(task.seconds),
        )  # fmt: skip
    return table
