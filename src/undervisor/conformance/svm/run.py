"""An L2 that ran under SVM, or did not: what the VMCB says afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from undervisor.arch.svm.exits import ExitCode, signed_exit_code
from undervisor.arch.svm.vmcb import SIZE, EventInfo, Vmcb, VmcbField
from undervisor.conformance.expect import Broken, equal, words
from undervisor.guest.probe.answers import Answer, L2Run

Ranges = tuple[tuple[int, int], ...]
"""Offsets and sizes of parts of a VMCB."""
READ: Final[Ranges] = ((0, 0x158), (0x400, 0x2A0))
"""What is read of a VMCB after an exit: the control and the save area."""
BRIEF: Final[Ranges] = ((0x60, 0x70), (0x570, 0x90))
"""The exit's information, nRIP, RFLAGS, RIP, RSP and RAX."""


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of one VMRUN; there when its batch has run."""

    answer: Answer[L2Run]
    parts: tuple[Answer[bytes], ...]
    vector_of: Callable[[int], int | None]
    ranges: Ranges = READ

    @property
    def vmcb(self) -> Vmcb:
        """The VMCB after the exit."""
        _ = self.answer.value
        area = bytearray(SIZE)
        for (offset, size), part in zip(self.ranges, self.parts, strict=True):
            area[offset : offset + size] = part.value
        return Vmcb(area)

    def __getitem__(self, field: VmcbField) -> int:
        return self.vmcb[field]

    @property
    def registers(self) -> Mapping[str, int]:
        """L2's general registers at the exit, RSP excepted."""
        return {**self.answer.value.registers, "rax": self[VmcbField.RAX]}

    @property
    def code(self) -> int:
        """EXITCODE, as a signed number; of 64 bits, or of 32 where the high half is 0."""
        return signed_exit_code(self[VmcbField.EXITCODE])

    @property
    def info1(self) -> int:
        """EXITINFO1."""
        return self[VmcbField.EXITINFO1]

    @property
    def info2(self) -> int:
        """EXITINFO2."""
        return self[VmcbField.EXITINFO2]

    @property
    def rip(self) -> int:
        """L2's RIP at the exit."""
        return self[VmcbField.RIP]

    def describe(self) -> str:
        """What happened, for a message."""
        text = f"#VMEXIT {_named(self.code)}, EXITINFO1 {words(self.info1)}, "
        text += f"EXITINFO2 {words(self.info2)}, RIP {words(self.rip)}"
        if self.code == ExitCode.VMMCALL and (vector := self.vector_of(self.rip)) is not None:
            text += f": L2's handler of vector {vector}"
        return text

    # -- demands -------------------------------------------------------------------------------

    def exits_with(
        self, code: ExitCode, info1: int | None = None, info2: int | None = None
    ) -> None:
        """L2 exited with `code`, and with EXITINFO1 and EXITINFO2 where they are given."""
        if self.code != code:
            raise Broken(f"{self.describe()}; must be #VMEXIT {_named(code)}")
        if info1 is not None:
            equal(f"EXITINFO1 of {code.name}", self.info1, info1)
        if info2 is not None:
            equal(f"EXITINFO2 of {code.name}", self.info2, info2)

    def ends(self) -> None:
        """L2 ran to the VMMCALL behind its code: nothing exited, nothing faulted."""
        self.exits_with(ExitCode.VMMCALL)
        if (vector := self.vector_of(self.rip)) is not None:
            raise Broken(f"L2 got exception {vector}; must run to its end")

    def delivers(self, vector: int) -> None:
        """L2's own handler of `vector` was called, without another exit before."""
        if self.code != ExitCode.VMMCALL:
            raise Broken(f"{self.describe()}; must deliver vector {vector} to L2")
        if self.vector_of(self.rip) != vector:
            raise Broken(f"{self.describe()}; must be L2's handler of vector {vector}")

    def is_invalid(self) -> None:
        """VMRUN found the VMCB's state illegal: VMEXIT_INVALID."""
        self.exits_with(ExitCode.INVALID)

    def interrupted(self, vector: int, kind: int, error_code: int | None = None) -> None:
        """EXITINTINFO names the event whose delivery the exit interrupted."""
        info = EventInfo(self[VmcbField.EXITINTINFO])
        equal("the valid bit of EXITINTINFO", info.v, 1)
        equal("the vector in EXITINTINFO", info.vector, vector)
        equal("the type in EXITINTINFO", info.type, kind)
        equal("EXITINTINFO.EV", info.ev, int(error_code is not None))
        if error_code is not None:
            equal("the error code in EXITINTINFO", info.error_code, error_code)


def _named(code: int) -> str:
    try:
        return f"{words(int(code))} ({ExitCode(code).name})"
    except ValueError:
        return words(code)
