"""Exceptions and interrupts: vectors, their classes, faults as values, and the double fault.

SDM 3A "Interrupt and Exception Handling"; APM 2 "Exceptions and Interrupts".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from undervisor.arch.bits import plain_members


class ExceptionClass(Enum):
    """When an exception is reported and whether its instruction can be restarted."""

    FAULT = "fault"
    TRAP = "trap"
    FAULT_OR_TRAP = "fault or trap"
    ABORT = "abort"
    INTERRUPT = "interrupt"


class Severity(Enum):
    """The classes of which "Conditions for Generating a Double Fault" is made."""

    BENIGN = "benign"
    CONTRIBUTORY = "contributory"
    PAGE_FAULT = "page fault"


@plain_members
class Vector(IntEnum):
    """The exception and interrupt vectors that the architecture defines, by mnemonic."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    COPROCESSOR_SEGMENT_OVERRUN = 9
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21
    HV = 28
    VC = 29
    SX = 30

    @property
    def has_error_code(self) -> bool:
        """Whether delivery pushes an error code (in protected mode and above)."""
        return bool(VECTORS_WITH_ERROR_CODE >> self & 1)

    @property
    def exception_class(self) -> ExceptionClass:
        """Fault, trap, abort or interrupt."""
        return _CLASSES.get(self, ExceptionClass.FAULT)

    @property
    def severity(self) -> Severity:
        """The class that decides which pairs become a double fault."""
        return severity_of(self)


# SDM 3A "Exceptions and Interrupts" (summary table); APM 2 "Error Codes". #VC and #SX are AMD's.
VECTORS_WITH_ERROR_CODE: Final = sum(
    1 << vector
    for vector in (
        Vector.DF,
        Vector.TS,
        Vector.NP,
        Vector.SS,
        Vector.GP,
        Vector.PF,
        Vector.AC,
        Vector.CP,
        Vector.VC,
        Vector.SX,
    )
)

_CLASSES: Final[dict[int, ExceptionClass]] = {
    Vector.DB: ExceptionClass.FAULT_OR_TRAP,
    Vector.NMI: ExceptionClass.INTERRUPT,
    Vector.BP: ExceptionClass.TRAP,
    Vector.OF: ExceptionClass.TRAP,
    Vector.DF: ExceptionClass.ABORT,
    Vector.COPROCESSOR_SEGMENT_OVERRUN: ExceptionClass.ABORT,
    Vector.MC: ExceptionClass.ABORT,
    Vector.HV: ExceptionClass.INTERRUPT,
}

_SEVERITIES: Final[dict[int, Severity]] = {
    Vector.DE: Severity.CONTRIBUTORY,
    Vector.TS: Severity.CONTRIBUTORY,
    Vector.NP: Severity.CONTRIBUTORY,
    Vector.SS: Severity.CONTRIBUTORY,
    Vector.GP: Severity.CONTRIBUTORY,
    Vector.CP: Severity.CONTRIBUTORY,
    Vector.VC: Severity.CONTRIBUTORY,
    Vector.SX: Severity.CONTRIBUTORY,
    Vector.PF: Severity.PAGE_FAULT,
    Vector.VE: Severity.PAGE_FAULT,
}


def severity_of(vector: int) -> Severity:
    """The double-fault class of any vector; interrupts and unassigned vectors are benign."""
    return _SEVERITIES.get(vector, Severity.BENIGN)


@plain_members
class EventType(IntEnum):
    """How an event is injected or was being delivered; the codes of both vendors agree.

    SDM 3C "VM-Entry Controls for Event Injection"; APM 2 "Event Injection", which has
    `EXTERNAL_INTERRUPT`, `NMI`, `EXCEPTION` and `SOFTWARE_INTERRUPT` only.
    """

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER = 7


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception to deliver.

    `error_code` is None where delivery pushes none.  `address` is the linear address that a page
    fault loads into CR2, None for every other exception.
    """

    vector: Vector
    error_code: int | None = None
    address: int | None = None

    def __str__(self) -> str:
        code = "" if self.error_code is None else f"({self.error_code:#x})"
        return f"#{self.vector.name}{code}"


UD: Final = Fault(Vector.UD)
NM: Final = Fault(Vector.NM)
DB: Final = Fault(Vector.DB)
GP0: Final = Fault(Vector.GP, 0)
SS0: Final = Fault(Vector.SS, 0)
DOUBLE_FAULT: Final = Fault(Vector.DF, 0)


class GuestFault(Exception):
    """The guest's instruction faults: an architectural outcome, caught where it is delivered."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


# Interrupts and INT n are benign whatever their vector.
_BENIGN_TYPES: Final = frozenset(
    {EventType.EXTERNAL_INTERRUPT, EventType.NMI, EventType.SOFTWARE_INTERRUPT}
)


def combine(first: int, second: Fault, kind: int = EventType.EXCEPTION) -> Fault | None:
    """What is delivered when `second` occurs while the event with vector `first` is delivered.

    `kind` is the `EventType` of the first.  The answer is the second alone (the two are handled
    serially), a double fault, or None: the processor enters shutdown (a triple fault).
    SDM 3A "Interrupt 8: Double Fault Exception (#DF)".
    """
    now = severity_of(second.vector)
    if now is Severity.BENIGN or kind in _BENIGN_TYPES:
        return second
    if first == Vector.DF:
        return None
    before = severity_of(first)
    if before is Severity.PAGE_FAULT:
        return DOUBLE_FAULT
    if before is Severity.CONTRIBUTORY and now is Severity.CONTRIBUTORY:
        return DOUBLE_FAULT
    return second
