"""What L0 wants to know of its guests whatever runs: the intercepts of every VMCB of ours."""

from __future__ import annotations

from typing import Final

from undervisor.silicon.world import Intercept

COMMON: Final = (
    Intercept.CR0_WRITE,
    Intercept.CR3_WRITE,
    Intercept.CR4_WRITE,
    Intercept.CR8_READ,
    Intercept.CR8_WRITE,
    # Reads too: DR7.GD and CR4.DE are checked by L0.
    *(i for i in Intercept if Intercept.DR0_READ <= i <= Intercept.DR7_READ),
    *(i for i in Intercept if Intercept.DR0_WRITE <= i <= Intercept.DR7_WRITE),
    Intercept.EXCP_UD,
    Intercept.INTR,
    Intercept.NMI,
    Intercept.SMI,
    Intercept.INIT,
    Intercept.VINTR,
    Intercept.RDTSC,
    Intercept.RDPMC,
    Intercept.CPUID,
    Intercept.RSM,
    Intercept.INVD,
    Intercept.PAUSE,
    Intercept.HLT,
    Intercept.MSR_PROT,
    Intercept.SHUTDOWN,
    Intercept.ICEBP,
    Intercept.WBINVD,
    Intercept.MONITOR,
    Intercept.MWAIT,
)
"""Of L1 and of L2."""

L1: Final = (
    *COMMON,
    Intercept.INVLPGA,
    Intercept.VMRUN,
    Intercept.VMMCALL,
    Intercept.VMLOAD,
    Intercept.VMSAVE,
    Intercept.STGI,
    Intercept.CLGI,
    Intercept.SKINIT,
)
"""Of L1: the instructions of its virtualization extension as well."""
