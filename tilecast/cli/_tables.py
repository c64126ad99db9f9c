"""Tables of decisions, as `tune`, `cache show` and `demo` print them, and their JSON form."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from tilecast.canonical import Json
from tilecast.cli._output import add_row, microseconds, percent, ratio, table
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.problem import ExpertLayer

COLUMNS = ("tokens", "GEMM", "default µs", "tuned µs", "speed-up", "runner-up", "noise", "class", "config")


def span(decision: Decision) -> str:
    """Write the token counts a decision covers: `5–16`, `1`."""
    bucket = decision.bucket
    low = bucket.above + 1
    return str(low) if low == bucket.tokens else f"{low}–{bucket.tokens}"


def by_layer(decisions: Iterable[Decision]) -> dict[ExpertLayer, list[Decision]]:
    """Group decisions by layer, keeping their order."""
    groups: dict[ExpertLayer, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(decision.layer, []).append(decision)
    return groups


def decision_tables(decisions: Iterable[Decision]) -> list[Table]:
    """Return one table per layer, three rows per bucket: up, down and both."""
    return [_layer_table(layer, group) for layer, group in by_layer(decisions).items()]


def _layer_table(layer: ExpertLayer, decisions: list[Decision]) -> Table:
    result = table(layer.label, COLUMNS, left=("GEMM", "config"))
    policies = len({decision.policy for decision in decisions}) > 1
    for decision in decisions:
        for name, choice in (("up", decision.up), ("down", decision.down)):
            add_row(result, span(decision) if name == "up" else "", name, *_choice_cells(choice))
        speed = ratio(decision.default_us / decision.tuned_us)
        facts = f"{decision.policy}, " if policies else ""
        facts += f"certificate: {decision.certificate}"
        add_row(
            result, "", "both", microseconds(decision.default_us), microseconds(decision.tuned_us), speed,
            "", "", "", facts, style="bold", end_section=True,
        )  # fmt: skip
    return result


def _choice_cells(choice: Choice) -> tuple[str, ...]:
    kept = " (default)" if choice.config == choice.default else ""
    return (
        microseconds(choice.default_us),
        microseconds(choice.p50_us),
        ratio(choice.default_us / choice.p50_us),
        percent(choice.margin, sign=True),
        percent(choice.noise),
        choice.numerics[:8],
        choice.config.label + kept,
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
