"""#VMEXIT: guest state and exit information into vmcb12, host state back.

APM 2 "#VMEXIT".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode, signed_exit_code
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import DR7_FIXED_ONE, Cr0, Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import SWITCHED, Verdict
from undervisor.silicon.processor import SiliconVmcb

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_EXITCODE, _EVENTINJ, _NRIP = F.EXITCODE >> 3, F.EVENTINJ >> 3, F.NRIP >> 3
_VIRTUAL: Final = F.V_INTR_CONTROL >> 2
_FETCHED: Final = F.FETCHED_BYTES
_FETCHED_END: Final = F.GUEST_INSTRUCTION_BYTES + 15


def leave(
    vcpu: Vcpu,
    svm: SvmState,
    code: int,
    info1: int = 0,
    info2: int = 0,
    *,
    event: int = 0,
    next_rip: int = 0,
    fetched: bytes = b"",
) -> Verdict:
    """End L2's run with an exit that L1 sees."""
    vmcb12 = svm.vmcb12
    assert vmcb12 is not None, "L2 runs"
    vcpu.processor.save(vmcb12)
    write_information(vmcb12, code, info1, info2, event)
    vmcb12.q[_NRIP] = next_rip
    vmcb12.b[_FETCHED:_FETCHED_END] = bytes((len(fetched),)) + fetched.ljust(15, b"\0")
    vmcb12.d[_VIRTUAL] = svm.virtual
    if svm.nested_paging:
        vmcb12.q[F.G_PAT >> 3] = vcpu.msrs[Msr.PAT]
        vcpu.msrs[Msr.PAT] = svm.host_pat
    _load_host(vcpu, svm)
    svm.reason = f"#VMEXIT({name_of(code)})"
    return SWITCHED


def write_information(vmcb: SiliconVmcb, code: int, info1: int, info2: int, event: int) -> None:
    """EXITCODE, EXITINFO1 and 2, EXITINTINFO; EVENTINJ is cleared."""
    q, at = vmcb.q, _EXITCODE
    q[at], q[at + 1], q[at + 2], q[at + 3] = code & _MASK64, info1, info2, event
    q[_EVENTINJ] = 0


def _load_host(vcpu: Vcpu, svm: SvmState) -> None:
    """The state that VMRUN saved; CR2 and DR6 stay, breakpoints are off, GIF is clear."""
    host, state = vcpu.vmcb01, vcpu.state
    host.q[F.CR2 >> 3], host.q[F.DR6 >> 3] = state.cr2, state.dr6
    host.q[F.DR7 >> 3] = DR7_FIXED_ONE
    host.q[F.CR0 >> 3] |= Cr0.pe
    host.q[F.RFLAGS >> 3] &= ~Rflags.vm
    host.b[F.CPL] = 0
    vcpu.in_l2, vcpu.vmcb = False, host
    vcpu.gif = False
    vcpu.activity = Activity.ACTIVE
    vcpu.load(host)
    vcpu.processor.request_window(False)


def next_rip(vcpu: Vcpu) -> int:
    """nRIP: the address behind the instruction."""
    state = vcpu.state
    rip: int = state.q[16] + decode.length(vcpu)
    return rip & (_MASK64 if state.hflags & 0x8000 else 0xFFFF_FFFF)


def name_of(code: int) -> str:
    """The APM's name of an exit code."""
    try:
        return ExitCode(signed_exit_code(code & _MASK64)).name
    except ValueError:
        return f"{code:#x}"
