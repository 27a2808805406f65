"""XSAVES and XRSTORS: the compacted form of x87 and SSE state.

The silicon has XSAVE in the standard form.  With only components 0 and 1 the compacted form has
the same legacy region and differs in the header; so both are made of FXSAVE's 512 bytes.
SDM 1 "Managing State Using the XSAVE Feature Set".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.x86.events import GP0, NM, UD, Fault
from undervisor.arch.x86.registers import Cr0, Cr4
from undervisor.hypervisor import decode
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.fpu import INITIAL_MXCSR, MXCSR_RESERVED, Fpu

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

LEGACY_SIZE: Final = 512
HEADER_SIZE: Final = 64
X87: Final = 1
SSE: Final = 2
COMPACTED: Final = 1 << 63
_ALIGNMENT: Final = 63


def save(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """XSAVES. SDM 2D "XSAVES--Save Processor Extended States Supervisor"."""
    # FAULTS
    where = _operand(vcpu, decoded)
    if isinstance(where, Fault):
        return Inject(where)
    # OPERATION
    wanted = _requested(vcpu)
    old = vcpu.read_gva(where, LEGACY_SIZE)
    if isinstance(old, Fault):
        return Inject(old)
    now = vcpu.processor.fpu.save()
    legacy = _merge_saved(old, now, wanted)
    header = (wanted & Fpu.in_use(now)).to_bytes(8, "little")
    header += (COMPACTED | wanted).to_bytes(8, "little")
    fault = vcpu.write_gva(where, legacy + header)
    return Inject(fault) if fault else ADVANCE[decoded.len]


def restore(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """XRSTORS. SDM 2D "XRSTORS--Restore Processor Extended States Supervisor"."""
    # FAULTS
    where = _operand(vcpu, decoded)
    if isinstance(where, Fault):
        return Inject(where)
    area = vcpu.read_gva(where, LEGACY_SIZE + HEADER_SIZE)
    if isinstance(area, Fault):
        return Inject(area)
    # CHECKS
    header = area[LEGACY_SIZE:]
    present, layout = (int.from_bytes(header[i : i + 8], "little") for i in (0, 8))
    supported = vcpu.state.xcr0
    if not layout & COMPACTED or layout & ~COMPACTED & ~supported or present & ~layout:
        return Inject(GP0)
    if any(header[16:]):
        return Inject(GP0)
    # OPERATION
    wanted, fpu = _requested(vcpu), vcpu.processor.fpu
    if wanted & SSE and present & SSE and Fpu.mxcsr_of(area) & MXCSR_RESERVED:
        return Inject(GP0)
    if wanted & X87:
        fpu.restore_x87(area if present & X87 else None)
    if wanted & SSE:
        fpu.restore_sse(area if present & SSE else None)
        fpu.set_mxcsr(Fpu.mxcsr_of(area) if present & SSE else INITIAL_MXCSR)
    return ADVANCE[decoded.len]


def _operand(vcpu: Vcpu, decoded: decode.Instruction) -> int | Fault:
    """The linear address of the save area, or the fault that comes before it is used."""
    state = vcpu.state
    if not state.cr4 & Cr4.osxsave:
        return UD
    if state.cpl:
        return GP0
    if state.cr0 & Cr0.ts:
        return NM
    where = decode.linear_address(vcpu, decoded, 0)
    return GP0 if where & _ALIGNMENT else where


def _requested(vcpu: Vcpu) -> int:
    """EDX:EAX & (XCR0 | IA32_XSS); XSS has no bit of ours."""
    q, xcr0 = vcpu.state.q, int(vcpu.state.xcr0)
    return ((q[2] & 0xFFFF_FFFF) << 32 | q[0] & 0xFFFF_FFFF) & xcr0


def _merge_saved(old: bytes, new: bytes, wanted: int) -> bytes:
    """The legacy region with the wanted components replaced; XMM0 begins at 160, MXCSR at 24."""
    area = bytearray(old)
    if wanted & X87:
        area[0:24], area[32:160] = new[0:24], new[32:160]
    if wanted & SSE:
        area[24:32], area[160:416] = new[24:32], new[160:416]
    return bytes(area)
