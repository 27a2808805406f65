"""What a fix would do, as values: nothing here touches a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FileChange:
    """Replace a file's text at once; None for `before` or `after` means that there is no file."""

    path: str
    before: str | None
    after: str | None
    why: str

    def __str__(self) -> str:
        verb = "write" if self.before is None else "remove" if self.after is None else "change"
        return f"{verb} {self.path}: {self.why}"


@dataclass(frozen=True, slots=True)
class Command:
    """Run a command; `rescue` is run where it fails, to leave the machine as it was."""

    argv: tuple[str, ...]
    why: str
    rescue: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"run {' '.join(self.argv)}: {self.why}"


@dataclass(frozen=True, slots=True)
class Plan:
    """File changes first, then commands.

    `refusal`: why it must not be applied, empty where it may be.  `restart`: why a restart is
    needed afterwards, empty where none is.
    """

    title: str
    changes: tuple[FileChange, ...] = ()
    commands: tuple[Command, ...] = ()
    refusal: str = ""
    restart: str = ""
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.changes and not self.commands

    def lines(self) -> list[str]:
        """The plan as an operator reads it."""
        lines = [f"{self.title}:"]
        lines += [f"  {number}. {step}" for number, step in
                  enumerate((*self.changes, *self.commands), 1)]  # fmt: skip
        if self.empty and not self.refusal:
            lines.append("  nothing to do")
        for change in self.changes:
            lines += [f"     {change.path}:"] + [f"       {line}" for line in _diff(change)]
        lines += [f"  note: {note}" for note in self.notes]
        if self.restart:
            lines.append(f"  restart needed: {self.restart}")
        if self.refusal:
            lines.append(f"  refused: {self.refusal}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {
            "title": self.title,
            "changes": [
                {"path": c.path, "before": c.before, "after": c.after, "why": c.why}
                for c in self.changes
            ],
            "commands": [{"argv": list(c.argv), "why": c.why} for c in self.commands],
            "refusal": self.refusal,
            "restart": self.restart,
            "notes": list(self.notes),
        }


def _diff(change: FileChange) -> list[str]:
    """The lines that go and the lines that come."""
    old = (change.before or "").splitlines()
    new = (change.after or "").splitlines()
    gone = [f"- {line}" for line in old if line not in new]
    return gone + [f"+ {line}" for line in new if line not in old]
