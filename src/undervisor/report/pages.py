"""The page of every finding, from its declaration: `python -m undervisor.report.pages DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from undervisor.host.checks import engine
from undervisor.host.checks.finding import KINDS, Kind, Layer
from undervisor.host.migration import rules

_MEANS = {
    "ok": "A fact that speaks for nesting.",
    "note": "Worth knowing; nothing has to be done.",
    "warn": "It works, and something about it is bad.",
    "unknown": "It could not be looked at. The remedy says what would make it known.",
    "fail": "It keeps something from working.",
}

_INDEX = """# Findings

Every finding of `undervisor check` and `undervisor migrate`, by layer. The pages are generated
from the declarations beside the checks; `undervisor check --json` prints the same ids.

"""

DECLARING = (engine, rules)
"""The modules whose import declares every kind of finding."""


def page(kind: Kind) -> str:
    """One finding as a page."""
    level = kind.level.value
    parts = [
        f"# {kind.title}",
        f"`{kind.id}` · layer: {kind.layer.title} · level: **{level}**",
        _MEANS[level],
        "## What it means",
        kind.meaning,
    ]
    if kind.remedy:
        parts.append("## What to do")
        if not kind.variants:
            parts.append(f"```text\n{kind.remedy}\n```")
        if kind.variants:
            parts.append("\n".join(f"- {name}: {text}" for name, text in kind.variants))
        elif "{" in kind.remedy:
            parts.append("Words in braces are filled in from the machine.")
    if kind.decides:
        parts.append("While this is unknown, the verdict about nesting is unknown too.")
    if kind.sources:
        parts += ["## Sources", "\n".join(f"- {source}" for source in kind.sources)]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The list of all findings."""
    lines = []
    for layer in Layer:
        kinds = sorted((k for k in KINDS.values() if k.layer is layer), key=lambda k: k.id)
        if kinds:
            lines.append(f"## {layer.title}\n")
            lines += [f"- [{k.id}]({k.id}.md) ({k.level.value}): {k.title}" for k in kinds]
            lines.append("")
    return _INDEX + "\n".join(lines).rstrip() + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """File names and texts of all pages."""
    yield "README.md", index()
    for kind in KINDS.values():
        yield f"{kind.id}.md", page(kind)


def main(folder: str) -> None:
    """Write all pages to `folder`, and remove pages of findings that are no more."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    texts = dict(pages())
    for path in target.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (target / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
