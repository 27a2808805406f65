"""A processor of KVM: run it, look at it, and the rule about L2's state.

KVM_RUN may come back while the processor is in L2: a signal interrupted it, and what KVM then gives
and takes as the processor's state is L2's.  To write a register back that nobody changed is
harmless with L1's state and destroys L2's: KVM takes a write of CR4 for L1's doing and moves the
read shadow.  So nothing here writes registers after the start, and who asks for it is refused while
the state is L2's.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import threading
from collections.abc import Mapping
from typing import Final

from undervisor.arch.kvm import (
    CPUID_ENTRY,
    CPUID_HEADER,
    EXIT_REASON_AT,
    FLAGS_AT,
    IMMEDIATE_EXIT_AT,
    MP_STATE,
    MSR_ENTRY,
    MSRS_HEADER,
    NESTED_STATE_MOST,
    REGS,
    SREGS_SIZE,
    MpState,
    Request,
    RunFlags,
)
from undervisor.arch.x86.boot import BootState
from undervisor.errors import BadInput
from undervisor.targets.kvm.device import Calls, Facts, Leaf
from undervisor.targets.kvm.registers import (
    FIRMWARE_MSRS,
    General,
    boot_general,
    boot_special,
    general,
    in_words,
    packed,
)

KICK: Final = signal.SIGUSR1
INTERRUPTS_ENABLED: Final = 1 << 9
_REASON, _FLAGS = struct.Struct("<I"), struct.Struct("<H")
_NESTED_GUEST_MODE: Final = 1 << 0
"""KVM_STATE_NESTED_GUEST_MODE, in the first word of a nested state."""
_L2_BIT: Final = int(RunFlags.guest_mode)


class Vcpu:
    """One processor; all but `kick` and `poke` belong to the thread that runs it."""

    def __init__(self, calls: Calls, number: int, index: int, page_size: int, facts: Facts) -> None:
        self._calls, self._number, self.index, self._facts = calls, number, index, facts
        self.page = calls.shared(number, page_size)
        self.exits = self.exits_in_l2 = 0
        self.thread: int | None = None
        """The thread that runs it, as `threading.get_ident` names it."""

    # -- before the first run ----------------------------------------------------------------

    def set_up(self, leaves: list[Leaf], boot: BootState | None) -> None:
        """CPUID, the MSRs that firmware sets, and on the first processor the image's start."""
        entries = b"".join(CPUID_ENTRY.pack(*leaf) for leaf in leaves)
        self._set(Request.SET_CPUID2, CPUID_HEADER.pack(len(leaves), 0) + entries)
        msrs = b"".join(MSR_ENTRY.pack(msr, 0, value) for msr, value in FIRMWARE_MSRS.items())
        self._set(Request.SET_MSRS, MSRS_HEADER.pack(len(FIRMWARE_MSRS), 0) + msrs)
        if boot is not None:
            self._set(Request.SET_SREGS, boot_special(boot, self.special()))
            self._set(Request.SET_REGS, packed(boot_general(boot)))

    # -- running -----------------------------------------------------------------------------

    def run(self) -> int | None:
        """Run until an exit, and why it came; None where only a signal or a start-up IPI did."""
        try:
            self._calls.ioctl(self._number, Request.RUN)
        except (InterruptedError, BlockingIOError):
            self._note(interrupted=True)
            self.page[IMMEDIATE_EXIT_AT] = 0
            return None
        self._note()
        return int(_REASON.unpack_from(self.page, EXIT_REASON_AT)[0])

    def _note(self, interrupted: bool = False) -> None:
        self.exits += 1
        # Only an interrupted run leaves L2's state behind where the kernel does not say so.
        if self.in_l2 if interrupted or self._facts.tells_l2 else False:
            self.exits_in_l2 += 1

    @property
    def in_l2(self) -> bool:
        """Whether the state is L2's: the flag of the last exit, or else the nested state's."""
        if self._facts.tells_l2:
            return bool(_FLAGS.unpack_from(self.page, FLAGS_AT)[0] & _L2_BIT)
        if not self._facts.nested_state or not self._facts.vendors:
            return False
        return bool(_FLAGS.unpack_from(self.nested_state())[0] & _NESTED_GUEST_MODE)

    def kick(self) -> None:
        """Let the run that goes on, or the next one, come back at once."""
        self.page[IMMEDIATE_EXIT_AT] = 1
        self.poke()

    def poke(self) -> None:
        """Interrupt the run that goes on, if one does, as an L0 is interrupted at any time."""
        if self.thread is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self.thread, KICK)

    def runs_here(self) -> None:
        """The calling thread is the one that runs it."""
        self.thread = threading.get_ident()

    # -- looking -----------------------------------------------------------------------------

    def general(self) -> General:
        """The general-purpose registers, RIP and RFLAGS; L2's where `in_l2`."""
        return general(self._get(Request.GET_REGS, REGS.size))

    def special(self) -> bytes:
        """Segments, tables and control registers: a `kvm_sregs`."""
        return self._get(Request.GET_SREGS, SREGS_SIZE)

    def in_words(self) -> str:
        """The registers for a person, and whose they are."""
        whose = "L2" if self.in_l2 else "L1"
        words = in_words(self._get(Request.GET_REGS, REGS.size), self.special())
        return f"{whose} on vCPU {self.index}:\n{words}"

    @property
    def waits_for_ever(self) -> bool:
        """Whether it waits for what another processor would have to do: HLT without IF, or SIPI."""
        (state,) = MP_STATE.unpack(self._get(Request.GET_MP_STATE, MP_STATE.size))
        if state in (MpState.UNINITIALIZED, MpState.INIT_RECEIVED):
            return True
        if state != MpState.HALTED or self.in_l2:
            return False
        return not self.general()["rflags"] & INTERRUPTS_ENABLED

    # -- what a caller may ask for --------------------------------------------------------------

    def set_general(self, changed: Mapping[str, int]) -> None:
        """Write these registers and no other; BadInput while the state is L2's."""
        if self.in_l2:
            raise BadInput(
                f"vCPU {self.index} is in L2: what would be written are L2's registers, not L1's",
                hint="ask again later; the state is L1's at any exit that is no interruption",
            )
        before = self.general()
        if unknown := changed.keys() - before.keys():
            raise BadInput(f"no general-purpose register is called {sorted(unknown)[0]!r}")
        if any(before[name] != value for name, value in changed.items()):
            self._set(Request.SET_REGS, packed(before | dict(changed)))

    def nested_state(self) -> bytes:
        """KVM_GET_NESTED_STATE: what a migration moves; `undervisor state` decodes it."""
        if not self._facts.nested_state:
            raise BadInput("this KVM has no KVM_CAP_NESTED_STATE")
        buffer = bytearray(NESTED_STATE_MOST)
        struct.pack_into("<I", buffer, 4, len(buffer))
        self._calls.ioctl(self._number, Request.GET_NESTED_STATE, buffer)
        return bytes(buffer[: struct.unpack_from("<I", buffer, 4)[0]])

    def set_nested_state(self, blob: bytes) -> None:
        """KVM_SET_NESTED_STATE; BadInput where KVM refuses it."""
        try:
            self._set(Request.SET_NESTED_STATE, blob)
        except OSError as error:
            raise BadInput(
                f"KVM_SET_NESTED_STATE: {error.strerror}",
                hint="`undervisor state` says what is wrong with a blob",
            ) from None

    # -- calls -------------------------------------------------------------------------------

    def _get(self, request: Request, size: int) -> bytes:
        buffer = bytearray(size)
        self._calls.ioctl(self._number, request, buffer)
        return bytes(buffer)

    def _set(self, request: Request, argument: bytes) -> None:
        self._calls.ioctl(self._number, request, bytearray(argument))
