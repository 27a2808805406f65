"""What vmcb12's intercepts mean for the silicon: the intercepts of vmcb02, merged when they change.

`UNSUPPORTED` names the intercepts that have no effect, with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.x86.events import Vector
from undervisor.silicon.processor import SiliconVmcb

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

# Exceptions that can become a double fault while another is delivered: the silicon makes it one
# without looking at the intercept of #DF, so that L0 must see them where L1 wants that.
_CONTRIBUTORY: Final = sum(
    1 << v for v in (Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF)
)
_BREAKPOINTS: Final = 1 << Intercept.EXCP_BP | 1 << Intercept.EXCP_OF


def merge(vcpu: Vcpu, svm: SvmState, vmcb12: SiliconVmcb) -> None:
    """vmcb02 exits for whatever L1 or L0 wants to see."""
    svm.wanted = wanted = int.from_bytes(vmcb12.b[0:24], "little")
    svm.iopm = vmcb12.iopm_base_pa & ~0xFFF
    svm.msrpm = vmcb12.msrpm_base_pa & ~0xFFF
    merged = wanted | int.from_bytes(vcpu.vmcb01.b[0:24], "little")
    if wanted & _BREAKPOINTS:
        merged |= 1 << Intercept.INTN  # the silicon takes INT3 and INTO for INT n
    if wanted >> Intercept.EXCP_DF & 1:
        merged |= _CONTRIBUTORY << Intercept.EXCP_DE
    if wanted >> Intercept.RDTSCP & 1:
        merged |= 1 << Intercept.RDTSC
    vcpu.vmcb02.b[0:24] = merged.to_bytes(24, "little")


# Intercepts that have no effect here, and why.
UNSUPPORTED: Final[dict[Intercept, str]] = {
    Intercept.TASK_SWITCH: "the silicon switches tasks without an exit",
    Intercept.FERR_FREEZE: "there is no FERR# and no IGNNE# pin, so that nothing ever freezes",
    Intercept.RDPRU: "no model has RDPRU: #UD",
    Intercept.MCOMMIT: "no model has MCOMMIT: #UD",
    Intercept.BUSLOCK: "no model announces the bus lock threshold",
    Intercept.IDLE_HLT: "no model announces the idle HLT intercept",
    **dict.fromkeys(
        (Intercept.INVLPGB, Intercept.INVLPGB_ILLEGAL, Intercept.TLBSYNC),
        "no model has INVLPGB and TLBSYNC: #UD",
    ),
    **{
        intercept: "write traps are for guests with encrypted state, which no model has"
        for intercept in Intercept
        if Intercept.EFER_WRITE_TRAP <= intercept <= Intercept.CR15_WRITE_TRAP
    },
    **dict.fromkeys(
        (
            Intercept.EXCP_9,
            Intercept.EXCP_15,
            Intercept.EXCP_MC,
            Intercept.EXCP_31,
            *(i for i in Intercept if Intercept.EXCP_20 <= i <= Intercept.EXCP_VC),
        ),
        "nothing on this processor raises the exception",
    ),
    Intercept.EXCP_NMI: "vector 2 is the NMI, no exception, and has an intercept of its own",
    Intercept.EXCP_AC: "the silicon does not check the alignment of data",
    Intercept.EXCP_XF: "the silicon's SSE raises no floating-point exception",
    **dict.fromkeys(
        (i for i in Intercept if i < Intercept.DR0_READ and i & 0xF in (1, 5, 6, 7, *range(9, 16))),
        "the control register does not exist: #UD",
    ),
    **dict.fromkeys(
        (i for i in Intercept if Intercept.DR8_READ <= i < Intercept.EXCP_DE and i & 8),
        "the debug register does not exist: #UD",
    ),
}
