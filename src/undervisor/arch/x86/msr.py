"""Model-specific registers: numbers, layouts, and the rules of writing them.

`MSRS` says of every MSR which processors have it, what it holds after power-up and what a write
stores.  An MSR that is not in the table, or that the processor at hand lacks, raises #GP.
A legalizer is pure: `(old, new, processor, msrs) -> value to store, or the fault`, where `msrs`
holds the other MSRs of the same logical processor.

Sources: SDM volume 4 "Architectural MSRs"; APM volume 2 appendix "MSR Cross-Reference"; the
sections that the legalizers name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

from undervisor.arch.bits import Bits, Register, plain_members
from undervisor.arch.x86.cpuid import Processor, Vendor
from undervisor.arch.x86.events import GP0, Fault
from undervisor.arch.x86.registers import Efer


@plain_members
class Msr(IntEnum):
    """MSR numbers, by the manuals' names without the prefix `IA32_` or `MSR_`."""

    TSC = 0x10
    PLATFORM_ID = 0x17
    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    TSC_ADJUST = 0x3B
    SPEC_CTRL = 0x48
    PRED_CMD = 0x49
    BIOS_UPDT_TRIG = 0x79
    BIOS_SIGN_ID = 0x8B
    PMC0 = 0xC1
    PLATFORM_INFO = 0xCE
    MPERF = 0xE7
    APERF = 0xE8
    MTRRCAP = 0xFE
    ARCH_CAPABILITIES = 0x10A
    FLUSH_CMD = 0x10B
    SYSENTER_CS = 0x174
    SYSENTER_ESP = 0x175
    SYSENTER_EIP = 0x176
    MCG_CAP = 0x179
    MCG_STATUS = 0x17A
    MCG_CTL = 0x17B
    PERFEVTSEL0 = 0x186
    PERF_STATUS = 0x198
    PERF_CTL = 0x199
    MISC_ENABLE = 0x1A0
    DEBUGCTL = 0x1D9
    LAST_BRANCH_FROM_IP = 0x1DB
    LAST_BRANCH_TO_IP = 0x1DC
    LAST_INT_FROM_IP = 0x1DD
    LAST_INT_TO_IP = 0x1DE
    MTRR_PHYSBASE0 = 0x200
    MTRR_PHYSMASK0 = 0x201
    MTRR_FIX64K_00000 = 0x250
    MTRR_FIX16K_80000 = 0x258
    MTRR_FIX16K_A0000 = 0x259
    MTRR_FIX4K_C0000 = 0x268
    MTRR_FIX4K_C8000 = 0x269
    MTRR_FIX4K_D0000 = 0x26A
    MTRR_FIX4K_D8000 = 0x26B
    MTRR_FIX4K_E0000 = 0x26C
    MTRR_FIX4K_E8000 = 0x26D
    MTRR_FIX4K_F0000 = 0x26E
    MTRR_FIX4K_F8000 = 0x26F
    PAT = 0x277
    MTRR_DEF_TYPE = 0x2FF
    FIXED_CTR0 = 0x309
    PERF_CAPABILITIES = 0x345
    FIXED_CTR_CTRL = 0x38D
    PERF_GLOBAL_STATUS = 0x38E
    PERF_GLOBAL_CTRL = 0x38F
    PERF_GLOBAL_OVF_CTRL = 0x390
    MC0_CTL = 0x400
    MC0_STATUS = 0x401
    MC0_ADDR = 0x402
    MC0_MISC = 0x403
    VMX_BASIC = 0x480
    VMX_PINBASED_CTLS = 0x481
    VMX_PROCBASED_CTLS = 0x482
    VMX_EXIT_CTLS = 0x483
    VMX_ENTRY_CTLS = 0x484
    VMX_MISC = 0x485
    VMX_CR0_FIXED0 = 0x486
    VMX_CR0_FIXED1 = 0x487
    VMX_CR4_FIXED0 = 0x488
    VMX_CR4_FIXED1 = 0x489
    VMX_VMCS_ENUM = 0x48A
    VMX_PROCBASED_CTLS2 = 0x48B
    VMX_EPT_VPID_CAP = 0x48C
    VMX_TRUE_PINBASED_CTLS = 0x48D
    VMX_TRUE_PROCBASED_CTLS = 0x48E
    VMX_TRUE_EXIT_CTLS = 0x48F
    VMX_TRUE_ENTRY_CTLS = 0x490
    VMX_VMFUNC = 0x491
    VMX_PROCBASED_CTLS3 = 0x492
    VMX_EXIT_CTLS2 = 0x493
    TSC_DEADLINE = 0x6E0
    X2APIC_ID = 0x802
    X2APIC_VERSION = 0x803
    X2APIC_TPR = 0x808
    X2APIC_PPR = 0x80A
    X2APIC_EOI = 0x80B
    X2APIC_LDR = 0x80D
    X2APIC_SVR = 0x80F
    X2APIC_ISR0 = 0x810
    X2APIC_TMR0 = 0x818
    X2APIC_IRR0 = 0x820
    X2APIC_ESR = 0x828
    X2APIC_ICR = 0x830
    X2APIC_LVT_TIMER = 0x832
    X2APIC_LVT_THERMAL = 0x833
    X2APIC_LVT_PMI = 0x834
    X2APIC_LVT_LINT0 = 0x835
    X2APIC_LVT_LINT1 = 0x836
    X2APIC_LVT_ERROR = 0x837
    X2APIC_INIT_COUNT = 0x838
    X2APIC_CUR_COUNT = 0x839
    X2APIC_DIV_CONF = 0x83E
    X2APIC_SELF_IPI = 0x83F
    XSS = 0xDA0
    EFER = 0xC0000080
    STAR = 0xC0000081
    LSTAR = 0xC0000082
    CSTAR = 0xC0000083
    FMASK = 0xC0000084
    FS_BASE = 0xC0000100
    GS_BASE = 0xC0000101
    KERNEL_GS_BASE = 0xC0000102
    TSC_AUX = 0xC0000103
    TSC_RATIO = 0xC0000104
    SYSCFG = 0xC0010010
    HWCR = 0xC0010015
    IORR_BASE0 = 0xC0010016
    IORR_MASK0 = 0xC0010017
    IORR_BASE1 = 0xC0010018
    IORR_MASK1 = 0xC0010019
    TOP_MEM = 0xC001001A
    TOP_MEM2 = 0xC001001D
    NB_CFG = 0xC001001F
    PATCH_LOADER = 0xC0010020
    INT_PENDING = 0xC0010055
    SMM_BASE = 0xC0010111
    SMM_ADDR = 0xC0010112
    SMM_MASK = 0xC0010113
    VM_CR = 0xC0010114
    IGNNE = 0xC0010115
    VM_HSAVE_PA = 0xC0010117
    SVM_LOCK_KEY = 0xC0010118
    VIRT_SPEC_CTRL = 0xC001011F
    LS_CFG = 0xC0011020
    DC_CFG = 0xC0011022
    DE_CFG = 0xC0011029
    BU_CFG2 = 0xC001102A


class ApicBase(Register):
    """IA32_APIC_BASE. SDM 3A "Local APIC Status and Location", "x2APIC State Transitions"."""

    bsp = Bits(8, about="Bootstrap processor")
    extd = Bits(10, about="Enable x2APIC mode")
    enable = Bits(11, about="APIC global enable")
    base = Bits(51, 12, "physical page number of the registers")


class FeatureControl(Register):
    """IA32_FEATURE_CONTROL. SDM 3C "Enabling and Entering VMX Operation"."""

    lock = Bits(0, about="Lock bit")
    vmx_inside_smx = Bits(1, about="Enable VMX inside SMX operation")
    vmx_outside_smx = Bits(2, about="Enable VMX outside SMX operation")
    senter_local = Bits(14, 8, "SENTER local function enables")
    senter_global = Bits(15, about="SENTER global enable")
    sgx_launch_control = Bits(17, about="SGX launch control enable")
    sgx_global = Bits(18, about="SGX global enable")
    lmce = Bits(20, about="LMCE on")


class SpecCtrl(Register):
    """IA32_SPEC_CTRL; AMD's SPEC_CTRL has the same bits."""

    ibrs = Bits(0, about="Indirect Branch Restricted Speculation")
    stibp = Bits(1, about="Single Thread Indirect Branch Predictors")
    ssbd = Bits(2, about="Speculative Store Bypass Disable")


class ArchCapabilities(Register):
    """IA32_ARCH_CAPABILITIES."""

    rdcl_no = Bits(0)
    ibrs_all = Bits(1)
    rsba = Bits(2)
    skip_l1dfl_vmentry = Bits(3)
    ssb_no = Bits(4)
    mds_no = Bits(5)
    if_pschange_mc_no = Bits(6)
    tsx_ctrl = Bits(7)
    taa_no = Bits(8)


class MtrrCap(Register):
    """IA32_MTRRCAP. SDM 3A "MTRR Feature Identification"."""

    vcnt = Bits(7, 0, "Number of variable ranges")
    fixed = Bits(8, about="Fixed ranges supported")
    wc = Bits(10, about="Write combining supported")
    smrr = Bits(11, about="System-management ranges supported")


class MtrrDefType(Register):
    """IA32_MTRR_DEF_TYPE."""

    type = Bits(7, 0, "Default memory type")
    fixed_enable = Bits(10, about="FE: fixed ranges enabled")
    enable = Bits(11, about="E: MTRRs enabled")


class McgCap(Register):
    """IA32_MCG_CAP. SDM 3B "Machine-Check Global Control MSRs"."""

    count = Bits(7, 0, "Number of reporting banks")
    ctl_present = Bits(8, about="MCG_CTL_P")


class McgStatus(Register):
    """IA32_MCG_STATUS."""

    ripv = Bits(0, about="Restart IP valid")
    eipv = Bits(1, about="Error IP valid")
    mcip = Bits(2, about="Machine check in progress")


class MiscEnable(Register):
    """IA32_MISC_ENABLE, the architectural bits."""

    fast_strings = Bits(0, about="Fast-strings enable")
    thermal_control = Bits(3, about="Automatic thermal control circuit enable")
    perfmon_available = Bits(7, about="Performance monitoring available (read only)")
    bts_unavailable = Bits(11, about="Branch trace storage unavailable (read only)")
    pebs_unavailable = Bits(12, about="PEBS unavailable (read only)")
    speedstep = Bits(16, about="Enhanced SpeedStep enable")
    monitor = Bits(18, about="Enable MONITOR FSM")
    limit_cpuid = Bits(22, about="Limit CPUID maxval")
    xtpr_disable = Bits(23, about="xTPR message disable")
    xd_disable = Bits(34, about="XD bit disable")


class DebugCtl(Register):
    """IA32_DEBUGCTL and AMD's DebugCtl, the bits that both have."""

    lbr = Bits(0, about="Last branch record enable")
    btf = Bits(1, about="Single-step on branches")


class SysCfg(Register):
    """SYSCFG. APM 2 "System Configuration Register (SYSCFG)"."""

    mtrr_fix_dram_enable = Bits(18)
    mtrr_fix_dram_modify = Bits(19)
    mtrr_var_dram_enable = Bits(20)
    tom2_enable = Bits(21)
    tom2_force_write_back = Bits(22)


class Hwcr(Register):
    """HWCR, the hardware configuration register. APM 2 appendix "MSR Cross-Reference"."""

    smm_lock = Bits(0)
    tlb_cache_disable = Bits(3)
    invd_is_wbinvd = Bits(4)
    fferr_disable = Bits(6)
    ignne_emulation = Bits(8)
    monitor_disable = Bits(9)
    monitor_user_enable = Bits(10)
    wrap32_disable = Bits(17)
    mc_status_write_enable = Bits(18)
    tsc_freq_sel = Bits(24, about="the TSC counts at the P0 frequency")
    boost_disable = Bits(25)


class VmCr(Register):
    """VM_CR. APM 2 "VM_CR MSR (C001_0114h)"."""

    dpd = Bits(0, about="Disable the external hardware debug port")
    r_init = Bits(1, about="INIT becomes a security exception #SX")
    dis_a20m = Bits(2, about="Disable A20 masking")
    lock = Bits(3, about="SVM lock")
    svmdis = Bits(4, about="EFER.SVME must be zero")


class DeCfg(Register):
    """DE_CFG, the one bit that software uses."""

    lfence_serializing = Bits(1, about="LFENCE is dispatch serializing")


class Scope(Enum):
    """Which logical processors share one register."""

    THREAD = "thread"
    CORE = "core"
    PACKAGE = "package"


Msrs = Mapping[int, int]
Legalizer = Callable[[int, int, Processor, Msrs], int | Fault]
Provider = Callable[[Processor], int]

BOTH = frozenset(Vendor)
INTEL = frozenset({Vendor.INTEL})
AMD = frozenset({Vendor.AMD})


@dataclass(frozen=True, slots=True)
class MsrSpec:
    """One MSR: who has it, what it starts with, what a write does.

    `requires`: any one of these features gives the MSR; empty: every processor of `vendors`.
    `readable`: RDMSR is allowed.  `live`: the value is kept by another part of the processor
    (the time stamp counter, the local APIC, hidden segment state, EFER), which also carries out
    the write; `legalize` then gives the faults that the value alone decides.
    """

    number: int
    name: str
    legalize: Legalizer
    vendors: frozenset[Vendor] = BOTH
    requires: tuple[str, ...] = ()
    reset: int | Provider = 0
    scope: Scope = Scope.THREAD
    readable: bool = True
    live: bool = False

    def exists_on(self, processor: Processor) -> bool:
        """Whether `processor` has this MSR."""
        if processor.vendor not in self.vendors:
            return False
        return not self.requires or not processor.features.isdisjoint(self.requires)

    def reset_value(self, processor: Processor) -> int:
        """The value after power-up."""
        return self.reset(processor) if callable(self.reset) else self.reset


def anything(_old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """Every value is stored."""
    return new


def read_only(_old: int, _new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """WRMSR raises #GP."""
    return GP0


def ignored(old: int, _new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """WRMSR is accepted and changes nothing."""
    return old


def bits(mask: int) -> Legalizer:
    """A legalizer that raises #GP for any bit outside `mask`."""

    def legalize(_old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
        return GP0 if new & ~mask else new

    return legalize


def canonical(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """A linear address that must be canonical."""
    return new if processor.is_canonical(new) else GP0


def low_half(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """A 32-bit register: Intel faults on the upper half, AMD ignores it."""
    if processor.vendor is Vendor.AMD:
        return new & 0xFFFF_FFFF
    return GP0 if new >> 32 else new


def sysenter_address(old: int, new: int, processor: Processor, msrs: Msrs) -> int | Fault:
    """SYSENTER_ESP and SYSENTER_EIP: a canonical address on Intel, 32 bits on AMD."""
    if processor.vendor is Vendor.AMD:
        return new & 0xFFFF_FFFF
    return canonical(old, new, processor, msrs)


def all_or_nothing(_old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """MCG_CTL and MCi_CTL: all zeros or all ones. SDM 3B "Machine-Check MSRs"."""
    return new if new in (0, (1 << 64) - 1) else GP0


def mc_status(_old: int, new: int, processor: Processor, msrs: Msrs) -> int | Fault:
    """MCi_STATUS takes only zero, except on AMD with HWCR.McStatusWrEn."""
    free = processor.vendor is Vendor.AMD and msrs.get(Msr.HWCR, 0) & Hwcr.mc_status_write_enable
    return new if free or not new else GP0


def apic_base(old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_APIC_BASE: reserved bits, and the transitions that "x2APIC State Transitions" bars."""
    mask = ApicBase.DECLARED & ~processor.physical_reserved
    if not processor.has("x2apic"):
        mask &= ~ApicBase.extd
    modes = ApicBase.enable | ApicBase.extd
    before, after = old & modes, new & modes
    if new & ~mask or after == ApicBase.extd:
        return GP0
    if before == modes and after == ApicBase.enable:
        return GP0
    if before == 0 and after == modes:
        return GP0
    return new


def feature_control(old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_FEATURE_CONTROL: #GP once the lock bit is set."""
    mask = FeatureControl.lock
    if processor.has("vmx"):
        mask |= FeatureControl.vmx_outside_smx
    if processor.has("smx"):
        mask |= FeatureControl.senter_local | FeatureControl.senter_global
        mask |= FeatureControl.vmx_inside_smx if processor.has("vmx") else 0
    return GP0 if old & FeatureControl.lock or new & ~mask else new


SPEC_CTRL_BITS: dict[str, int] = {
    "spec-ctrl": SpecCtrl.ibrs,
    "ibrs": SpecCtrl.ibrs,
    "stibp": SpecCtrl.stibp,
    "amd-stibp": SpecCtrl.stibp,
    "ssbd": SpecCtrl.ssbd,
    "amd-ssbd": SpecCtrl.ssbd,
}
"""Which feature gives which bit of SPEC_CTRL."""


def spec_ctrl(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """SPEC_CTRL: a bit without its feature is reserved."""
    mask = 0
    for name, bit in SPEC_CTRL_BITS.items():
        if processor.has(name):
            mask |= bit
    return GP0 if new & ~mask else new


MTRR_TYPES = frozenset({0, 1, 4, 5, 6})
"""UC, WC, WT, WP, WB. SDM 3A "Memory Types That Can Be Encoded in MTRRs"."""

PAT_TYPES = MTRR_TYPES | {7}
"""The same and UC-. SDM 3A "IA32_PAT MSR"."""


def pat(_old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_PAT: each byte a memory type."""
    return new if PAT_TYPES.issuperset(new.to_bytes(8, "little")) else GP0


def mtrr_base(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_MTRR_PHYSBASEn: a memory type, an aligned address inside the physical width."""
    if new & (0xF00 | processor.physical_reserved) or new & 0xFF not in MTRR_TYPES:
        return GP0
    return new


def mtrr_mask(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_MTRR_PHYSMASKn: bits 10:0 and those above the physical width are reserved."""
    return GP0 if new & (0x7FF | processor.physical_reserved) else new


def mtrr_fixed(_old: int, new: int, processor: Processor, msrs: Msrs) -> int | Fault:
    """IA32_MTRR_FIX*: each byte a memory type.

    AMD adds RdMem and WrMem (bits 4:3 of each byte) while SYSCFG.MtrrFixDramModEn is set.
    """
    types = new
    if processor.vendor is Vendor.AMD and msrs.get(Msr.SYSCFG, 0) & SysCfg.mtrr_fix_dram_modify:
        types &= ~0x1818_1818_1818_1818
    return new if MTRR_TYPES.issuperset(types.to_bytes(8, "little")) else GP0


def mtrr_def_type(_old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_MTRR_DEF_TYPE: a memory type and two enables."""
    return GP0 if new & ~MtrrDefType.DECLARED or new & 0xFF not in MTRR_TYPES else new


_MISC_ENABLE_READ_ONLY = (
    MiscEnable.perfmon_available | MiscEnable.bts_unavailable | MiscEnable.pebs_unavailable
)


def misc_enable(old: int, new: int, _processor: Processor, _msrs: Msrs) -> int | Fault:
    """IA32_MISC_ENABLE: reserved bits fault, read-only bits keep their values."""
    if new & ~MiscEnable.DECLARED:
        return GP0
    return new & ~_MISC_ENABLE_READ_ONLY | old & _MISC_ENABLE_READ_ONLY


def page_address(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
    """VM_HSAVE_PA: a page-aligned physical address. APM 2 "VM_HSAVE_PA MSR (C001_0117h)"."""
    return GP0 if new & (0xFFF | processor.physical_reserved) else new


def vm_cr(old: int, new: int, _processor: Processor, msrs: Msrs) -> int | Fault:
    """VM_CR: LOCK makes itself and SVMDIS read-only; SVMDIS may not be set under EFER.SVME."""
    if new & ~VmCr.DECLARED:
        return GP0
    if new & VmCr.svmdis and not old & VmCr.svmdis and msrs.get(Msr.EFER, 0) & Efer.svme:
        return GP0
    kept = VmCr.lock | VmCr.svmdis if old & VmCr.lock else 0
    return new & ~kept | old & kept


def unlock_svm(vm_cr_value: int, key: int, written: int) -> int:
    """VM_CR after a write of `written` to SVM_KEY while `key` is the stored key.

    A locked VM_CR opens when the key is not zero and matches. APM 2 "SVM-Lock".
    """
    opens = vm_cr_value & VmCr.lock and key and written == key
    return vm_cr_value & ~VmCr.lock if opens else vm_cr_value


def svm_key(old: int, new: int, _processor: Processor, msrs: Msrs) -> int | Fault:
    """SVM_KEY: stored only while VM_CR is not locked; see `unlock_svm` for the other case."""
    return old if msrs.get(Msr.VM_CR, 0) & VmCr.lock else new


EFER_BITS: dict[str, int] = {
    "syscall": Efer.sce,
    "lm": Efer.lme | Efer.lma,
    "nx": Efer.nxe,
    "svm": Efer.svme,
    "fxsr-opt": Efer.ffxsr,
    "tce": Efer.tce,
    "auto-ibrs": Efer.aibrse,
}
"""Which feature gives which bits of EFER."""


def efer_supported(processor: Processor, msrs: Msrs) -> int:
    """The bits of EFER that may be 1: the features', SVME not while VM_CR.SVMDIS is set."""
    mask = 0
    for name, bit in EFER_BITS.items():
        if processor.has(name):
            mask |= bit
    if msrs.get(Msr.VM_CR, 0) & VmCr.svmdis:
        mask &= ~Efer.svme
    if processor.vendor is Vendor.INTEL and msrs.get(Msr.MISC_ENABLE, 0) & MiscEnable.xd_disable:
        mask &= ~Efer.nxe
    return mask


def efer(_old: int, new: int, processor: Processor, msrs: Msrs) -> int | Fault:
    """EFER: bits without their feature. The rules that need CR0 are `registers.legalize_efer`."""
    return GP0 if new & ~efer_supported(processor, msrs) & ~Efer.lma else new


MTRR_VARIABLE_RANGES = 8
MC_BANKS: dict[Vendor, int] = {Vendor.INTEL: 10, Vendor.AMD: 7}
"""How many machine-check banks we report."""

PAT_RESET = 0x0007_0406_0007_0406
APIC_BASE_RESET = 0xFEE0_0000 | ApicBase.enable
TSC_RATIO_ONE = 1 << 32
MICROCODE_REVISION: dict[Vendor, int] = {Vendor.INTEL: 1 << 32, Vendor.AMD: 0x01000065}


def _misc_enable_reset(processor: Processor) -> int:
    """Fast strings on, no branch trace store, no PEBS, MONITOR as the feature says."""
    return MiscEnable.of(
        fast_strings=1,
        bts_unavailable=1,
        pebs_unavailable=1,
        monitor=int(processor.has("monitor")),
    )


def _mtrrs() -> Iterator[MsrSpec]:
    """The MTRRs, variable and fixed."""
    cap = MtrrCap.of(vcnt=MTRR_VARIABLE_RANGES, fixed=1, wc=1)
    yield MsrSpec(Msr.MTRRCAP, "IA32_MTRRCAP", read_only, reset=cap, requires=("mtrr",))
    for i in range(MTRR_VARIABLE_RANGES):
        base, mask = Msr.MTRR_PHYSBASE0 + 2 * i, Msr.MTRR_PHYSMASK0 + 2 * i
        yield MsrSpec(base, f"IA32_MTRR_PHYSBASE{i}", mtrr_base, requires=("mtrr",))
        yield MsrSpec(mask, f"IA32_MTRR_PHYSMASK{i}", mtrr_mask, requires=("mtrr",))
    for number in Msr:
        if number.name.startswith("MTRR_FIX"):
            yield MsrSpec(number, f"IA32_{number.name}", mtrr_fixed, requires=("mtrr",))
    yield MsrSpec(Msr.MTRR_DEF_TYPE, "IA32_MTRR_DEF_TYPE", mtrr_def_type, requires=("mtrr",))


def _machine_check() -> Iterator[MsrSpec]:
    """The machine-check global registers and the banks."""
    need = ("mca",)

    def capability(processor: Processor) -> int:
        return McgCap.of(count=MC_BANKS[processor.vendor], ctl_present=1)

    yield MsrSpec(Msr.MCG_CAP, "IA32_MCG_CAP", read_only, requires=need, reset=capability)
    yield MsrSpec(Msr.MCG_STATUS, "IA32_MCG_STATUS", bits(McgStatus.DECLARED), requires=need)
    yield MsrSpec(Msr.MCG_CTL, "IA32_MCG_CTL", all_or_nothing, requires=need)
    rules = (("CTL", all_or_nothing), ("STATUS", mc_status), ("ADDR", anything), ("MISC", anything))
    for bank in range(max(MC_BANKS.values())):
        vendors = frozenset(vendor for vendor, count in MC_BANKS.items() if bank < count)
        for offset, (suffix, rule) in enumerate(rules):
            number = Msr.MC0_CTL + 4 * bank + offset
            yield MsrSpec(number, f"IA32_MC{bank}_{suffix}", rule, vendors, need)


# Reserved bits of the x2APIC registers, as masks of what may be 1.
# SDM 3A "Local APIC Register Address Space", "Local Vector Table".
_X2APIC_WRITABLE: dict[Msr, int] = {
    Msr.X2APIC_TPR: 0xFF,
    Msr.X2APIC_EOI: 0,
    Msr.X2APIC_SVR: 0x13FF,
    Msr.X2APIC_ESR: 0,
    Msr.X2APIC_ICR: 0xFFFF_FFFF_000C_CFFF,
    Msr.X2APIC_LVT_TIMER: 0x710FF,
    Msr.X2APIC_LVT_THERMAL: 0x117FF,
    Msr.X2APIC_LVT_PMI: 0x117FF,
    Msr.X2APIC_LVT_LINT0: 0x1F7FF,
    Msr.X2APIC_LVT_LINT1: 0x1F7FF,
    Msr.X2APIC_LVT_ERROR: 0x110FF,
    Msr.X2APIC_INIT_COUNT: 0xFFFF_FFFF,
    Msr.X2APIC_DIV_CONF: 0xB,
    Msr.X2APIC_SELF_IPI: 0xFF,
}
_X2APIC_WRITE_ONLY = frozenset({Msr.X2APIC_EOI, Msr.X2APIC_SELF_IPI})
_X2APIC_ARRAYS = (Msr.X2APIC_ISR0, Msr.X2APIC_TMR0, Msr.X2APIC_IRR0)


def _x2apic() -> Iterator[MsrSpec]:
    """The x2APIC's registers; the local APIC keeps them and is enabled or not."""
    for number in Msr:
        if not number.name.startswith("X2APIC_"):
            continue
        may = _X2APIC_WRITABLE.get(number)
        rule = read_only if may is None else bits(may)
        readable = number not in _X2APIC_WRITE_ONLY
        for i in range(8 if number in _X2APIC_ARRAYS else 1):
            name = f"IA32_{number.name.rstrip('0') if number in _X2APIC_ARRAYS else number.name}"
            yield MsrSpec(
                number + i,
                f"{name}{i}" if number in _X2APIC_ARRAYS else name,
                rule,
                requires=("x2apic",),
                readable=readable,
                live=True,
            )


_VMX_NEEDS: dict[Msr, str] = {
    Msr.VMX_PROCBASED_CTLS2: "vmx-secondary-ctls",
    Msr.VMX_TRUE_PINBASED_CTLS: "vmx-true-ctls",
    Msr.VMX_TRUE_PROCBASED_CTLS: "vmx-true-ctls",
    Msr.VMX_TRUE_EXIT_CTLS: "vmx-true-ctls",
    Msr.VMX_TRUE_ENTRY_CTLS: "vmx-true-ctls",
    Msr.VMX_VMFUNC: "vmx-vmfunc",
    Msr.VMX_PROCBASED_CTLS3: "vmx-tertiary-ctls",
    Msr.VMX_EXIT_CTLS2: "vmx-exit-secondary-ctls",
}


def _vmx() -> Iterator[MsrSpec]:
    """The VMX capability MSRs, read-only; the CPU model provides the values."""
    for number in Msr:
        if number.name.startswith("VMX_"):
            need: tuple[str, ...] = (_VMX_NEEDS.get(number, "vmx"),)
            if number is Msr.VMX_EPT_VPID_CAP:
                need = ("vmx-ept", "vmx-vpid")
            yield MsrSpec(number, f"IA32_{number.name}", read_only, INTEL, need)


_SPEC_CTRL_FEATURES = tuple(SPEC_CTRL_BITS)
_HWCR_RESET = Hwcr.of(tsc_freq_sel=1)
_SYSCFG_RESET = SysCfg.of(mtrr_var_dram_enable=1)


def _common() -> Iterator[MsrSpec]:
    """What both vendors have."""
    m, s = Msr, MsrSpec
    revision = MICROCODE_REVISION
    yield s(m.TSC, "IA32_TIME_STAMP_COUNTER", anything, requires=("tsc",), live=True)
    yield s(m.APIC_BASE, "IA32_APIC_BASE", apic_base, reset=APIC_BASE_RESET, live=True)
    yield s(m.TSC_ADJUST, "IA32_TSC_ADJUST", anything, requires=("tsc-adjust",), live=True)
    yield s(m.SPEC_CTRL, "IA32_SPEC_CTRL", spec_ctrl, requires=_SPEC_CTRL_FEATURES)
    yield s(m.PRED_CMD, "IA32_PRED_CMD", bits(1), requires=("spec-ctrl", "ibpb"), readable=False)
    yield s(m.FLUSH_CMD, "IA32_FLUSH_CMD", bits(1), requires=("flush-l1d",), readable=False)
    yield s(m.SYSENTER_CS, "IA32_SYSENTER_CS", low_half, requires=("sep",))
    yield s(m.SYSENTER_ESP, "IA32_SYSENTER_ESP", sysenter_address, requires=("sep",))
    yield s(m.SYSENTER_EIP, "IA32_SYSENTER_EIP", sysenter_address, requires=("sep",))
    yield s(m.DEBUGCTL, "IA32_DEBUGCTL", bits(DebugCtl.DECLARED))
    yield s(m.PAT, "IA32_PAT", pat, requires=("pat",), reset=PAT_RESET)
    yield s(m.TSC_DEADLINE, "IA32_TSC_DEADLINE", anything, requires=("tsc-deadline",), live=True)
    yield s(m.XSS, "IA32_XSS", bits(0), requires=("xsaves",))
    yield s(m.EFER, "IA32_EFER", efer, requires=("lm", "nx", "syscall", "svm"), live=True)
    yield s(m.STAR, "IA32_STAR", anything, requires=("syscall",))
    yield s(m.LSTAR, "IA32_LSTAR", canonical, requires=("lm",))
    yield s(m.CSTAR, "IA32_CSTAR", canonical, requires=("lm",))
    yield s(m.FMASK, "IA32_FMASK", low_half, requires=("lm",))
    yield s(m.FS_BASE, "IA32_FS_BASE", canonical, requires=("lm",), live=True)
    yield s(m.GS_BASE, "IA32_GS_BASE", canonical, requires=("lm",), live=True)
    yield s(m.KERNEL_GS_BASE, "IA32_KERNEL_GS_BASE", canonical, requires=("lm",))
    yield s(m.TSC_AUX, "IA32_TSC_AUX", low_half, requires=("rdtscp", "rdpid"))
    yield s(
        m.BIOS_SIGN_ID,
        "IA32_BIOS_SIGN_ID",
        ignored,
        INTEL,
        reset=revision[Vendor.INTEL],
        scope=Scope.CORE,
    )


def _intel() -> Iterator[MsrSpec]:
    """What only Intel has, apart from the VMX capability MSRs."""
    m, s = Msr, MsrSpec
    yield s(m.PLATFORM_ID, "IA32_PLATFORM_ID", read_only, INTEL)
    yield s(m.FEATURE_CONTROL, "IA32_FEATURE_CONTROL", feature_control, INTEL, ("vmx", "smx"))
    yield s(m.BIOS_UPDT_TRIG, "IA32_BIOS_UPDT_TRIG", ignored, INTEL, readable=False)
    yield s(m.ARCH_CAPABILITIES, "IA32_ARCH_CAPABILITIES", read_only, INTEL, ("arch-capabilities",))
    yield s(m.MISC_ENABLE, "IA32_MISC_ENABLE", misc_enable, INTEL, reset=_misc_enable_reset)


def _amd() -> Iterator[MsrSpec]:
    """What only AMD has."""
    m, s = Msr, MsrSpec
    revision = MICROCODE_REVISION[Vendor.AMD]
    package = Scope.PACKAGE
    yield s(m.BIOS_SIGN_ID, "PATCH_LEVEL", read_only, AMD, reset=revision, scope=Scope.CORE)
    yield s(m.LAST_BRANCH_FROM_IP, "LastBranchFromIP", read_only, AMD)
    yield s(m.LAST_BRANCH_TO_IP, "LastBranchToIP", read_only, AMD)
    yield s(m.LAST_INT_FROM_IP, "LastIntFromIP", read_only, AMD)
    yield s(m.LAST_INT_TO_IP, "LastIntToIP", read_only, AMD)
    yield s(m.TSC_RATIO, "TSC_RATIO", bits((1 << 40) - 1), AMD, ("tsc-scale",), TSC_RATIO_ONE)
    yield s(m.SYSCFG, "SYSCFG", bits(SysCfg.DECLARED), AMD, reset=_SYSCFG_RESET)
    yield s(m.HWCR, "HWCR", bits(Hwcr.DECLARED), AMD, reset=_HWCR_RESET)
    for i in range(2):
        yield s(m.IORR_BASE0 + 2 * i, f"IORR_BASE{i}", physical(0xFE7), AMD)
        yield s(m.IORR_MASK0 + 2 * i, f"IORR_MASK{i}", physical(0x7FF), AMD)
    yield s(m.TOP_MEM, "TOP_MEM", physical(0x7F_FFFF), AMD, scope=package)
    yield s(m.TOP_MEM2, "TOP_MEM2", physical(0x7F_FFFF), AMD, scope=package)
    yield s(m.NB_CFG, "NB_CFG", anything, AMD, scope=package)
    yield s(m.PATCH_LOADER, "PATCH_LOADER", ignored, AMD, readable=False)
    yield s(m.INT_PENDING, "Interrupt Pending", anything, AMD, scope=package)
    yield s(m.SMM_BASE, "SMM_BASE", bits(0xFFFF_FFFF), AMD, reset=0x30000)
    yield s(m.SMM_ADDR, "SMM_ADDR", physical(0x1_FFFF), AMD)
    yield s(m.SMM_MASK, "SMM_MASK", anything, AMD)
    yield s(m.VM_CR, "VM_CR", vm_cr, AMD, ("svm",))
    yield s(m.IGNNE, "IGNNE", bits(1), AMD)
    yield s(m.VM_HSAVE_PA, "VM_HSAVE_PA", page_address, AMD, ("svm",))
    yield s(m.SVM_LOCK_KEY, "SVM_KEY", svm_key, AMD, ("svm-lock",), readable=False)
    yield s(m.VIRT_SPEC_CTRL, "VIRT_SPEC_CTRL", bits(SpecCtrl.ssbd), AMD, ("virt-ssbd",))
    yield s(m.LS_CFG, "LS_CFG", anything, AMD)
    yield s(m.DC_CFG, "DC_CFG", anything, AMD)
    yield s(m.DE_CFG, "DE_CFG", anything, AMD, reset=DeCfg.lfence_serializing)
    yield s(m.BU_CFG2, "BU_CFG2", anything, AMD)


def physical(reserved: int) -> Legalizer:
    """A physical address with more bits: `reserved` and those above the width must be zero."""

    def legalize(_old: int, new: int, processor: Processor, _msrs: Msrs) -> int | Fault:
        return GP0 if new & (reserved | processor.physical_reserved) else new

    return legalize


def _index(specs: Iterable[MsrSpec]) -> dict[Vendor, dict[int, MsrSpec]]:
    """The specs by vendor and number; a number declared twice for a vendor fails at import."""
    out: dict[Vendor, dict[int, MsrSpec]] = {vendor: {} for vendor in Vendor}
    for spec in specs:
        for vendor in spec.vendors:
            if out[vendor].setdefault(spec.number, spec) is not spec:
                raise TypeError(f"MSR {spec.number:#x} is declared twice for {vendor.value}")
    return out


ALL: tuple[MsrSpec, ...] = (
    *_common(),
    *_intel(),
    *_amd(),
    *_mtrrs(),
    *_machine_check(),
    *_x2apic(),
    *_vmx(),
)

MSRS: dict[Vendor, dict[int, MsrSpec]] = _index(ALL)
"""Every MSR by vendor and number, whatever the features."""


def available(processor: Processor) -> dict[int, MsrSpec]:
    """The MSRs that `processor` has; any other number raises #GP."""
    table = MSRS[processor.vendor]
    return {number: spec for number, spec in table.items() if spec.exists_on(processor)}


def reset_values(processor: Processor) -> dict[int, int]:
    """The values after power-up; capability MSRs are the CPU model's to fill in."""
    return {n: spec.reset_value(processor) for n, spec in available(processor).items()}


def name_of(number: int, vendor: Vendor = Vendor.INTEL) -> str:
    """The manual's name of an MSR, or its number in hexadecimal where we know none."""
    spec = MSRS[vendor].get(number)
    return spec.name if spec else f"{number:#x}"
