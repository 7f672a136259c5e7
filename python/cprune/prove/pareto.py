"""What a comparison looks like: a table for the terminal, and a plot of quality over size as an SVG of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cprune.prove.compare import Estimate, Quality

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 70, 170, 30, 50  # pixels: the picture, and its margins
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#8c6d31",
)  # Okabe, Ito
MARKS = 5  # of an axis, about


@dataclass(frozen=True)
class Row:
    """One method at one ratio."""

    method: str  # as it was asked for
    ratio: float  # asked for
    removed: float  # share of the experts really removed
    quality: Quality | None  # None where refused
    refused: str | None = None


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats: none removes as much at a lower perplexity; by share removed."""
    measured = sorted(
        (row for row in rows if row.quality is not None), key=lambda row: (-row.removed, row.quality.perplexity.value)
    )
    best, found = math.inf, []
    for row in measured:
        if row.quality.perplexity.value < best:
            best = row.quality.perplexity.value
            found.append(row)
    return found[::-1]


def render(whole: Quality, rows: Sequence[Row]) -> Group:
    """The table: a row per method and ratio, the increase with its interval, the frontier marked."""
    best = {id(row) for row in frontier(rows)}
    span, domains = whole.perplexity, len(whole.by_domain)
    title = f"unpruned {span.value:.2f} [{span.low:.2f}, {span.high:.2f}], mean perplexity of {domains} domains"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", min_width=1)
    table.add_column("method", no_wrap=True, overflow="fold")
    for name in ("removed", "perplexity", "increase"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.quality is None:
            table.add_row("", row.method, f"({row.ratio:.1%})", "refused", "")
            continue
        quality, mark = row.quality, "*" if id(row) in best else ""
        table.add_row(
            mark, row.method, f"{row.removed:.1%}", f"{quality.perplexity.value:.2f}", _percent(quality.increase)
        )
    notes = [Text(f"{row.method} at {row.ratio:g}: {row.refused}") for row in rows if row.quality is None]
    caption = Text("brackets: 95 % of a bootstrap over the evaluated documents; * no row removes as much for less")
    return Group(table, caption, *notes)


def _percent(estimate: Estimate) -> str:
    digits = 1 if estimate.value < 1 else 0
    return f"{estimate.value:+.{digits}%} [{estimate.low:+.{digits}%}, {estimate.high:+.{digits}%}]"


def pareto_svg(whole: Quality, rows: Sequence[Row]) -> str:
    """SVG text: experts removed across, perplexity up (logarithmic), a line per method, the frontier dashed."""
    measured = [row for row in rows if row.quality is not None]
    methods = list(dict.fromkeys(row.method for row in measured))
    seen = [whole.perplexity, *(row.quality.perplexity for row in measured)]
    low, high = math.log(min(span.low for span in seen)), math.log(max(span.high for span in seen))
    room = max(high - low, 0.02) * 0.05
    low, high = low - room, high + room
    right = max([0.1, *(row.removed for row in measured)]) * 1.05

    def x(removed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * removed / right

    def y(perplexity: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(perplexity) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for mark in _marks(0.0, right):
        parts.append(_line(x(mark), TOP, x(mark), HEIGHT - BOTTOM, "#dddddd"))
        parts.append(_text(x(mark), HEIGHT - BOTTOM + 16, f"{mark:.0%}", "middle"))
    for mark in _marks(math.exp(low), math.exp(high)):
        parts.append(_line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "#dddddd"))
        parts.append(_text(LEFT - 6, y(mark) + 4, f"{mark:g}", "end"))
    parts.append(_text(x(right / 2), HEIGHT - 14, "experts removed", "middle"))
    parts.append(_text(LEFT, TOP - 12, "perplexity (mean over domains)", "start"))
    points = [(0.0, whole.perplexity.value), *((row.removed, row.quality.perplexity.value) for row in frontier(rows))]
    parts.append(_path([(x(a), y(b)) for a, b in points], "#888888", 'stroke-dasharray="5 4"'))
    for place, method in enumerate(methods):
        colour = COLOURS[place % len(COLOURS)]
        own = sorted((row for row in measured if row.method == method), key=lambda row: row.removed)
        parts.append(_path([(x(row.removed), y(row.quality.perplexity.value)) for row in own], colour))
        for row in own:
            span = row.quality.perplexity
            parts.append(_line(x(row.removed), y(span.low), x(row.removed), y(span.high), colour))
            parts.append(f'<circle cx="{x(row.removed):.1f}" cy="{y(span.value):.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 26, TOP + 16 * place + 4, method, "start"))
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{TOP + 16 * place}" r="4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _marks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, about five."""
    step = 10.0 ** math.floor(math.log10((high - low) / MARKS))
    step *= min((factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= MARKS), default=10)
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _path(points: Sequence[tuple[float, float]], colour: str, more: str = "") -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
