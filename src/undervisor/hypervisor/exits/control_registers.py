"""MOV to and from control registers, LMSW and CLTS, with the faults for reserved bits."""

from __future__ import annotations

from iced_x86 import Code

from undervisor.arch.x86.events import GP0, Fault
from undervisor.arch.x86.paging import check_pdptes
from undervisor.arch.x86.registers import (
    CR3_PAE_ROOT,
    Cr0,
    Cr3,
    Cr4,
    Efer,
    legalize_cr0,
    legalize_cr3,
    legalize_cr4,
    legalize_cr8,
    legalize_lmsw,
)
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict

_SMSW = (Code.SMSW_RM16, Code.SMSW_R32M16, Code.SMSW_R64M16)
_LMSW = (Code.LMSW_RM16, Code.LMSW_R32M16, Code.LMSW_R64M16)


def write(vcpu: Vcpu, exit: Exit) -> Verdict:
    """MOV to CR0, CR3, CR4 or CR8; LMSW; CLTS."""
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.CLTS:
        fault = write_cr0(vcpu, vcpu.state.cr0 & ~Cr0.ts)
    elif decoded.code in _LMSW:
        source = machine_status_word(vcpu, decoded)
        if isinstance(source, Fault):
            return Inject(source)
        fault = write_cr0(vcpu, legalize_lmsw(vcpu.state.cr0, source))
    else:
        value = decode.read_register(vcpu, decoded.op1_register)
        fault = _WRITERS[exit.code & 0xF](vcpu, value)
    return Inject(fault) if fault else ADVANCE[decoded.len]


def read(vcpu: Vcpu, exit: Exit) -> Verdict:
    """MOV from a control register."""
    decoded = decode.instruction(vcpu)
    number = exit.code & 0xF
    state = vcpu.state
    value = (
        vcpu.lapic.cr8 if number == 8 else (state.cr0, 0, state.cr2, state.cr3, state.cr4)[number]
    )
    return store(vcpu, decoded, value)


def store(vcpu: Vcpu, decoded: decode.Instruction, value: int) -> Verdict:
    """Complete MOV from a control register, or SMSW, with `value`."""
    if decoded.code in _SMSW:
        return _store_machine_status(vcpu, decoded, value)
    decode.write_register(vcpu, decoded.op0_register, value)
    return ADVANCE[decoded.len]


def machine_status_word(vcpu: Vcpu, decoded: decode.Instruction) -> int | Fault:
    """The 16-bit source of LMSW, from a register or from memory."""
    if decoded.op0_kind == decode.OpKind.REGISTER:
        return decode.read_register(vcpu, decoded.op0_register) & 0xFFFF
    data = vcpu.read_gva(decode.linear_address(vcpu, decoded, 0), 2)
    return data if isinstance(data, Fault) else int.from_bytes(data, "little")


def _store_machine_status(vcpu: Vcpu, decoded: decode.Instruction, value: int) -> Verdict:
    """SMSW to a register or to 2 bytes of memory."""
    if decoded.op0_kind == decode.OpKind.REGISTER:
        decode.write_register(vcpu, decoded.op0_register, value)
        return ADVANCE[decoded.len]
    where = decode.linear_address(vcpu, decoded, 0)
    fault = vcpu.write_gva(where, (value & 0xFFFF).to_bytes(2, "little"))
    return Inject(fault) if fault else ADVANCE[decoded.len]


def write_cr0(vcpu: Vcpu, value: int) -> Fault | None:
    """Load CR0 in the running world; the fault where that is illegal."""
    state = vcpu.state
    legal = legalize_cr0(
        state.cr0, value, cr4=state.cr4, efer=state.efer, cs_long=bool(state.hflags & 0x8000)
    )
    if isinstance(legal, Fault):
        return legal
    if not vcpu.nested.allows_cr0(vcpu, legal):
        return GP0
    if _loads_pdptes(legal, state.cr4, state.efer) and (legal ^ state.cr0) & _PDPTE_BITS_CR0:
        fault = check_page_directory_pointers(vcpu, state.cr3)
        if fault:
            return fault
    if legal != state.cr0:
        vcpu.set_cr0(legal)
    return None


def write_cr3(vcpu: Vcpu, value: int) -> Fault | None:
    """Load CR3 in the running world."""
    state = vcpu.state
    if not state.cr4 & Cr4.pcide and value & Cr3.no_flush and state.efer & Efer.lma:
        return GP0
    legal = legalize_cr3(
        value, cr4=state.cr4, efer=state.efer, physical_width=vcpu.model.physical_width
    )
    if isinstance(legal, Fault):
        return legal
    if _loads_pdptes(state.cr0, state.cr4, state.efer):
        fault = check_page_directory_pointers(vcpu, legal)
        if fault:
            return fault
    vcpu.set_cr3(legal)
    return None


def write_cr4(vcpu: Vcpu, value: int) -> Fault | None:
    """Load CR4 in the running world."""
    state = vcpu.state
    legal = legalize_cr4(
        state.cr4,
        value,
        supported=vcpu.model.cr4_supported,
        cr0=state.cr0,
        cr3=state.cr3,
        efer=state.efer,
    )
    if isinstance(legal, Fault):
        return legal
    if not vcpu.nested.allows_cr4(vcpu, legal):
        return GP0
    if _loads_pdptes(state.cr0, legal, state.efer) and (legal ^ state.cr4) & _PDPTE_BITS_CR4:
        fault = check_page_directory_pointers(vcpu, state.cr3)
        if fault:
            return fault
    vcpu.set_cr4(legal)
    return None


def write_cr8(vcpu: Vcpu, value: int) -> Fault | None:
    """Load CR8, the task priority."""
    legal = legalize_cr8(value)
    if isinstance(legal, Fault):
        return legal
    vcpu.lapic.cr8 = legal
    vcpu.attention = True
    return None


_WRITERS = {0: write_cr0, 3: write_cr3, 4: write_cr4, 8: write_cr8}

_PDPTE_BITS_CR0 = Cr0.pg | Cr0.cd | Cr0.nw
_PDPTE_BITS_CR4 = Cr4.pae | Cr4.pge | Cr4.pse | Cr4.smep


def _loads_pdptes(cr0: int, cr4: int, efer: int) -> bool:
    """Whether PAE paging is on: SDM 3A "PDPTE Registers"."""
    return bool(cr0 & Cr0.pg and cr4 & Cr4.pae and not efer & Efer.lme)


def check_page_directory_pointers(vcpu: Vcpu, cr3: int) -> Fault | None:
    """#GP when a PDPTE that is present has a reserved bit."""
    root = cr3 & CR3_PAE_ROOT
    vcpu.linear = None  # an exit that reading them causes has no linear address
    pdptes = [vcpu.read_gpa_u64(root + 8 * index) for index in range(4)]
    return None if check_pdptes(pdptes, vcpu.model.physical_width) else GP0
