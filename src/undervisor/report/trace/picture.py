"""The timeline as a picture (SVG): a row per level and vCPU, over the time in which L2s ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TextIO
from xml.sax.saxutils import escape

from undervisor.report.trace.timeline import EXIT_NS
from undervisor.report.trace.transition import Transition

WIDTH: Final = 1000
LEFT, TOP, ROW, GAP, BOTTOM = 110, 44, 14, 10, 34
COLOURS: Final = {0: "#d1495b", 1: "#3d7ea6", 2: "#6aa84f"}
NAMES: Final = {0: "L0", 1: "L1", 2: "L2"}
MOST_TICKS: Final = 8

Span = tuple[int, int]


class Picture:
    """Gathers transitions; `close` draws. What is closer than a pixel becomes one box."""

    def __init__(self, file: TextIO, vcpus: int, title: str) -> None:
        self._file, self._vcpus, self._title = file, vcpus, title
        self._spans: dict[tuple[int, int], list[Span]] = {
            (vcpu, level): [] for vcpu in range(vcpus) for level in NAMES
        }

    def add(self, transition: Transition) -> None:
        """The time that the guest ran, and the exit that ended it."""
        t = transition
        start = t.time - EXIT_NS
        if t.ran > 0:
            self._spans[t.vcpu, t.level].append((start - t.ran, start))
        self._spans[t.vcpu, 0].append((start, t.time))

    def close(self) -> None:
        """Draw."""
        self._file.write("\n".join(self._lines()) + "\n")
        self._file.close()

    def _window(self) -> Span:
        """From the first to the last instruction of an L2, and a little around; or everything."""
        nested = [s for (_, level), spans in self._spans.items() if level == 2 for s in spans]
        shown = nested or [span for spans in self._spans.values() for span in spans] or [(0, 1)]
        first, last = min(start for start, _ in shown), max(end for _, end in shown)
        margin = max((last - first) // 50, 1)
        return max(first - margin, 0), last + margin

    def _lines(self) -> Iterable[str]:
        first, last = self._window()
        scale = (WIDTH - LEFT - 20) / (last - first)
        height = TOP + self._vcpus * (3 * ROW + GAP) + BOTTOM
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="11">'
        )
        yield f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        yield f'<text x="{LEFT}" y="18" font-size="14">{escape(self._title)}</text>'
        yield from self._ticks(first, last, scale, height)
        for vcpu in range(self._vcpus):
            yield from self._rows(vcpu, first, last, scale)
        yield "</svg>"

    def _rows(self, vcpu: int, first: int, last: int, scale: float) -> Iterable[str]:
        top = TOP + vcpu * (3 * ROW + GAP)
        yield f'<text x="10" y="{top + 2 * ROW - 3}">vCPU {vcpu}</text>'
        for place, level in enumerate((2, 1, 0)):
            y = top + place * ROW
            yield f'<text x="80" y="{y + ROW - 4}">{NAMES[level]}</text>'
            yield (
                f'<rect x="{LEFT}" y="{y + 1}" width="{WIDTH - LEFT - 20}" height="{ROW - 2}" '
                'fill="#f2f2f2"/>'
            )
            inside = [s for s in self._spans[vcpu, level] if s[1] > first and s[0] < last]
            for x, width in _boxes(inside, first, scale):
                yield (
                    f'<rect x="{LEFT + x:.1f}" y="{y + 1}" width="{width:.1f}" '
                    f'height="{ROW - 2}" fill="{COLOURS[level]}"/>'
                )

    def _ticks(self, first: int, last: int, scale: float, height: int) -> Iterable[str]:
        step = _round_step((last - first) / MOST_TICKS)
        for time in range(-(-first // step) * step, last + 1, step):
            x = LEFT + (time - first) * scale
            yield (
                f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - BOTTOM + 4}" '
                'stroke="#cccccc"/>'
            )
            label = f"{time / 1e6:g} ms"
            yield f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{label}</text>'


def _boxes(spans: list[Span], first: int, scale: float) -> list[tuple[float, float]]:
    """`(x, width)` in pixels; spans that touch on the screen are one."""
    found: list[list[float]] = []
    for start, end in sorted(spans):
        left, right = max(start - first, 0) * scale, (end - first) * scale
        if found and left - found[-1][1] < 0.5:
            found[-1][1] = max(found[-1][1], right)
        else:
            found.append([left, right])
    return [(left, max(right - left, 0.5)) for left, right in found]


def _round_step(least: float) -> int:
    """1, 2 or 5 times a power of ten, at least `least`."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if step * factor >= least:
                return step * factor
        step *= 10
