"""The cells that the table and the page share."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.lab.levels.comparison import Comparison, Ratio, Row, Verdict


def head(made: Comparison) -> tuple[str, ...]:
    """The names of the columns."""
    ratios = (f"{inner}/{outer}" for inner, outer in made.pairs)
    budget = ("budget",) if made.judged else ()
    return ("measurement", *made.levels, *ratios, *budget)


def cells(made: Comparison, row: Row) -> Iterator[str]:
    """A row's cells, for the columns of `head`."""
    yield row.measure.title
    for name in made.levels:
        found = row.costs.get(name)
        yield row.measure.shown(found.middle) if found else "-"
    ratios = {ratio.name: ratio for ratio in row.ratios}
    for inner, outer in made.pairs:
        ratio = ratios.get(f"{inner}/{outer}")
        yield interval(ratio) if ratio else "-"
    if made.judged:
        yield verdict(row)


def interval(ratio: Ratio) -> str:
    """`1.42 (1.38-1.47)`."""
    found = ratio.estimate
    return f"{number(found.middle)} ({number(found.low)}-{number(found.high)})"


def verdict(row: Row) -> str:
    """Of the ratios that are judged; empty where none is."""
    judged = [r for r in row.ratios if r.verdict is not Verdict.NONE]
    return ", ".join(f"{r.verdict.value} ({r.name})" for r in judged)


def number(value: float) -> str:
    """Three digits that count, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 0.1:
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{value:.2g}"


def missing(made: Comparison) -> list[str]:
    """What was not measured, where and why; the same reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in made.rows:
        for level, why in row.missing.items():
            reasons.setdefault((level, why), []).append(row.measure.title)
    return [
        f"Not measured at {level}: {', '.join(titles)}: {why}"
        for (level, why), titles in reasons.items()
    ]
