"""SVM switched on in the probe, and a VMCB that starts an L2 beside it.

APM 2, "Enabling SVM" and "VMRUN Instruction".
"""

from __future__ import annotations

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, Vmcb, VmcbField
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.guest.probe.l1 import CODE_SEGMENT, DATA_SEGMENT, L1State, Runner, l1_state
from undervisor.guest.probe.svm import SvmOps

G_PAT_RESET = 0x0007040600070406
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400


def svm_on(probe: Runner, host_save_area: int) -> L1State:
    """Set EFER.SVME and VM_HSAVE_PA on `probe`'s processor; its state then.

    Faulted where the processor refuses.
    """
    state = l1_state(probe)
    batch = SvmOps()
    writes = [
        batch.wrmsr(Msr.EFER, state.efer | Efer.svme),
        batch.wrmsr(Msr.VM_HSAVE_PA, host_save_area),
    ]
    probe.run(batch)
    for write in writes:
        _ = write.value
    return l1_state(probe)


def l2_vmcb(l1: L1State, rip: int, rsp: int, *intercepts: Intercept) -> bytearray:
    """A VMCB for an L2 in 64-bit mode at CPL 0 that shares L1's page tables.

    VMRUN, VMMCALL and HLT are intercepted, and `intercepts`. L2 has no descriptor tables of its
    own, so an exception that is not intercepted ends in a shutdown.
    """
    area = bytearray(SIZE)
    vmcb = Vmcb(area)
    for intercept in (Intercept.VMRUN, Intercept.VMMCALL, Intercept.HLT, *intercepts):
        area[intercept // 8] |= 1 << intercept % 8
    values = {
        VmcbField.GUEST_ASID: 1,
        VmcbField.EFER: l1.efer,
        VmcbField.CR0: l1.cr0,
        VmcbField.CR3: l1.cr3,
        VmcbField.CR4: l1.cr4,
        VmcbField.DR6: DR6_RESET,
        VmcbField.DR7: DR7_RESET,
        VmcbField.RFLAGS: 2,
        VmcbField.RIP: rip,
        VmcbField.RSP: rsp,
        VmcbField.G_PAT: G_PAT_RESET,
    }
    for field, value in values.items():
        vmcb[field] = value
    vmcb.set_segment(VmcbField.CS_SELECTOR, CODE_SEGMENT)
    for first in (VmcbField.DS_SELECTOR, VmcbField.ES_SELECTOR, VmcbField.SS_SELECTOR):
        vmcb.set_segment(first, DATA_SEGMENT)
    return area
