"""A change to a guest, with its reason: what `tune` and `harden` hand back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from undervisor.domains.model import Guest


class Outcome(Enum):
    """What became of a measure."""

    CHANGED = "changed"
    KEPT = "kept"
    REFUSED = "not done"
    TODO = "to do"


@dataclass(frozen=True, slots=True)
class Choice:
    """One measure: its id, what became of it, in a few words what, and why.

    `command` is what an operator types for it where it is no part of the definition.
    """

    id: str
    outcome: Outcome
    what: str
    why: str
    command: str = ""

    def as_json(self) -> dict[str, str]:
        """The choice as JSON has it."""
        return {
            "id": self.id,
            "outcome": self.outcome.value,
            "what": self.what,
            "why": self.why,
            "command": self.command,
        }


@dataclass(frozen=True, slots=True)
class Chosen:
    """The guest after a measure, and the choices that led there."""

    guest: Guest
    choices: tuple[Choice, ...]
