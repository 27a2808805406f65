"""Exits of L2 that L1 did not want and that mean something else there than in L1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.x86.events import EventType, Fault
from undervisor.arch.x86.registers import legalize_cr8
from undervisor.hypervisor import decode
from undervisor.hypervisor.exits import control_registers, halt
from undervisor.hypervisor.nested.svm import events, information, instructions, reflect
from undervisor.hypervisor.verdict import ADVANCE, Inject, Switched, Verdict
from undervisor.silicon.glue import EXIT_BUDGET

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_V_TPR: Final = int(VirtualInterrupt.v_tpr)
_V_GIF: Final = int(VirtualInterrupt.v_gif)
_V_GIF_ENABLE: Final = int(VirtualInterrupt.v_gif_enable)


def exception(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """L0 saw it only because it may become a double fault, which L1 wants to see."""
    return Inject(reflect.raised_by(exit))


def software_interrupt(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """INT n, INT3 or INTO that L1 does not want."""
    vector, length = information.software_vector(vcpu)
    svm.software_rip = vcpu.state.rip
    plain = decode.instruction(vcpu).code == decode.Code.INT_IMM8
    kind = EventType.SOFTWARE_INTERRUPT if plain else EventType.EXCEPTION
    return Switched(vcpu.processor.inject_software(vector, length, kind))


def read_cr8(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """With V_INTR_MASKING CR8 is V_TPR. APM 2 "Virtual TPR"."""
    if not svm.masks_interrupts:
        return control_registers.read(vcpu, exit)
    decoded = decode.instruction(vcpu)
    decode.write_register(vcpu, decoded.op0_register, svm.virtual & 0xF)
    return ADVANCE[decoded.len]


def write_cr8(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """V_TPR, and without V_INTR_MASKING the physical TPR as well."""
    decoded = decode.instruction(vcpu)
    value = legalize_cr8(decode.read_register(vcpu, decoded.op1_register))
    if isinstance(value, Fault):
        return Inject(value)
    svm.virtual = svm.virtual & ~_V_TPR | value
    if not svm.masks_interrupts:
        vcpu.lapic.cr8 = value
    vcpu.attention = True
    return ADVANCE[decoded.len]


def stgi(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """STGI in L2: V_GIF where it is enabled. APM 2 "Virtual GIF"."""
    if not svm.virtual & _V_GIF_ENABLE:
        return instructions.stgi(svm, vcpu, exit)
    svm.virtual |= _V_GIF
    vcpu.attention = True
    return ADVANCE[decode.length(vcpu)]


def clgi(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """CLGI in L2."""
    if not svm.virtual & _V_GIF_ENABLE:
        return instructions.clgi(svm, vcpu, exit)
    svm.virtual &= ~_V_GIF
    return ADVANCE[decode.length(vcpu)]


def vmload(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """VMLOAD in L2: rAX is guest-physical with VMSAVE and VMLOAD virtualization."""
    gpa, length = instructions.physical_operand(vcpu)
    instructions.load_extra(svm, vcpu, _system_address(svm, vcpu, gpa))
    return ADVANCE[length]


def vmsave(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """VMSAVE in L2."""
    gpa, length = instructions.physical_operand(vcpu)
    vcpu.processor.save_extra(svm.at(_system_address(svm, vcpu, gpa, write=True)))
    return ADVANCE[length]


def _system_address(svm: SvmState, vcpu: Vcpu, gpa: int, *, write: bool = False) -> int:
    return vcpu.nested.to_hpa(vcpu, gpa, write=write) if svm.virtual_vmload else gpa


def monitor(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """MONITOR arms what MWAIT's conditional intercept asks about."""
    verdict = halt.monitor(vcpu, exit)
    svm.monitor_armed = not isinstance(verdict, Inject)
    return verdict


L2_EXITS: Final = {
    **dict.fromkeys(range(ExitCode.EXCP_DE, ExitCode.EXCP_31 + 1), exception),
    ExitCode.SWINT: software_interrupt,
    ExitCode.CR8_READ: read_cr8,
    ExitCode.CR8_WRITE: write_cr8,
    ExitCode.STGI: stgi,
    ExitCode.CLGI: clgi,
    ExitCode.VMLOAD: vmload,
    ExitCode.VMSAVE: vmsave,
    ExitCode.INVLPGA: instructions.invlpga,
    ExitCode.MONITOR: monitor,
    EXIT_BUDGET: events.end_of_slice,
}
del L2_EXITS[ExitCode.EXCP_UD]
