"""Tables of decisions, as `tune`, `cache show` and `demo` print them, and their JSON form."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from tilecast.canonical import Json
from tilecast.cli._output import add_row, microseconds, percent, ratio, table
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.problem import ExpertLayer, TileConfig

TIMES = ("tokens", "GEMM", "default µs", "tuned µs", "speed-up", "runner-up", "noise")
CONFIGS = ("tokens", "GEMM", "class", "config")

Series = tuple[str, ExpertLayer, str, str]
"""What decisions shown in one table have in common: environment, layer, policy and certificate."""


def span(decision: Decision) -> str:
    """Write the token counts a decision covers: `5–16`, `1`."""
    bucket = decision.bucket
    low = bucket.above + 1
    return str(low) if low == bucket.tokens else f"{low}–{bucket.tokens}"


def span_text(decision: Decision) -> str:
    """Write the token counts a decision covers, with their noun: `5–16 tokens`, `1 token`."""
    return f"{span(decision)} {'token' if decision.bucket.tokens == 1 else 'tokens'}"


def config_text(config: TileConfig, *, kernel: bool = True) -> str:
    """Write a config for reading: without the parameters that are 0, which is off or no bound in every kernel."""
    parts = [config.kernel] if kernel else []
    return " ".join([*parts, *(f"{name}={value}" for name, value in config.params if value != 0)])


def decision_tables(decisions: Iterable[Decision]) -> list[Table]:
    """Return two tables for each series of buckets: the times, and the configs."""
    groups: dict[Series, list[Decision]] = {}
    for d in decisions:
        groups.setdefault((d.environment, d.layer, d.policy, d.certificate), []).append(d)
    environments = len({environment for environment, *_ in groups})
    tables = []
    for (environment, layer, policy, certificate), group in groups.items():
        title = f"{layer.label}, {policy}, certificate: {certificate}"
        title += f", environment {environment[:12]}" if environments > 1 else ""
        tables += [_times(title, group), _configs(layer.label, group)]
    return tables


def _times(title: str, decisions: list[Decision]) -> Table:
    """Return three rows per bucket: up, down and both."""
    result = table(title, TIMES, left=("GEMM",))
    for decision in decisions:
        for name, choice in (("up", decision.up), ("down", decision.down)):
            add_row(result, span(decision) if name == "up" else "", name, *_choice_cells(choice))
        speed = ratio(decision.default_us / decision.tuned_us)
        add_row(
            result, "", "both", microseconds(decision.default_us), microseconds(decision.tuned_us), speed,
            "", "", style="bold", end_section=True,
        )  # fmt: skip
    return result


def _configs(label: str, decisions: list[Decision]) -> Table:
    choices = [(d, name, choice) for d in decisions for name, choice in (("up", d.up), ("down", d.down))]
    kernels = {choice.config.kernel for _, _, choice in choices}
    of = f" of {kernels.pop()}" if len(kernels) == 1 else ""
    result = table(f"{label}: configs{of}", CONFIGS, left=("GEMM", "class", "config"))
    for decision, name, choice in choices:
        up, config = name == "up", config_text(choice.config, kernel=not of)
        add_row(result, span(decision) if up else "", name, choice.numerics[:8], config, end_section=not up)
    return result


def _choice_cells(choice: Choice) -> tuple[str, ...]:
    return (
        microseconds(choice.default_us),
        microseconds(choice.p50_us),
        "default" if choice.config == choice.default else ratio(choice.default_us / choice.p50_us),
        percent(choice.margin, sign=True),
        percent(choice.noise),
    )


def decision_json(decision: Decision) -> dict[str, Json]:
    """Return a decision with the figures that people ask for computed."""
    return {
        "layer": decision.layer.label,
        "layer_digest": decision.layer.digest,
        "above": decision.bucket.above,
        "tokens": decision.bucket.tokens,
        "environment": decision.environment,
        "policy": decision.policy,
        "routing": decision.routing,
        "certificate": decision.certificate,
        "default_us": decision.default_us,
        "tuned_us": decision.tuned_us,
        "speed_up": decision.default_us / decision.tuned_us,
        "up": _choice_json(decision.up),
        "down": _choice_json(decision.down),
    }


def _choice_json(choice: Choice) -> dict[str, Json]:
    return {
        **choice.to_json(),
        "speed_up": choice.default_us / choice.p50_us,
        "margin": choice.margin,
        "kept_default": choice.config == choice.default,
    }


def table_json(of: TuningTable) -> dict[str, Json]:
    """Return a table's facts and decisions."""
    return {
        "digest": of.digest,
        "environments": [{"digest": e.digest, **e.to_json()} for e in of.environments],
        "decisions": [decision_json(decision) for decision in of.decisions],
    }


def weak(decisions: Iterable[Decision]) -> list[Decision]:
    """Return the `reproducible` decisions whose numerics class was not checked on the device itself."""
    return [d for d in decisions if d.policy == "reproducible" and d.certificate != "hardware"]
