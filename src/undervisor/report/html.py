"""The page of a bundle: made from its JSON alone, every word escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1,h2,h3{line-height:1.2} table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
td,th{border:1px solid #ccc;padding:.3rem .5rem;text-align:left;vertical-align:top}
.fail{color:#b00020;font-weight:bold}.warn{color:#9a6700}.unknown{color:#7b1fa2}.ok{color:#1b7f37}
code,pre{background:#f4f4f4;padding:.1rem .3rem;white-space:pre-wrap;overflow-wrap:anywhere}
.statement{border-left:4px solid #555;padding:.5rem 1rem;background:#fafafa}
@media (prefers-color-scheme:dark){body{background:#111;color:#ddd}
code,pre,.statement{background:#222}
td,th{border-color:#444}.fail{color:#ff6b81}.warn{color:#e3b341}.ok{color:#56d364}.unknown{color:#d2a8ff}}
"""


def page(said: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>Nested virtualization report</title><style>{_STYLE}</style>",
        "<h1>Nested virtualization report</h1>",
        f"<p class=statement>{escape(said['statement'])}</p>",
    ]
    for level in said["levels"]:
        parts += _level(level)
    if said["vulnerabilities"]:
        names = tuple(level["level"] for level in said["levels"])
        told = [
            (escape(name), *(escape(row[who] or "not told") for who in names))
            for name, row in said["vulnerabilities"].items()
        ]
        parts += ["<h2>Vulnerabilities where the levels differ</h2>"]
        parts.append(_table(("vulnerability", *names), told))
    parts += ["<h2>What is missing</h2>"]
    rows = [(m["level"], m["item"], m["why"], _code(m["get"])) for m in said["missing"]]
    parts.append(_table(("level", "item", "why", "how to get it"), rows) if rows else "<p>Nothing.")
    parts += ["<h2>What was removed</h2>"]
    removed = [(kind, str(count)) for kind, count in said["removed"].items()]
    parts.append(_table(("kind", "distinct"), removed) if removed else "<p>Nothing.")
    parts += ["<h2>Files</h2><ul>"]
    parts += [f"<li><a href='{escape(f, True)}'>{escape(f)}</a>" for f in said["files"]]
    parts.append(f"</ul><p>{escape(said['made_by'])}</p></html>")
    return "\n".join(parts) + "\n"


def _level(level: dict[str, Any]) -> list[str]:
    told = [(key, escape(str(level[key] or "unknown"))) for key in
            ("architecture", "processor", "kernel", "qemu", "libvirt")]  # fmt: skip
    told.append(("below", f"<b>{escape(level['below'])}</b>: {_join(level['evidence'])}"))
    parts = [f"<h2>{escape(level['level'])}</h2>", _table(("fact", "value"), told)]
    if level["guests"]:
        rows = [
            (escape(g["name"]), _code(g["cpu"]), escape(g["below"]), _join(g["evidence"]))
            for g in level["guests"]
        ]
        parts += ["<h3>Its guests</h3>", _table(("guest", "-cpu", "runs on", "evidence"), rows)]
    examination = level["examination"]
    parts.append(f"<h3>Findings: {escape(examination['verdict'])}</h3>")
    rows_of_findings = [
        (
            f"<span class={escape(f['level'], True)}>{escape(f['level'])}</span>",
            f"{escape(f['title'])}<br><code>{escape(f['id'])}</code>",
            _join(f["evidence"]),
            escape(f["remedy"]),
        )
        for f in examination["findings"]
    ]
    parts.append(_table(("level", "finding", "evidence", "remedy"), rows_of_findings))
    return parts


def _join(pieces: Iterable[str]) -> str:
    return "<br>".join(escape(piece) for piece in pieces)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table; cells are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows]
    return "\n".join(lines) + "</table>"
