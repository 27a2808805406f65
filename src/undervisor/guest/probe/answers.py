"""What the probe answers: values, faults as values, and an `Answer` to wait in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from undervisor.errors import GuestDied

T = TypeVar("T")
U = TypeVar("U")

REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""In encoding order."""
CF, ZF = 1 << 0, 1 << 6
ALL = tuple(name for name in REGISTERS if name != "rsp")


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception that an operation caused: the processor's own account of it."""

    vector: int
    error_code: int
    rip: int
    cs: int
    rsp: int
    cr2: int
    rflags: int
    registers: Mapping[str, int]

    def __str__(self) -> str:
        return f"exception {self.vector} (error code {self.error_code:#x}) at {self.rip:#x}"


@dataclass(frozen=True, slots=True)
class Returned:
    """Code that returned: the flags and the registers that were asked for."""

    rflags: int
    registers: Mapping[str, int]

    def __getitem__(self, register: str) -> int:
        return self.registers[register]


class VmxOutcome(Enum):
    """How a VMX instruction ended. SDM 3C, "Conventions" (of VMX instructions)."""

    SUCCEED = "VMsucceed"
    FAIL_INVALID = "VMfailInvalid"
    FAIL_VALID = "VMfailValid"


@dataclass(frozen=True, slots=True)
class VmxResult:
    """A VMX instruction's outcome; `error` is the VM-instruction error after VMfailValid.

    `value` is what VMREAD and VMPTRST give.
    """

    outcome: VmxOutcome
    error: int = 0
    value: int = 0

    @property
    def succeeded(self) -> bool:
        """Whether it was VMsucceed."""
        return self.outcome is VmxOutcome.SUCCEED

    @classmethod
    def of(cls, returned: Returned, value: int = 0) -> VmxResult:
        """From CF, ZF and, in R10, the VM-instruction error."""
        if returned.rflags & CF:
            return cls(VmxOutcome.FAIL_INVALID)
        if returned.rflags & ZF:
            return cls(VmxOutcome.FAIL_VALID, returned["r10"])
        return cls(VmxOutcome.SUCCEED, 0, value)


@dataclass(frozen=True, slots=True)
class L2Run:
    """An L2 that ran until a VM exit, or an entry that failed.

    `registers` are L2's at the exit, RSP excepted (and RAX with SVM, which the VMCB holds).
    `result` is VMsucceed where L2 ran; a failed entry's error otherwise.  With SVM it always is
    VMsucceed: what happened is the VMCB's exit code.
    """

    result: VmxResult
    registers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Refused:
    """The probe could not do it: a status, no exception."""

    why: str

    def __str__(self) -> str:
        return self.why


class Faulted(GuestDied):
    """A value was taken from an operation that has none: it faulted, or did not run."""


class Answer(Generic[T]):
    """The answer to an operation of a batch, there when the batch has run."""

    __slots__ = ("_outcomes", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self._outcomes: list[T | Fault | Refused] = []

    def set(self, outcome: T | Fault | Refused) -> None:
        """Fill it in."""
        self._outcomes = [outcome]

    @property
    def outcome(self) -> T | Fault | Refused:
        """The value, or the fault in its place."""
        if not self._outcomes:
            raise Faulted(f"{self.what} was not run", hint="run its batch first")
        return self._outcomes[0]

    @property
    def fault(self) -> Fault | None:
        """The exception it caused, None if there was none."""
        return self.outcome if isinstance(self.outcome, Fault) else None

    @property
    def value(self) -> T:
        """The value; Faulted where there is none."""
        outcome = self.outcome
        if isinstance(outcome, Fault | Refused):
            raise Faulted(f"{self.what}: {outcome}")
        return outcome


Decode = Callable[[bytes], T]
