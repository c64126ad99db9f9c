"""A comparison as an SVG: layers against operations as heat maps, for the reference and each check that differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from tilecast.engine.compare_operations import KINDS, Operation

if TYPE_CHECKING:
    from tilecast.engine.compare import Comparison

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, GAP = 64, 20, 64, 76, 36
LEGEND_WIDTH = 960
EQUAL, CARRIED, FAULT = "#e8efe9", "#d8dce4", "#c81e1e"
LOW, HIGH = (255, 236, 179), (214, 93, 14)
"""Colors of the smallest and the largest difference."""
SMALLEST, LARGEST = 1e-8, 1.0


@dataclass(frozen=True)
class Cell:
    """One operation of one layer: its color's name (`equal`, `carried`, `differs`, `fault`) and how far it is off."""

    state: str
    size: float | None = None


Panel = dict[tuple[int | None, str], Cell]


def picture(comparison: Comparison) -> str:
    """Return the picture of a comparison."""
    panels = _panels(comparison)
    operations = [place for _, panel in panels for place in panel]
    layers = sorted({layer for layer, _ in operations if layer is not None})
    kinds = [kind for kind in KINDS if any(found == kind for _, found in operations)]
    # What is before and after all layers has a row of its own.
    rows: list[int | None] = [*layers, None]
    width = max(LEGEND_WIDTH, LEFT + len(panels) * (len(kinds) * CELL_WIDTH + GAP))
    height = TOP + len(rows) * CELL_HEIGHT + 58
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(_title(comparison))}</text>',
    ]
    for number, (title, panel) in enumerate(panels):
        at = LEFT + number * (len(kinds) * CELL_WIDTH + GAP)
        lines += _panel(title, panel, rows, kinds, at)
    for row, layer in enumerate(rows):
        name = "outside" if layer is None else f"layer {layer}"
        lines.append(f'<text x="{LEFT - 6}" y="{_y(row) + 14}" text-anchor="end">{name}</text>')
    return "\n".join([*lines, *_legend(height), "</svg>", ""])


def _panels(comparison: Comparison) -> list[tuple[str, Panel]]:
    found: list[tuple[str, Panel]] = []
    if comparison.reference is not None:
        panel: Panel = {}
        for one in comparison.reference.operations:
            state = {"rounding": "differs"}.get(one.verdict, one.verdict)
            _put(panel, one.operation, Cell(state, one.given_equal.max_relative))
        found.append((f"against {comparison.against}, on equal inputs", panel))
    everything = [place for _, panel in found for place in panel]
    for check in comparison.invariance:
        if check.verdict == "differs":
            panel = dict.fromkeys(everything, Cell("equal"))
            named = check.causes or ((check.first,) if check.first is not None else ())
            for place in named:
                _put(panel, place.operation, Cell("differs", place.max_relative))
            found.append((f"{check.check}: {check.detail}", panel))
    return found


def _put(panel: Panel, operation: Operation, cell: Cell) -> None:
    """Keep the worst of the operations that share a cell, such as a layer's norms."""
    order = ("equal", "carried", "differs", "fault")
    place = (operation.layer, operation.kind)
    before = panel.get(place, Cell("equal"))
    panel[place] = max(before, cell, key=lambda one: (order.index(one.state), one.size or 0.0))


def _panel(
    title: str, panel: Panel, rows: Sequence[int | None], kinds: Sequence[str], at: int
) -> Iterable[str]:  # fmt: skip
    yield f'<text x="{at}" y="44">{escape(title)}</text>'
    for column, kind in enumerate(kinds):
        middle = at + column * CELL_WIDTH + CELL_WIDTH / 2
        yield f'<text x="{middle}" y="{TOP - 8}" text-anchor="middle">{kind}</text>'
        for row, layer in enumerate(rows):
            cell = panel.get((layer, kind))
            if cell is None:
                continue
            x, y = at + column * CELL_WIDTH, _y(row)
            yield (
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{_color(cell)}">'
                f"<title>{escape(f'{kind}: {cell.state}{_size(cell)}')}</title></rect>"
            )
            if cell.state in ("differs", "fault"):
                ink = "white" if cell.state == "fault" else "black"
                text = _size(cell).strip() or cell.state
                yield f'<text x="{x + CELL_WIDTH / 2 - 1}" y="{y + 13}" text-anchor="middle" fill="{ink}">{text}</text>'


def _legend(height: int) -> Iterable[str]:
    words = (
        ("equal bits", Cell("equal")), ("carried on: its input differed", Cell("carried")),
        ("differs by 1e-7 of a row's size", Cell("differs", 1e-7)), ("by 1e-2", Cell("differs", 1e-2)),
        ("fault: beyond rounding", Cell("fault")),
    )  # fmt: skip
    x = LEFT
    for text, cell in words:
        yield f'<rect x="{x}" y="{height - 30}" width="14" height="14" fill="{_color(cell)}"/>'
        yield f'<text x="{x + 19}" y="{height - 19}">{escape(text)}</text>'
        x += 40 + 6 * len(text)


def _title(comparison: Comparison) -> str:
    ranks = "" if comparison.ranks == 1 else f", {comparison.ranks} ranks"
    return f"experts on {comparison.experts}, {comparison.dtype}{ranks}, {comparison.prompts.rows} tokens"


def _size(cell: Cell) -> str:
    if cell.size is None or cell.state not in ("differs", "fault"):
        return ""
    return f" {cell.size:.0e}" if math.isfinite(cell.size) else " ∞"


def _color(cell: Cell) -> str:
    if cell.state != "differs":
        return {"equal": EQUAL, "carried": CARRIED, "fault": FAULT}[cell.state]
    size = min(max(cell.size or SMALLEST, SMALLEST), LARGEST)
    share = math.log(size / SMALLEST) / math.log(LARGEST / SMALLEST)
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _y(row: int) -> int:
    return TOP + row * CELL_HEIGHT
