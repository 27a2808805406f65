"""Why a run came back: an event that was asked for, or the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Outcome


class What(Enum):
    """What ended a run."""

    TRANSITION = "a transition that was asked for"
    SERIAL = "serial output that was asked for"
    END = "the run is over"


@dataclass(frozen=True, slots=True)
class Event:
    """Why `run_until` came back; `transition` and `outcome` are set where there is one.

    After a transition it has been carried out: level `transition.to` is the one that runs.
    """

    what: What
    transition: Transition | None = None
    outcome: Outcome | None = None
