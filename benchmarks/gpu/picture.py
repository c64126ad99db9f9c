"""The roofline as an SVG: what each point reached, under what memory and matrix units allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.gpu.device import Limits

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 220, 34, 54
COLORS = ("#0b6e99", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#be123c")


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point: FLOP per byte, TFLOP/s reached, and what it is."""

    intensity: float
    tflop_s: float
    label: str


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Logarithmic axes over whole decades."""

    x: tuple[int, int]
    y: tuple[int, int]

    def at(self, intensity: float, tflop_s: float) -> tuple[float, float]:
        across, up = (
            (math.log10(value) - low) / (high - low) for value, (low, high) in ((intensity, self.x), (tflop_s, self.y))
        )
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def roofline(title: str, limits: Limits, series: dict[str, Sequence[Dot]]) -> str:
    """Return the picture: the roof, and a coloured line of points for each name in `series`."""
    dots = [dot for of_name in series.values() for dot in of_name]
    ridge = limits.dense_tflop_s * 1e3 / limits.read_gb_s
    axes = _Axes(
        x=_decades([dot.intensity for dot in dots] + [ridge]),
        y=_decades([dot.tflop_s for dot in dots] + [limits.dense_tflop_s]),
    )
    start, end = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    roof = [
        (intensity, min(limits.dense_tflop_s, intensity * limits.read_gb_s / 1e3))
        for intensity in (max(start, 10.0 ** axes.y[0] * 1e3 / limits.read_gb_s), ridge, end)
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_grid(axes),
        f'<polyline points="{_points(axes, roof)}" fill="none" stroke="#444" stroke-width="2"/>',
    ]
    for place, (name, of_name) in enumerate(series.items()):
        color = COLORS[place % len(COLORS)]
        line = _points(axes, [(dot.intensity, dot.tflop_s) for dot in of_name])
        lines.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-opacity="0.5"/>')
        for dot in of_name:
            x, y = axes.at(dot.intensity, dot.tflop_s)
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{escape(dot.label)}</title></circle>'
            )
        y = TOP + 16 + 18 * place
        lines.append(f'<circle cx="{WIDTH - RIGHT + 22}" cy="{y - 4}" r="4" fill="{color}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _grid(axes: _Axes) -> list[str]:
    lines = []
    for power in range(axes.x[0], axes.x[1] + 1):
        x, _ = axes.at(10.0**power, 10.0 ** axes.y[0])
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(axes.y[0], axes.y[1] + 1):
        _, y = axes.at(10.0 ** axes.x[0], 10.0**power)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle:.0f}" y="{HEIGHT - 14}" text-anchor="middle">FLOP per byte</text>')
    up = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(f'<text transform="translate(18 {up:.0f}) rotate(-90)" text-anchor="middle">TFLOP/s</text>')
    return lines


def _points(axes: _Axes, values: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(*value) for value in values))
