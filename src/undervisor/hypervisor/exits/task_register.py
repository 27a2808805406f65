"""LTR, which L0 carries out: the silicon would accept a null selector and abort much later."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.events import GP0, Fault, Vector
from undervisor.arch.x86.registers import Efer
from undervisor.arch.x86.segments import (
    SELECTOR_LDT,
    SELECTOR_RPL,
    Attributes,
    Segment,
    SystemType,
    parse_descriptor,
)
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.layout import Env

_BUSY: Final = SystemType.TSS_BUSY ^ SystemType.TSS_AVAILABLE
_SYSTEM: Final = Attributes.s | Attributes.type
_UPPER_TYPE: Final = 0x1F  # of byte 13 of a 16-byte descriptor, must be 0


def ltr(vcpu: Vcpu, exit: Exit) -> Verdict:
    """LTR; EXITINFO1 has the selector. SDM 2A "LTR--Load Task Register"."""
    selector = exit.info1 & 0xFFFF
    # FAULTS
    where = _descriptor_address(vcpu, selector)
    if isinstance(where, Fault):
        return Inject(where)
    long_mode = bool(vcpu.state.efer & Efer.lma)
    data = vcpu.read_gva_system(where, 16 if long_mode else 8)
    segment = parse_descriptor(data, selector)
    # CHECKS
    fault = _check(segment, data, long_mode)
    if fault:
        return Inject(fault)
    # OPERATION
    length = decode.length(vcpu)
    fault = vcpu.write_gva_system(where + 5, bytes([data[5] | _BUSY]))
    if fault:
        return Inject(fault)
    busy = Segment(selector, segment.base, segment.limit, segment.attributes | _BUSY)
    vcpu.reload(lambda vmcb: vmcb.set_segment(VmcbField.TR_SELECTOR, busy))
    return ADVANCE[length]


def _descriptor_address(vcpu: Vcpu, selector: int) -> int | Fault:
    """The linear address of the selector's descriptor in the GDT."""
    index = selector & ~(SELECTOR_RPL | SELECTOR_LDT)
    if not index and not selector & SELECTOR_LDT:
        return GP0
    _, _, limit, base = vcpu.state.segment(Env.GDTR)
    size = 16 if vcpu.state.efer & Efer.lma else 8
    if selector & SELECTOR_LDT or index + size - 1 > limit:
        return Fault(Vector.GP, selector & ~SELECTOR_RPL)
    return base + index


def _check(segment: Segment, data: bytes, long_mode: bool) -> Fault | None:
    """An available TSS that is present."""
    code = segment.selector & ~SELECTOR_RPL
    kinds = [SystemType.TSS_AVAILABLE] + ([] if long_mode else [SystemType.TSS16_AVAILABLE])
    if segment.attributes & _SYSTEM not in kinds or (long_mode and data[13] & _UPPER_TYPE):
        return Fault(Vector.GP, code)
    return None if segment.is_present else Fault(Vector.NP, code)
