"""The guides' examples, the commands that the documentation maps them to, and how to compare."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from lxml import etree

from undervisor.cli.main import main

HERE = Path(__file__).parent
EXAMPLES = {path.stem: path for path in sorted((HERE / "examples").iterdir())}
READ_ONLY = {"skylake"}
"""Examples of what not to write: a command reads them."""

TABLE = re.compile(r"^\| ([a-z0-9-]+) \| `(undervisor [^`]+)` \|$", re.M)


def mapping() -> dict[str, list[str]]:
    """Example and command of each row of the table in the documentation."""
    text = (HERE.parents[1] / "docs/guests.md").read_text()
    return {name: shlex.split(command)[1:] for name, command in TABLE.findall(text)}


def produce(words, recording, capsys) -> str:
    """What a command of the table prints, on a recorded machine; it must succeed."""
    extra = ["--recording", recording] if words[:2] == ["guest", "new"] else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*words, *extra])
    said = capsys.readouterr()
    assert not end.value.code, said.err
    return said.out


def fragments(path: Path):
    """The elements of an example."""
    root = etree.fromstring(path.read_text())
    return list(root) if root.tag == "fragment" else [root]


def holds(element, wanted) -> bool:
    """Whether `element` says all that `wanted` says, and maybe more."""
    if element.tag != wanted.tag or not wanted.attrib.items() <= element.attrib.items():
        return False
    if (wanted.text or "").strip() not in ("", (element.text or "").strip()):
        return False
    return all(any(holds(child, part) for child in element) for part in wanted)


def somewhere(root, wanted) -> bool:
    """Whether any element of a document holds `wanted`."""
    return any(holds(element, wanted) for element in root.iter(wanted.tag))


def options(words) -> list[tuple[str, frozenset[str]]]:
    """Options of a QEMU command line, each with the pieces of its value."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [(o, frozenset("" if v.startswith("-") else p for p in v.split(",")))
            for o, v in pairs if o.startswith("-")]  # fmt: skip


def says(command, wanted) -> list[str]:
    """Options of `wanted` that no option of `command` holds with all their pieces."""
    has = options(command)
    return [f"{o} {sorted(v)}" for o, v in options(wanted)
            if not any(o == other and v <= pieces for other, pieces in has)]  # fmt: skip
