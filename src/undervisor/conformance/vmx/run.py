"""An L2 that ran under VMX, or did not: what the entry gave and what the VMCS says afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import Broken, equal, words
from undervisor.guest.probe.answers import Answer, L2Run, VmxOutcome, VmxResult

ENTRY_FAILURE = 1 << 31
"""Bit 31 of the exit reason. SDM 3C, "Basic VM-Exit Information"."""
BASIC_REASON = 0xFFFF


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of one VM entry; there when its batch has run.

    `run[field]` is a field of the VMCS after the exit, `start` where L2's code begins.
    """

    answer: Answer[L2Run]
    reads: Sequence[Answer[dict[int, int | None]]]
    vector_of: Callable[[int], int | None]
    start: int

    @property
    def result(self) -> VmxResult:
        """VMsucceed, VMfailInvalid or VMfailValid of VMLAUNCH or VMRESUME."""
        return self.answer.value.result

    @property
    def registers(self) -> Mapping[str, int]:
        """L2's general registers at the exit, RSP excepted."""
        return self.answer.value.registers

    def __getitem__(self, field: F) -> int:
        for read in reversed(self.reads):
            if field in read.value:
                value = read.value[field]
                if value is None:
                    raise Broken(f"VMREAD of {field.name} fails after the VM exit")
                return value
        raise KeyError(field)

    @property
    def entered(self) -> bool:
        """Whether the entry got past the checks of controls and host state."""
        return self.result.succeeded

    @property
    def failed_entry(self) -> bool:
        """Whether the exit is a VM-entry failure (bit 31 of the exit reason)."""
        return self.entered and bool(self[F.EXIT_REASON] & ENTRY_FAILURE)

    @property
    def reason(self) -> int:
        """The basic exit reason; Broken where there was no exit."""
        if not self.entered:
            raise Broken(f"no VM exit: {self.describe()}")
        return self[F.EXIT_REASON] & BASIC_REASON

    @property
    def qualification(self) -> int:
        """The exit qualification."""
        return self[F.EXIT_QUALIFICATION]

    @property
    def length(self) -> int:
        """The VM-exit instruction length."""
        return self[F.EXIT_INSTRUCTION_LENGTH]

    @property
    def rip(self) -> int:
        """L2's RIP at the exit."""
        return self[F.GUEST_RIP]

    def describe(self) -> str:
        """What happened, for a message."""
        result = self.result
        if result.outcome is VmxOutcome.FAIL_VALID:
            return f"VMfailValid {_named(VmInstructionError, result.error)}"
        if result.outcome is VmxOutcome.FAIL_INVALID:
            return "VMfailInvalid"
        reason = self[F.EXIT_REASON]
        failure = "VM-entry failure, " if reason & ENTRY_FAILURE else ""
        basic = reason & BASIC_REASON
        text = f"{failure}exit {_named(ExitReason, basic)}, "
        text += f"qualification {words(self.qualification)}, RIP {words(self.rip)}"
        if basic == ExitReason.EXCEPTION_OR_NMI:
            text += f", interruption information {words(self[F.EXIT_INTERRUPTION_INFORMATION])}"
        if basic == ExitReason.VMCALL and (vector := self.vector_of(self.rip)) is not None:
            text += f": L2's handler of vector {vector}"
        return text

    # -- demands -------------------------------------------------------------------------------

    def exits_with(self, reason: ExitReason, qualification: int | None = None) -> None:
        """L2 ran and exited for `reason`, and with `qualification` where that is given."""
        if not self.entered or self[F.EXIT_REASON] != reason:
            raise Broken(f"{self.describe()}; must be exit {_named(ExitReason, reason)}")
        if qualification is not None:
            equal(f"the exit qualification of {reason.name}", self.qualification, qualification)

    def ends(self) -> None:
        """L2 ran to the VMCALL behind its code: nothing exited, nothing faulted."""
        self.exits_with(ExitReason.VMCALL)
        if (vector := self.vector_of(self.rip)) is not None:
            raise Broken(f"L2 got exception {vector}; must run to its end")

    def delivers(self, vector: int) -> None:
        """L2's own handler of `vector` was called, without a VM exit before."""
        if not self.entered or self[F.EXIT_REASON] != ExitReason.VMCALL:
            raise Broken(f"{self.describe()}; must deliver vector {vector} to L2")
        if self.vector_of(self.rip) != vector:
            raise Broken(f"{self.describe()}; must be L2's handler of vector {vector}")

    def exits_with_exception(self, vector: int, error_code: int | None = None) -> None:
        """L2's exception `vector` caused the exit, with its error code where it has one."""
        self.exits_with(ExitReason.EXCEPTION_OR_NMI)
        information = self[F.EXIT_INTERRUPTION_INFORMATION]
        equal("the vector in the VM-exit interruption information", information & 0xFF, vector)
        equal("the valid bit of the interruption information", information >> 31, 1)
        equal("the error-code bit", information >> 11 & 1, int(error_code is not None))
        if error_code is not None:
            equal("the error code", self[F.EXIT_INTERRUPTION_ERROR_CODE], error_code)

    def fails_valid(self, error: VmInstructionError) -> None:
        """The entry was VMfailValid with this VM-instruction error."""
        got = self.result
        if got.outcome is not VmxOutcome.FAIL_VALID or got.error != error:
            raise Broken(
                f"{self.describe()}; must be VMfailValid {_named(VmInstructionError, error)}"
            )

    def entry_fails(self, reason: ExitReason, qualification: int | None = None) -> None:
        """The entry failed while or after guest state was loaded: bit 31 and `reason`."""
        if not self.entered or self[F.EXIT_REASON] != ENTRY_FAILURE | reason:
            raise Broken(f"{self.describe()}; must be the VM-entry failure {reason.name}")
        if qualification is not None:
            equal("the exit qualification of the failure", self.qualification, qualification)


def _named(kind: type[ExitReason] | type[VmInstructionError], value: int) -> str:
    try:
        return f"{value} ({kind(value).name})"
    except ValueError:
        return str(value)
