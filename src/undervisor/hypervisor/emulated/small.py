"""INVPCID, RDPID, RDRAND and RDSEED."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.x86.events import GP0, UD, Fault
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import is_canonical, linear_width
from undervisor.arch.x86.registers import CR3_PCID, Cr0, Cr4, Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_ARITHMETIC: Final = Rflags.cf | Rflags.pf | Rflags.af | Rflags.zf | Rflags.sf | Rflags.of_
_INDIVIDUAL, _SINGLE_CONTEXT, _LAST_TYPE = 0, 1, 3


def invpcid(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """INVPCID. SDM 2A "INVPCID--Invalidate Process-Context Identifier"."""
    # FAULTS
    state = vcpu.state
    if not state.cr0 & Cr0.pe:
        return Inject(UD)
    if state.cpl:
        return Inject(GP0)
    kind = decode.read_register(vcpu, decoded.op0_register)
    descriptor = vcpu.read_gva(decode.linear_address(vcpu, decoded, 1), 16)
    if isinstance(descriptor, Fault):
        return Inject(descriptor)
    # CHECKS
    low, gva = (int.from_bytes(descriptor[i : i + 8], "little") for i in (0, 8))
    if kind > _LAST_TYPE or low >> 12:
        return Inject(GP0)
    if kind == _INDIVIDUAL and not is_canonical(gva, linear_width(state.cr4)):
        return Inject(GP0)
    if kind in (_INDIVIDUAL, _SINGLE_CONTEXT) and low & CR3_PCID and not state.cr4 & Cr4.pcide:
        return Inject(GP0)
    # OPERATION: no translation outlives a load of CR3 here, so only the current ones can exist
    vcpu.processor.flush()
    return ADVANCE[decoded.len]


def rdpid(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """RDPID: IA32_TSC_AUX into a register."""
    decode.write_register(vcpu, decoded.op0_register, vcpu.msrs[Msr.TSC_AUX] & 0xFFFF_FFFF)
    return ADVANCE[decoded.len]


def random(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """RDRAND and RDSEED: a generator with a fixed seed, so that runs repeat."""
    decode.write_register(vcpu, decoded.op0_register, vcpu.machine.random())
    vcpu.state.rflags = vcpu.state.rflags & ~_ARITHMETIC | Rflags.cf
    return ADVANCE[decoded.len]
