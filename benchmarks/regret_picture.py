"""Search strategies as an SVG: what each one measures against how far its choices are from the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 130, 40, 54
COLOR = "#0b6e99"
TICKS_X = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def picture(title: str, table: Mapping[str, Mapping[str, float]]) -> str:
    """Return the picture: a dot at each strategy's median regret, a line up to its 95th percentile."""
    highest = max(0.02, *(row["p95_regret"] for row in table.values())) * 1.1
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if highest / s <= 8)

    def x(share: float) -> float:
        low, high = math.log(TICKS_X[0]), math.log(TICKS_X[-1])
        position = (math.log(min(max(share, TICKS_X[0]), TICKS_X[-1])) - low) / (high - low)
        return LEFT + position * (WIDTH - LEFT - RIGHT)

    def y(regret: float) -> float:
        return HEIGHT - BOTTOM - regret / highest * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for tick in TICKS_X:
        lines.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>')
        lines.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0%}</text>')
    for number in range(int(highest / step) + 1):
        at = y(number * step)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eee"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number * step:.1%}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(
        f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">samples, as a share of all configs × 20</text>'
    )
    lines.append(
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">'
        "regret: median, and up to the 95th percentile</text>"
    )
    for name, row in table.items():
        at, low, high = x(row["share_of_exhaustive"]), y(row["median_regret"]), y(row["p95_regret"])
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{COLOR}"/>')
        lines.append(f'<circle cx="{at:.1f}" cy="{low:.1f}" r="4" fill="{COLOR}"/>')
        lines.append(f'<text x="{at + 6:.1f}" y="{high + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])
