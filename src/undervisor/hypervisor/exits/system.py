"""System instructions with little to do, and those that the model does not have."""

from __future__ import annotations

from undervisor.arch.x86.events import GP0, UD, Fault, Vector
from undervisor.arch.x86.registers import Cr4, legalize_xcr0
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Inject, Switched, Verdict


def undefined(vcpu: Vcpu, exit: Exit) -> Verdict:
    """An instruction of an extension that this processor lacks or that is off."""
    return Inject(UD)


def nothing(vcpu: Vcpu, exit: Exit) -> Verdict:
    """INVD and WBINVD: memory is always coherent."""
    return ADVANCE[decode.length(vcpu)]


def invlpg(vcpu: Vcpu, exit: Exit) -> Verdict:
    """INVLPG, intercepted only for L2 and not wanted by L1."""
    decoded = decode.instruction(vcpu)
    vcpu.processor.flush_page(decode.linear_address(vcpu, decoded, 0))
    return ADVANCE[decoded.len]


def xsetbv(vcpu: Vcpu, exit: Exit) -> Verdict:
    """XSETBV. SDM 2D "XSETBV--Set Extended Control Register"."""
    q = vcpu.state.q
    if not vcpu.state.cr4 & Cr4.osxsave:
        return Inject(UD)
    if vcpu.state.cpl or q[1] & 0xFFFF_FFFF:
        return Inject(GP0)
    value = (q[2] & 0xFFFF_FFFF) << 32 | q[0] & 0xFFFF_FFFF
    legal = legalize_xcr0(value, supported=vcpu.model.xcr0_supported)
    if isinstance(legal, Fault):
        return Inject(legal)
    vcpu.state.xcr0 = legal
    return ADVANCE[decode.length(vcpu)]


def icebp(vcpu: Vcpu, exit: Exit) -> Verdict:
    """INT1: a #DB that is a trap.

    Delivered here, past the intercepts: that of #DB does not see it. APM 2, "Exception Intercepts".
    """
    vcpu.advance(decode.length(vcpu))
    return Switched(vcpu.inject(Fault(Vector.DB)))
