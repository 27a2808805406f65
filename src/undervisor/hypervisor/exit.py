"""An exit as the silicon reports it: the code now, everything else when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.silicon import glue

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_EVENTINJ = VmcbField.EVENTINJ >> 3
_VALID = 1 << 31

# Exit codes that can interrupt the delivery of an event.
DURING_DELIVERY = frozenset(
    {*range(ExitCode.EXCP_DE, ExitCode.EXCP_DE + 32), ExitCode.NPF, ExitCode.SHUTDOWN}
    - {ExitCode.EXCP_UD}  # no delivery raises it
)


class Exit:
    """The exit being handled.  One object serves all exits of a vCPU, so keep no reference.

    `event` is the event whose delivery the exit interrupted, in the form of EXITINTINFO; 0 where
    there is none.
    """

    __slots__ = ("code", "event", "vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.code = 0
        self.event = 0

    def take_event(self) -> int:
        """What this exit interrupted: the silicon leaves it in the running VMCB."""
        q = self.vcpu.vmcb.q
        event = q[_EVENTINJ]
        if not event & _VALID:
            return 0
        q[_EVENTINJ] = 0
        return event

    @property
    def info1(self) -> int:
        """EXITINFO1; the silicon keeps 32 bits of it."""
        return int(self.vcpu.state.error_code)

    @property
    def info2(self) -> int:
        """EXITINFO2: the faulting address of #PF and nested page faults."""
        return self.vcpu.vmcb.q[VmcbField.EXITINFO2 >> 3]

    @property
    def name(self) -> str:
        """The APM's name of the exit, or the silicon's own."""
        return code_name(self.code)


_OWN = {
    glue.EXIT_SYSCALL: "SYSCALL",
    glue.EXIT_SYSENTER: "SYSENTER",
    glue.EXIT_BUDGET: "end of slice",
}


def code_name(code: int) -> str:
    """The name of an exit code."""
    try:
        return ExitCode(code).name
    except ValueError:
        return _OWN.get(code, f"{code:#x}")
