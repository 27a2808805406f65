"""What a check can find: kinds declared as data, findings with the evidence of one machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

EVIDENCE_LIMIT = 1000
"""Characters of one piece of evidence."""


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    UNKNOWN = "unknown"
    FAIL = "fail"


class Layer(IntEnum):
    """The layers, in the order in which a missing one breaks those above it."""

    PLACE = 0
    FIRMWARE = 1
    PROCESSOR = 2
    KERNEL = 3
    DEVICE = 4
    SOFTWARE = 5
    SECURITY = 6
    LIVE = 7
    MIGRATION = 8

    @property
    def title(self) -> str:
        """What an operator calls it."""
        titles = ("where we are", "firmware", "processor", "kernel", "/dev/kvm")
        return (*titles, "virtualization software", "security", "live proof", "migration")[self]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding on one machine."""

    kind: Kind
    evidence: tuple[str, ...]
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "id": self.kind.id,
            "layer": self.kind.layer.title,
            "level": self.kind.level.value,
            "title": self.kind.title,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
        }


KINDS: dict[str, Kind] = {}
"""Every kind by its id; a declaration registers itself here."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding, declared beside the check that finds it.

    `remedy` may hold {names} that the check fills in, from `variants` where it depends on what
    else was found.  `decides`: whether nested KVM is in doubt
    while this is unknown.
    """

    id: str
    layer: Layer
    level: Level
    title: str
    meaning: str
    remedy: str = ""
    sources: tuple[str, ...] = ()
    decides: bool = False
    variants: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*", self.id) or self.id in KINDS:
            raise TypeError(f"finding id {self.id!r} is malformed or taken")
        if self.level in (Level.FAIL, Level.WARN, Level.UNKNOWN) and not self.remedy:
            raise TypeError(f"{self.id}: a {self.level.value} needs a remedy")
        KINDS[self.id] = self

    def found(self, *evidence: object, **words: str) -> Finding:
        """This kind, found with `evidence`."""
        remedy = self.remedy.format(**words) if words else self.remedy
        pieces = (str(piece) for piece in evidence if piece)
        return Finding(self, tuple(_printable(piece) for piece in pieces), remedy)


def _printable(text: str) -> str:
    """Evidence comes from a machine that may be hostile: no control characters, no floods."""
    return "".join(c if c.isprintable() else "?" for c in text[:EVIDENCE_LIMIT])
