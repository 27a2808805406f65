"""SVM's instructions as L1 executes them. APM 3 "System Instructions".

The silicon has checked EFER.SVME, CR0.PE and the privilege level before it exits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import DB, GP0, GuestFault
from undervisor.arch.x86.paging import sign_extend
from undervisor.arch.x86.registers import Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.nested.svm import entry
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.layout import Env, Hflags

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_DR0, _DR7, _RFLAGS = Env.DR0 >> 3, Env.DR7 >> 3, Env.RFLAGS >> 3
_HFLAGS: Final = Env.HFLAGS >> 2
_BREAKPOINTS: Final = 0xFF
_CS64: Final = 1 << Hflags.CS64
_PLAIN_LENGTH: Final = 3
_ADDRESS_SIZE: Final = 0x67
_OPCODE: Final = 0x0F
_BASES: Final = (
    (F.FS_BASE >> 3, Env.FS),
    (F.GS_BASE >> 3, Env.GS),
    (F.LDTR_BASE >> 3, Env.LDTR),
    (F.TR_BASE >> 3, Env.TR),
)
_KERNEL_GS_BASE: Final = F.KERNEL_GS_BASE >> 3


def vmrun(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """VMRUN rAX."""
    # FAULTS
    if vcpu.state.q[_DR7] & _BREAKPOINTS and _at_breakpoint(vcpu):
        return Inject(DB)
    gpa, length = physical_operand(vcpu)
    # CHECKS
    vmcb12 = svm.at(gpa)
    verdict = svm.checker(vcpu).check(vmcb12)
    if verdict is not None:
        svm.broken = verdict
        return entry.fail(vcpu, svm, vmcb12, length)
    # OPERATION, SUCCESS
    return entry.enter(vcpu, svm, vmcb12, length)


def _at_breakpoint(vcpu: Vcpu) -> bool:
    """Whether an instruction breakpoint is on this VMRUN; says so in DR6.

    The silicon knows no breakpoints; but this is what RFLAGS.RF of the host is about.
    """
    state = vcpu.state
    if state.q[_RFLAGS] & Rflags.rf:
        return False
    dr7, rip = state.q[_DR7], vcpu.linear_rip()
    hits = sum(
        1 << n
        for n in range(4)
        if dr7 >> 2 * n & 3 and not dr7 >> (16 + 4 * n) & 0xF and state.q[_DR0 + n] == rip
    )
    if hits:
        state.dr6 = state.dr6 & ~0xF | hits
    return bool(hits)


def vmload(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """VMLOAD rAX."""
    # FAULTS
    gpa, length = physical_operand(vcpu)
    # OPERATION
    load_extra(svm, vcpu, gpa)
    # SUCCESS
    return ADVANCE[length]


def load_extra(svm: SvmState, vcpu: Vcpu, hpa: int) -> None:
    """Load FS, GS, TR, LDTR and the MSRs from a VMCB; bases become canonical."""
    vmcb = svm.at(hpa)
    vcpu.processor.load_extra(vmcb)
    q, state = vmcb.q, vcpu.state
    for index, register in _BASES:
        state.set_segment_base(register, sign_extend(q[index]))
    state.kernel_gs_base = sign_extend(q[_KERNEL_GS_BASE])


def vmsave(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """VMSAVE rAX."""
    # FAULTS
    gpa, length = physical_operand(vcpu)
    # OPERATION
    vcpu.processor.save_extra(svm.at(gpa))
    # SUCCESS
    return ADVANCE[length]


def stgi(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """STGI: whatever was held off is looked at now."""
    # OPERATION
    vcpu.gif = True
    vcpu.attention = True
    # SUCCESS
    return ADVANCE[decode.length(vcpu)]


def clgi(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """CLGI: interrupts, NMIs and INITs are held off."""
    # OPERATION
    vcpu.gif = False
    vcpu.processor.request_window(False)
    # SUCCESS
    return ADVANCE[decode.length(vcpu)]


def invlpga(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """INVLPGA rAX, ECX: the linear address in the address space ECX; 0 is the host's.

    The silicon keeps no translation of L2 across a switch of worlds; what a shadow has of it
    came from L1's nested tables, which the next entry compares.
    """
    # OPERATION
    if vcpu.state.q[1] & 0xFFFF_FFFF:
        svm.shadows.stale = True
    else:
        vcpu.processor.flush_page(vcpu.state.q[0])
    # SUCCESS
    return ADVANCE[decode.length(vcpu)]


def physical_operand(vcpu: Vcpu) -> tuple[int, int]:
    """The physical address in rAX and the instruction's length; #GP(0) where it is not allowed."""
    length, state = decode.length(vcpu), vcpu.state
    address = state.q[0]
    if length != _PLAIN_LENGTH or not state.d[_HFLAGS] & _CS64:
        address &= _address_mask(vcpu, length)
    if address & 0xFFF or address >> vcpu.model.physical_width:
        raise GuestFault(GP0)
    return address, length


def _address_mask(vcpu: Vcpu, length: int) -> int:
    """The width of rAX is the address size of the instruction."""
    bits = decode.bitness(vcpu)
    if length != _PLAIN_LENGTH:
        prefixes = decode.fetch(vcpu).split(bytes((_OPCODE,)))[0]
        if _ADDRESS_SIZE in prefixes:
            bits = 16 if bits == 32 else 32
    return (1 << bits) - 1
