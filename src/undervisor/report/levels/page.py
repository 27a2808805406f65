"""A page that stands alone: the picture, the table, and how it was measured."""

from __future__ import annotations

from html import escape
from typing import Final

from undervisor.lab.levels.comparison import Comparison
from undervisor.report.levels.picture import picture
from undervisor.report.levels.words import cells, head, missing

_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0} td,th{border:1px solid #ccc;padding:.2rem .5rem}
td{text-align:right} td:first-child,th:first-child{text-align:left} svg{width:100%;height:auto}
.note{border-left:4px solid #555;padding:.3rem 1rem;background:#fafafa}
"""


def page(made: Comparison) -> str:
    """The whole document; every word in it is escaped."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>What nesting costs</title><style>{_STYLE}</style><h1>What nesting costs</h1>",
        "<table><tr><th>level<th>machine<th>below it, by CPUID</tr>",
    ]
    for name, machine in made.levels.items():
        below = made.below[name] or "nothing"
        parts.append("<tr>" + "".join(f"<td>{escape(w)}" for w in (name, machine, below)))
    parts.append("</table>")
    parts += [f"<p class=note>{escape(note)}</p>" for note in (*made.notes, *missing(made))]
    parts.append(picture(made))
    parts.append("<table><tr>" + "".join(f"<th>{escape(word)}" for word in head(made)))
    for row in made.rows:
        parts.append("<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells(made, row)))
    parts.append("</table></html>")
    return "\n".join(parts) + "\n"
