"""The ratios as a picture (SVG): a row for each measure, over a logarithmic axis."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final
from xml.sax.saxutils import escape

from undervisor.lab.levels.comparison import BUDGET, Comparison, Ratio, Row
from undervisor.report.levels.words import number

WIDTH: Final = 1000
LEFT, RIGHT, TOP, BOTTOM = 300, 24, 66, 34
LANE: Final = 11
"""Pixels between the ratios of a row."""
GAP: Final = 8
COLOURS: Final = ("#3d7ea6", "#6aa84f", "#d1495b", "#8e6bb0", "#c08a2d")
BAND: Final = "#fbeecb"
_NOTE: Final = 16


@dataclass(frozen=True, slots=True)
class Axis:
    """Powers of ten from `first` to `last` over the width of the picture."""

    first: int
    last: int

    def x(self, ratio: float) -> float:
        """The place of a ratio."""
        share = (log10(ratio) - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def picture(made: Comparison) -> str:
    """The whole document."""
    return "\n".join(_lines(made)) + "\n"


def axis(made: Comparison) -> Axis:
    """Wide enough for every interval, and for 1."""
    ends = [1.0]
    for row in made.rows:
        for ratio in row.ratios:
            ends += [ratio.estimate.low, ratio.estimate.high]
    first, last = floor(log10(min(ends))), ceil(log10(max(ends)))
    return Axis(first, max(last, first + 1))


def _lines(made: Comparison) -> Iterator[str]:
    scale, colours = axis(made), _colours(made)
    row_height = len(made.pairs) * LANE + GAP
    bottom = TOP + len(made.rows) * row_height
    notes = _wrapped(made)
    height = bottom + BOTTOM + len(notes) * _NOTE
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">'
    )
    yield f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    yield '<text x="10" y="20" font-size="14">What a level costs: times as long</text>'
    yield from _legend(made, colours)
    yield from _grid(scale, bottom, made)
    for place, row in enumerate(made.rows):
        yield from _row(row, TOP + place * row_height, scale, colours)
    for place, note in enumerate(notes):
        y = bottom + BOTTOM + place * _NOTE
        yield f'<text x="10" y="{y}" fill="#555555">{escape(note)}</text>'
    yield "</svg>"


def _colours(made: Comparison) -> dict[str, str]:
    names = (f"{inner}/{outer}" for inner, outer in made.pairs)
    return dict(zip(names, COLOURS, strict=False))


def _legend(made: Comparison, colours: dict[str, str]) -> Iterator[str]:
    x = 10
    for name, colour in colours.items():
        yield f'<circle cx="{x + 4}" cy="36" r="4" fill="{colour}"/>'
        yield f'<text x="{x + 13}" y="40">{name}</text>'
        x += 62
    if made.judged:
        yield f'<rect x="{x}" y="30" width="12" height="12" fill="{BAND}"/>'
        yield f'<text x="{x + 17}" y="40">the budget, {_percents()}</text>'


def _percents() -> str:
    low, high = (round((limit - 1) * 100) for limit in BUDGET)
    return f"{low}-{high} %"


def _grid(scale: Axis, bottom: int, made: Comparison) -> Iterator[str]:
    """The budget where it applies, a line at each power of ten, a darker one at 1."""
    if made.judged:
        low, high = (scale.x(limit) for limit in BUDGET)
        yield (
            f'<rect x="{low:.1f}" y="{TOP}" width="{high - low:.1f}" height="{bottom - TOP}" '
            f'fill="{BAND}"/>'
        )
    for power in range(scale.first, scale.last + 1):
        x = scale.x(10.0**power)
        colour = "#777777" if power == 0 else "#dddddd"
        yield (
            f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="{colour}"/>'
            f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle">{10.0**power:,g}</text>'
        )


def _row(row: Row, top: int, scale: Axis, colours: dict[str, str]) -> Iterator[str]:
    middle = top + len(colours) * LANE / 2 + 4
    yield f'<text x="10" y="{middle:.1f}">{escape(row.measure.title)}</text>'
    if not row.ratios:
        yield f'<text x="{LEFT}" y="{middle:.1f}" fill="#999999">not measured</text>'
    lanes = list(colours)
    for ratio in row.ratios:
        y = top + lanes.index(ratio.name) * LANE + LANE / 2
        yield from _mark(ratio, y, scale, colours[ratio.name])


def _mark(ratio: Ratio, y: float, scale: Axis, colour: str) -> Iterator[str]:
    """The median as a dot, its interval as a line, the number beside it."""
    found = ratio.estimate
    low, middle, high = (scale.x(value) for value in (found.low, found.middle, found.high))
    yield (
        f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{colour}" '
        'stroke-width="2"/>'
    )
    yield f'<circle cx="{middle:.1f}" cy="{y}" r="3.5" fill="{colour}"/>'
    x, anchor = (high + 7, "start") if high < WIDTH - 70 else (low - 7, "end")
    yield (
        f'<text x="{x:.1f}" y="{y + 3.5}" font-size="9" fill="#555555" '
        f'text-anchor="{anchor}">{number(found.middle)}</text>'
    )


def _wrapped(made: Comparison) -> list[str]:
    return [line for note in made.notes for line in textwrap.wrap(note, 170)]
