"""#VMEXIT: guest state and exit information into vmcb12, host state back.

APM 2 "#VMEXIT".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Dr6, Rflags
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import SWITCHED, Switched
from undervisor.silicon.layout import Env
from undervisor.silicon.processor import SiliconVmcb

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_TF: Final = int(Rflags.tf)
_RFLAGS: Final = Env.RFLAGS >> 3
# This is the path of every exit: plain numbers, computed once, in place of the enumerations.
_EXITCODE, _EVENTINJ, _NRIP = F.EXITCODE >> 3, F.EVENTINJ >> 3, F.NRIP >> 3
_G_PAT: Final = F.G_PAT >> 3
_VIRTUAL: Final = F.V_INTR_CONTROL >> 2
_FETCHED: Final = int(F.FETCHED_BYTES)
_BYTES: Final = int(F.GUEST_INSTRUCTION_BYTES)
_PAT: Final = int(Msr.PAT)
_REASONS: Final = {int(code): f"#VMEXIT({code.name})" for code in ExitCode}


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
) -> Switched:
    """End L2's run with an exit that L1 sees."""
    vmcb12 = svm.vmcb12
    assert vmcb12 is not None, "L2 runs"
    _load_host(vcpu, vmcb12)
    write_information(vmcb12, code, info1, info2, event)
    vmcb12.q[_NRIP] = next_rip
    vmcb12.b[_FETCHED] = len(fetched)
    if fetched:
        vmcb12.b[_BYTES : _BYTES + 15] = fetched.ljust(15, b"\0")
    vmcb12.d[_VIRTUAL] = svm.virtual
    if svm.nested_paging:
        vmcb12.q[_G_PAT] = vcpu.msrs[_PAT]
        vcpu.msrs[_PAT] = svm.host_pat
    svm.reason = _REASONS[code]
    return host_goes_on(vcpu)


def host_goes_on(vcpu: Vcpu) -> Switched:
    """A trace trap of the host's VMRUN comes after the #VMEXIT. APM 2 "VMRUN and TF/RF"."""
    if not vcpu.state.q[_RFLAGS] & _TF:
        return SWITCHED
    vcpu.state.dr6 |= Dr6.bs
    return Switched(vcpu.processor.inject_exception(Vector.DB, None))


def write_information(vmcb: SiliconVmcb, code: int, info1: int, info2: int, event: int) -> None:
    """EXITCODE, EXITINFO1 and 2, EXITINTINFO; EVENTINJ is cleared."""
    q, at = vmcb.q, _EXITCODE
    q[at], q[at + 1], q[at + 2], q[at + 3] = code & _MASK64, info1, info2, event
    q[_EVENTINJ] = 0


def _load_host(vcpu: Vcpu, vmcb12: SiliconVmcb) -> None:
    """Guest state to vmcb12, and the state that VMRUN saved; GIF is clear.

    VMRUN runs at CPL 0 in protected mode, so that CPL, CR0.PE and RFLAGS.VM are as they must be.
    """
    vcpu.in_l2, vcpu.vmcb = False, vcpu.vmcb01
    vcpu.gif = False
    vcpu.activity = Activity.ACTIVE
    vcpu.processor.leave_svm(vmcb12, vcpu.vmcb01)
    if vcpu.nmi_blocked:
        vcpu.watch_iret()
    vcpu.processor.request_window(False)
