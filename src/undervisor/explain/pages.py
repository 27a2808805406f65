"""The pages about the rules, from the rules: `python -m undervisor.explain.pages docs/rules`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from undervisor.explain.diagnosis import ALL_RULES, AnyRule
from undervisor.explain.dump import field_name

MANUALS = {"vmx": "Intel SDM", "svm": "AMD APM"}

_INDEX = """# Rules of VM entry

{vmx} rules of VMLAUNCH and VMRESUME, {svm} of VMRUN: what `undervisor explain` holds a dump
against, and what the built-in L0 checks at every entry. A page for each section of the manuals.
The pages are generated from the rules; `undervisor rules --json` has the same.
"""


def slug(rule: AnyRule) -> str:
    """The name of the page that a rule is on."""
    words = re.sub(r"[^a-z0-9]+", "-", rule.section.lower()).strip("-")
    return f"{rule.id.split('.')[0]}-{words}"


def groups() -> dict[str, list[AnyRule]]:
    """The rules of each page."""
    found: dict[str, list[AnyRule]] = {}
    for rule in ALL_RULES.values():
        found.setdefault(slug(rule), []).append(rule)
    return found


def page(rules: list[AnyRule]) -> str:
    """One section."""
    vendor = rules[0].id.split(".")[0]
    lines = [f"# {rules[0].section}", "", f"{MANUALS[vendor]}; {len(rules)} rules.", ""]
    for rule in rules:
        names = ", ".join(f"`{field_name(int(field), vendor)}`" for field in rule.reads)
        lines += [
            f"## {rule.id}",
            "",
            f"{rule.text}.",
            "",
            f"- Fields: {names}",
            f"- Broken: {rule.outcome.value}"
            + (f", qualification {rule.qualification}" if rule.qualification else ""),
            f"- What to change: {rule.remedy}",
        ]
        if rule.assumes:
            lines.append(f"- Depends on: {rule.assumes}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def index() -> str:
    """The list of all pages."""
    counts = {v: sum(r.startswith(v) for r in ALL_RULES) for v in MANUALS}
    lines = [_INDEX.format(**counts)]
    for vendor, manual in MANUALS.items():
        lines.append(f"## {manual}\n")
        for name, rules in groups().items():
            if name.startswith(vendor):
                lines.append(f"- [{rules[0].section}]({name}.md): {len(rules)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """File names and texts of all pages."""
    yield "README.md", index()
    for name, rules in groups().items():
        yield f"{name}.md", page(rules)


def main(folder: str) -> None:
    """Write all pages to `folder`, and remove pages of sections that are no more."""
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
