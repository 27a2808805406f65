"""The valid states of `arch.svm.boundary`, as a running processor really enters them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from undervisor.arch.svm.boundary import MODES, State, valid_state
from undervisor.arch.svm.capabilities import SvmCapabilities, SvmFeatures
from undervisor.arch.svm.checks import check_vmrun
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, NestedControl, Vmcb
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.conformance.entries.legacy import outside_long_mode
from undervisor.guest.probe.l1 import DATA_SEGMENT, L1State
from undervisor.guest.probe.program import FREE

BASE: Final = FREE + (2 << 20)
HOST_SAVE, VMCB, TEMPLATES = (BASE + 0x1000 * n for n in (0, 1, 2))
CODE, STACK, IOPM, MSRPM = (BASE + 0x1000 * n for n in (16, 18, 20, 24))
NPT, PAE, AVIC = (BASE + 0x1000 * n for n in (28, 32, 36))
OUTSIDE: Final = BASE + 0x1000 * 40
END: Final = BASE + 0x1000 * 41
EXIT: Final = b"\x0f\x01\xd9"
"""VMMCALL, which is intercepted."""
EVERY_EXCEPTION: Final = 0xFFFF_FFFF
_VMRUN: Final = "mov $VMCB_AT, %eax; vmrun %eax; stgi"
_TABLE: Final = struct.Struct("<512Q")
_SEGMENTS: Final = (F.DS_SELECTOR, F.ES_SELECTOR, F.SS_SELECTOR)


def memory() -> Iterator[tuple[int, bytes]]:
    """What must be in memory before any VMRUN; the rest from `BASE` on to `END` is zero."""
    yield CODE, EXIT
    yield OUTSIDE, outside_long_mode(_VMRUN, OUTSIDE, VMCB_AT=VMCB)
    yield NPT, struct.pack("<Q", NPT + 0x1000 | 7)
    yield NPT + 0x1000, struct.pack("<Q", NPT + 0x2000 | 7)
    leaves = _TABLE.pack(*(n << 21 | 0x87 for n in range(512)))
    yield NPT + 0x2000, leaves
    yield PAE, struct.pack("<Q", PAE + 0x1000 | 1)
    yield PAE + 0x1000, leaves


class SvmStates:
    """The valid states that one processor enters."""

    def __init__(self, capabilities: SvmCapabilities, l1: L1State) -> None:
        self.capabilities = capabilities
        self._l1 = l1
        self._states = {mode: self._live(mode) for mode in MODES}

    def valid(self, mode: str) -> State:
        """The state `mode` with all fields."""
        return dict(self._states[mode])

    def broken(self, mode: str) -> list[str]:
        """The rules that `mode` breaks on this processor, which then cannot be in it."""
        verdict = check_vmrun(self._states[mode], self.capabilities)
        return [violation.rule.id for violation in verdict.broken]

    def vmcb(self, mode: str) -> bytes:
        """The VMCB of a valid state."""
        vmcb = Vmcb(bytearray(SIZE))
        for name, value in self._states[mode].items():
            vmcb[name] = value
        for first in _SEGMENTS:
            vmcb.set_segment(first, DATA_SEGMENT)
        return bytes(vmcb.b)

    def _live(self, mode: str) -> State:
        state, l1 = valid_state(mode), self._l1
        state[F.INTERCEPT_EXCEPTIONS] = EVERY_EXCEPTION
        state[F.INTERCEPT_WORD3] |= Intercept.HLT.mask | Intercept.SHUTDOWN.mask
        state[F.INTERCEPT_WORD4] |= Intercept.VMMCALL.mask
        state.update({F.IOPM_BASE_PA: IOPM, F.MSRPM_BASE_PA: MSRPM, F.RIP: CODE, F.RSP: STACK})
        state[F.CS_LIMIT] = 0xFFFF_FFFF
        if state[F.NESTED_CONTROL] & NestedControl.np_enable:
            state[F.N_CR3] = NPT
            if not self.capabilities.has(SvmFeatures.np):
                state[F.NESTED_CONTROL] = 0
        if state[F.EFER] & Efer.lme:
            state.update({F.EFER: l1.efer, F.CR0: l1.cr0, F.CR3: l1.cr3, F.CR4: l1.cr4})
        elif state[F.CR0] & Cr0.pg:
            state.update({F.CR0: l1.cr0, F.CR3: PAE, F.CR4: l1.cr4})
        if mode == "real":
            state[F.CS_BASE], state[F.CS_LIMIT], state[F.RIP] = CODE, 0xFFFF, 0
        if mode == "avic":
            state |= {F.AVIC_BACKING_PAGE: AVIC, F.AVIC_LOGICAL_TABLE: AVIC + 0x1000}
            state[F.AVIC_PHYSICAL_TABLE] = AVIC + 0x2000 | 3
        return state
