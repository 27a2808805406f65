"""What an SVM processor offers: CPUID 8000_000A and what else VMRUN's checks depend on.

APM 3 "Function 8000_000Ah: SVM Features".  VM_CR and VM_HSAVE_PA are in `arch.x86.msr`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.arch.bits import Bits, Register
from undervisor.arch.x86.registers import Cr4, Efer


class SvmFeatures(Register):
    """CPUID Fn8000_000A_EDX."""

    WIDTH = 32

    np = Bits(0, about="nested paging")
    lbr_virt = Bits(1, about="LBR virtualization")
    svml = Bits(2, about="SVM lock")
    nrips = Bits(3, about="next RIP saved on #VMEXIT")
    tsc_rate_msr = Bits(4, about="MSR-based TSC rate control")
    vmcb_clean = Bits(5, about="VMCB clean bits")
    flush_by_asid = Bits(6, about="flush by ASID")
    decode_assists = Bits(7, about="decode assists")
    pmc_virt = Bits(8, about="PMC virtualization")
    pause_filter = Bits(10, about="PAUSE intercept filter")
    pause_filter_threshold = Bits(12, about="PAUSE filter threshold")
    avic = Bits(13, about="Advanced Virtual Interrupt Controller")
    vmsave_virt = Bits(15, about="VMSAVE and VMLOAD virtualization")
    vgif = Bits(16, about="virtual GIF")
    gmet = Bits(17, about="Guest Mode Execute Trap")
    x2avic = Bits(18, about="AVIC in x2APIC mode")
    sss_check = Bits(19, about="supervisor shadow-stack restrictions")
    spec_ctrl = Bits(20, about="SPEC_CTRL virtualization")
    rogpt = Bits(21, about="read-only guest page tables")
    host_mce_override = Bits(23, about="#MC with host CR4.MCE is intercepted, not a shutdown")
    tlbi_ctl = Bits(24, about="INVLPGB and TLBSYNC control")
    vnmi = Bits(25, about="NMI virtualization")
    ibs_virt = Bits(26, about="IBS virtualization")
    ext_lvt_avic_access_chg = Bits(27, about="extended LVT accesses under AVIC")
    nested_virt_vmcb_addr_chk = Bits(28, about="guest VMCB address check")
    bus_lock_threshold = Bits(29, about="bus lock threshold")
    idle_hlt_intercept = Bits(30, about="idle HLT intercept")
    enhanced_shutdown_intercept = Bits(31, about="shutdown exit for guest events in delivery")


class SvmFeatures2(Register):
    """CPUID Fn8000_000A_ECX."""

    WIDTH = 32

    pml = Bits(4, about="page modification logging")
    x2avic_ext = Bits(6, about="4096 virtual processors in x2AVIC mode")


# Bits of CR4 that every processor with SVM has.
CR4_BASE: Final = (
    Cr4.vme
    | Cr4.pvi
    | Cr4.tsd
    | Cr4.de
    | Cr4.pse
    | Cr4.pae
    | Cr4.mce
    | Cr4.pge
    | Cr4.pce
    | Cr4.osfxsr
    | Cr4.osxmmexcpt
)


@dataclass(frozen=True, slots=True)
class SvmCapabilities:
    """What VMRUN's rules depend on.

    `features` and `features2` are CPUID Fn8000_000A EDX and ECX, `asids` is EBX: the number of
    address space identifiers, the host's included.  `physical_width` is the supported physical
    address size in bits.  `cr4` and `efer` are masks of the bits that may be 1.  `host_cr0` and
    `host_efer` are the registers of the hypervisor that executes VMRUN.
    """

    features: int
    asids: int
    physical_width: int
    cr4: int
    efer: int
    features2: int = 0
    long_mode: bool = True
    sev_es: bool = False
    host_cr0: int = 0x8000_0011
    host_efer: int = Efer.svme | Efer.lme | Efer.lma

    @property
    def shadow_stacks(self) -> bool:
        """Whether the processor has CR4.CET."""
        return bool(self.cr4 & Cr4.cet)

    def has(self, mask: int) -> bool:
        """Whether all features of `mask`, made of `SvmFeatures` bits, are there."""
        return self.features & mask == mask


# What a rule assumes when nothing is known of the processor: everything that is defined.
ANY_PROCESSOR: Final = SvmCapabilities(
    features=int(SvmFeatures.DECLARED),
    features2=int(SvmFeatures2.DECLARED),
    asids=1 << 32,
    physical_width=52,
    cr4=CR4_BASE
    | Cr4.umip
    | Cr4.la57
    | Cr4.fsgsbase
    | Cr4.pcide
    | Cr4.osxsave
    | Cr4.smep
    | Cr4.smap
    | Cr4.pke
    | Cr4.cet
    | Cr4.fred,
    efer=int(Efer.DECLARED),
    sev_es=True,
)
