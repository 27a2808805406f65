"""A machine whose L2 exceptions its owner sees first: before L1 does, and before L2's own handler.

The silicon intercepts the watched vectors whether L1 wants them or not; what the owner passes on
goes the way that it would have gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from iced_x86 import Mnemonic

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.events import Fault, GuestFault, Vector
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits.exceptions import EMULATED
from undervisor.hypervisor.inspect import World
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.nested import GuestExit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import RESUME, Inject, Verdict

WATCHABLE: Final = frozenset(Vector) - {Vector.NMI, Vector.BP, Vector.OF}
"""Not #BP and #OF: to the silicon INT3 and INTO are software interrupts."""

# In L2 these are always VM exits or do what they do; #UD is only the silicon's.
_VMX_MNEMONICS: Final = frozenset(
    {
        Mnemonic.INVEPT,
        Mnemonic.INVVPID,
        Mnemonic.VMCALL,
        Mnemonic.VMCLEAR,
        Mnemonic.VMFUNC,
        Mnemonic.VMLAUNCH,
        Mnemonic.VMPTRLD,
        Mnemonic.VMPTRST,
        Mnemonic.VMREAD,
        Mnemonic.VMRESUME,
        Mnemonic.VMWRITE,
        Mnemonic.VMXOFF,
        Mnemonic.VMXON,
    }
)

_EXCEPTION_WORD: Final = VmcbField.INTERCEPT_EXCEPTIONS >> 2


class Decision(Enum):
    """What becomes of an exception of L2."""

    PASS = "on its way: to L1 where L1 intercepts it, else to L2's handler"
    SWALLOW = "it has not happened: L2 goes on at its RIP, which may have been changed"


@dataclass(frozen=True, slots=True)
class L2Exception:
    """An exception that L2 raised; `world` is L2 as it is at this instant, to read and to write.

    `error_code` and `address` (of a page fault; CR2 is not yet written) are None where the
    exception has none.
    """

    vcpu: int
    vector: int
    error_code: int | None
    address: int | None
    world: World


OnException = Callable[[L2Exception], Decision]


class WatchedMachine(Machine):
    """`Machine` with a look at L2's exceptions."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._watched = 0
        self._on_exception: OnException = lambda exception: Decision.PASS

    def watch_exceptions(self, vectors: frozenset[int], on_exception: OnException) -> None:
        """From now on, tell `on_exception` of these vectors in L2; none ends the watch."""
        refused = sorted(vectors - WATCHABLE)
        if refused:
            raise ValueError(f"vectors {refused}: these cannot be watched")
        self._watched = sum(1 << vector for vector in vectors)
        self._on_exception = on_exception
        if self.current.in_l2:
            self._arm(self.current)

    def _arm(self, vcpu: Vcpu) -> None:
        """Intercept in the running world and whenever its VMCB is loaded again."""
        vcpu.vmcb.d[_EXCEPTION_WORD] |= self._watched
        vcpu.state.intercept_exceptions |= self._watched

    def _decide(self, vcpu: Vcpu, exit: Exit) -> Verdict:
        if not self._watched:
            return super()._decide(vcpu, exit)
        vector = exit.code - ExitCode.EXCP_DE
        watched = vcpu.in_l2 and 0 <= vector < 32 and self._watched >> vector & 1
        if watched and not (vector == Vector.UD and _is_instruction(vcpu)):
            verdict = self._show(vcpu, exit, vector)
        else:
            verdict = super()._decide(vcpu, exit)
        if vcpu.in_l2:
            self._arm(vcpu)
        return verdict

    def _show(self, vcpu: Vcpu, exit: Exit, vector: int) -> Verdict:
        fault = _raised(exit, vector)
        seen = L2Exception(vcpu.index, vector, fault.error_code, fault.address, World(vcpu, 2))
        if self._on_exception(seen) is Decision.SWALLOW:
            return RESUME
        try:
            return self._pass_on(vcpu, exit, fault)
        except GuestFault as other:
            return Inject(other.fault)
        except GuestExit as left:
            return left.verdict

    def _pass_on(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> Verdict:
        """Whatever would have become of it."""
        reflected = vcpu.nested.reflect(vcpu, exit)
        if reflected is not None:
            return reflected
        handler = vcpu.l2_handlers.get(exit.code)
        if handler is not None:
            return handler(vcpu, exit)
        return Inject(fault)


def _is_instruction(vcpu: Vcpu) -> bool:
    """Whether #UD of the silicon is an instruction that the processor of L1 and L2 has."""
    try:
        decoded = decode.instruction(vcpu)
    except (GuestFault, GuestExit):
        return False
    feature, _ = EMULATED.get(decoded.code, ("", None))
    if feature:
        return vcpu.has(feature)
    return vcpu.has("vmx") and decoded.mnemonic in _VMX_MNEMONICS


def _raised(exit: Exit, vector: int) -> Fault:
    named = Vector(vector)
    address = exit.info2 if named is Vector.PF else None
    return Fault(named, exit.info1 if named.has_error_code else None, address)
