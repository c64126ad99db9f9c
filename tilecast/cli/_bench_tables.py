"""How `bench` shows what was measured, and its JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.cli._output import Output, add_row, microseconds, percent, plural, ratio, table
from tilecast.cli._tables import config_text
from tilecast.evidence import TuningTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilecast.engine.bench_result import BenchResult, PlacedPoint, Point, Timing
    from tilecast.problem import ExpertLayer


EXCEEDED = "!"
"""Marks a share of a limit that did not hold."""


def bench_json(
    result: BenchResult, *, source: str | None, imported: str, table: TuningTable, tuned: int
) -> dict[str, Json]:
    """Return the JSON document of a benchmark: which table ran, and everything that was measured."""
    return {
        "command": "bench",
        "table": {
            "source": source,
            "imported_digest": imported,
            "digest": table.digest,
            "decisions": len(table),
            "buckets_tuned_now": tuned,
        },
        **result.to_json(),
    }


def show_bench(output: Output, result: BenchResult) -> None:
    """Print times, rates and configs per layer, then the summaries."""
    output.show(
        f"This machine, measured on {plural(result.threads, 'thread')}: reads {result.read_gb_s:.1f} GB/s, "
        f"multiply-adds {result.fma_gflop_s:.0f} GFLOP/s, bf16 dot products {result.dot_bf16_gflop_s:.0f} GFLOP/s"
    )
    layers: dict[ExpertLayer, list[Point]] = {}
    for point in result.points:
        layers.setdefault(point.layer, []).append(point)
    for points in layers.values():
        _show_layer(output, points, result)
    _show_absent(output, result)
    _show_summaries(output, result)


def show_placed(output: Output, result: BenchResult, break_evens: Sequence[str]) -> None:
    """Print for each placement of each layer its times beside those of one device, then from when weights are sent."""
    placements: dict[tuple[str, int], list[tuple[int, PlacedPoint]]] = {}
    for point in result.points:
        for placed in point.placed:
            key = f"{point.layer.label}, {point.policy}", placed.near_experts
            placements.setdefault(key, []).append((point.tokens, placed))
    for (label, near), points in placements.items():
        held = points[0][1]
        shown = table(
            f"{label}: {plural(near, 'expert')} near ({held.near}, {_mib(held.near_bytes)}), the others far "
            f"({held.far}, {_mib(held.far_bytes)}): median µs",
            ("tokens", "one device", "two devices", "near share", "far share", "KiB across"),
        )
        for tokens, placed in points:
            shares = (placed.near_share, placed.far_share)
            add_row(
                shown, str(tokens), _time(placed.alone), f"{_time(placed.both)} ({ratio(placed.ratio)})",
                *map(_time, shares), f"{placed.crossing_bytes / 1024:.1f}",
            )  # fmt: skip
        output.show(shown)
        for timing in dict.fromkeys((t.name, t.detail) for _, placed in points for t in placed.timings if t.detail):
            output.warn(": ".join(timing))
    output.show(*break_evens)


def _time(timing: Timing | None) -> str:
    return "—" if timing is None or timing.p50_us is None else microseconds(timing.p50_us)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _show_layer(output: Output, points: list[Point], result: BenchResult) -> None:
    from tilecast.engine.bench_result import DEFAULT, OURS

    label, policy = points[0].layer.label, points[0].policy
    others = [
        t.name for t in points[0].timings if t.name not in (OURS, DEFAULT) and any(p.p50_us(t.name) for p in points)
    ]
    times = table(
        f"{label}, {policy}: median µs, and Tilecast's speed-up",
        ("tokens", "tilecast", "default", *others),
    )
    rates = table(
        f"{label}, {policy}: rates and their share of this machine's peak",
        ("tokens", "GFLOP/s", "of peak", "GB/s", "of peak", "limit µs", "bound by", "of limit"),
    )
    configs = table(f"{label}, {policy}: configs", ("tokens", "GEMM", "", "config"), left=("GEMM", "", "config"))
    for point in points:
        against = [_against(point, name) for name in (DEFAULT, *others)]
        add_row(times, str(point.tokens), microseconds(point.p50_us()), *against)
        add_row(rates, str(point.tokens), *_rates(point, result))
        origin = "decided" if point.hit else "default"
        add_row(configs, str(point.tokens), "up", origin, config_text(point.up))
        add_row(configs, "", "down", origin, config_text(point.down), end_section=True)
    output.show(times, rates, configs)
    if any(point.limit_exceeded for point in points):
        output.show(f"{EXCEEDED} a contestant beat this limit: a peak was measured too low, so the share says nothing")


def _against(point: Point, name: str) -> str:
    time = point.p50_us(name)
    return "—" if time is None else f"{microseconds(time)} ({ratio(point.speedup(name))})"


def _rates(point: Point, result: BenchResult) -> tuple[str, ...]:
    gflop_s, gb_s = point.gflop_s(), point.gb_s()
    dot = "bf16" in (dict(point.up.params).get("dot"), dict(point.down.params).get("dot"))
    peak = result.dot_bf16_gflop_s if dot else result.fma_gflop_s
    return (
        "—" if gflop_s is None else f"{gflop_s:.1f}",
        percent(None if gflop_s is None else gflop_s / peak),
        "—" if gb_s is None else f"{gb_s:.1f}",
        percent(None if gb_s is None else gb_s / result.read_gb_s),
        microseconds(point.limit_us),
        point.bound,
        percent(point.share()) + (f" {EXCEEDED}" if point.limit_exceeded else ""),
    )


def _show_absent(output: Output, result: BenchResult) -> None:
    """Say, once for each reason, which contestants have no time."""
    reasons: dict[tuple[str, str], Timing] = {}
    for point in result.points:
        for timing in point.timings:
            if timing.status != "ok":
                reasons.setdefault((timing.name, timing.detail), timing)
    for timing in reasons.values():
        report = output.note if timing.status == "unavailable" else output.warn
        report(f"{timing.name}: {timing.status.replace('_', ' ')}: {timing.detail}")


def _show_summaries(output: Output, result: BenchResult) -> None:
    shown = table("Over all points", ("against", "points", "geometric mean", "worst", "at"), left=("against", "at"))
    for summary in result.summaries():
        share = summary.against == "limit"
        write = percent if share else ratio
        name = "the machine's limit (share reached)" if share else summary.against
        add_row(
            shown, name, str(summary.points), write(summary.geometric_mean), write(summary.worst), summary.worst_point
        )
    output.show(shown)
