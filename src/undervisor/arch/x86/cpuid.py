"""CPUID: every feature bit by name, and the leaves that have a structure of their own.

A feature is named as QEMU's `-cpu` names it (`vmx`, `xsaves`, `pdpe1gb`, `tsc-deadline`), because
that is how operators write it, and carries the manual's name for the bit.

Sources: SDM volume 2A "CPUID--CPU Identification"; APM volume 3 appendix "Obtaining Processor
Information Via the CPUID Instruction".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from undervisor.arch.bits import Bits, Register


class Leaf(IntEnum):
    """The functions of CPUID (the input EAX), as the manuals title them."""

    VENDOR = 0x0
    VERSION_AND_FEATURES = 0x1
    CACHE_DESCRIPTORS = 0x2
    CACHE_PARAMETERS = 0x4
    MONITOR_MWAIT = 0x5
    THERMAL_AND_POWER = 0x6
    STRUCTURED_FEATURES = 0x7
    DIRECT_CACHE_ACCESS = 0x9
    PERFORMANCE_MONITORING = 0xA
    EXTENDED_TOPOLOGY = 0xB
    EXTENDED_STATE = 0xD
    PROCESSOR_TRACE = 0x14
    TIME_STAMP_COUNTER = 0x15
    PROCESSOR_FREQUENCY = 0x16
    V2_EXTENDED_TOPOLOGY = 0x1F
    HYPERVISOR_VENDOR = 0x40000000
    EXTENDED_VENDOR = 0x80000000
    EXTENDED_FEATURES = 0x80000001
    BRAND_STRING_1 = 0x80000002
    BRAND_STRING_2 = 0x80000003
    BRAND_STRING_3 = 0x80000004
    L1_CACHE_AND_TLB = 0x80000005
    L2_L3_CACHE_AND_TLB = 0x80000006
    POWER_MANAGEMENT = 0x80000007
    ADDRESS_WIDTHS = 0x80000008
    SVM = 0x8000000A
    TLB_1GB = 0x80000019
    PERFORMANCE_OPTIMIZATION = 0x8000001A
    CACHE_PROPERTIES = 0x8000001D
    TOPOLOGY_EXTENSIONS = 0x8000001E
    EXTENDED_FEATURES_2 = 0x80000021


class Output(IntEnum):
    """Which output register of CPUID a feature bit is in."""

    EAX = 0
    EBX = 1
    ECX = 2
    EDX = 3


class Answer(NamedTuple):
    """What CPUID returns."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class Vendor(Enum):
    """A processor vendor; the value is the string of leaf 0."""

    INTEL = "GenuineIntel"
    AMD = "AuthenticAMD"


@dataclass(frozen=True, slots=True, order=True)
class Feature:
    """One feature bit of CPUID.

    `name` is QEMU's, `manual` the SDM's or APM's.
    """

    leaf: int
    subleaf: int
    register: Output
    bit: int
    name: str
    manual: str

    @property
    def mask(self) -> int:
        """The bit as a mask of its 32-bit register."""
        return 1 << self.bit

    def __str__(self) -> str:
        where = f"CPUID.{self.leaf:02X}H"
        if self.leaf in SUBLEAVED:
            where += f".{self.subleaf}"
        return f"{self.name} ({where}:{self.register.name}[{self.bit}], {self.manual})"


SUBLEAVED = frozenset({0x4, 0x7, 0xB, 0xD, 0x14, 0x1F, 0x8000001D})
"""Leaves whose answer depends on ECX."""


def _word(leaf: int, subleaf: int, register: Output, rows: str) -> Iterator[Feature]:
    """The features of one output register; a row is `bit name: the manual's name`."""
    for row in rows.strip().splitlines():
        head, manual = row.split(":", 1)
        bit, name = head.split()
        yield Feature(leaf, subleaf, register, int(bit), name, manual.strip())


EAX, EBX, ECX, EDX = Output

FEATURES: tuple[Feature, ...] = (
    *_word(
        0x1,
        0,
        EDX,
        """
        0 fpu: FPU, x87 on chip
        1 vme: VME, virtual-8086 mode enhancements
        2 de: DE, debugging extensions
        3 pse: PSE, page size extensions
        4 tsc: TSC, time stamp counter
        5 msr: MSR, RDMSR and WRMSR
        6 pae: PAE, physical address extension
        7 mce: MCE, machine check exception
        8 cx8: CX8, CMPXCHG8B
        9 apic: APIC on chip
        11 sep: SEP, SYSENTER and SYSEXIT
        12 mtrr: MTRR, memory type range registers
        13 pge: PGE, global pages
        14 mca: MCA, machine check architecture
        15 cmov: CMOV, conditional moves
        16 pat: PAT, page attribute table
        17 pse36: PSE-36, 36-bit page size extension
        18 pn: PSN, processor serial number
        19 clflush: CLFSH, CLFLUSH
        21 ds: DS, debug store
        22 acpi: ACPI, thermal monitor and clock control
        23 mmx: MMX
        24 fxsr: FXSR, FXSAVE and FXRSTOR
        25 sse: SSE
        26 sse2: SSE2
        27 ss: SS, self snoop
        28 ht: HTT, more than one logical processor
        29 tm: TM, thermal monitor
        31 pbe: PBE, pending break enable
        """,
    ),
    *_word(
        0x1,
        0,
        ECX,
        """
        0 pni: SSE3
        1 pclmulqdq: PCLMULQDQ
        2 dtes64: DTES64, 64-bit debug store
        3 monitor: MONITOR and MWAIT
        4 ds-cpl: DS-CPL, CPL-qualified debug store
        5 vmx: VMX, virtual machine extensions
        6 smx: SMX, safer mode extensions
        7 est: EIST, enhanced SpeedStep
        8 tm2: TM2, thermal monitor 2
        9 ssse3: SSSE3
        10 cid: CNXT-ID, L1 context id
        11 sdbg: SDBG, silicon debug
        12 fma: FMA
        13 cx16: CMPXCHG16B
        14 xtpr: xTPR update control
        15 pdcm: PDCM, performance capabilities MSR
        17 pcid: PCID, process-context identifiers
        18 dca: DCA, direct cache access
        19 sse4.1: SSE4.1
        20 sse4.2: SSE4.2
        21 x2apic: x2APIC
        22 movbe: MOVBE
        23 popcnt: POPCNT
        24 tsc-deadline: TSC-Deadline, APIC timer deadline mode
        25 aes: AESNI
        26 xsave: XSAVE, XSETBV and XCR0
        27 osxsave: OSXSAVE, CR4.OSXSAVE is set
        28 avx: AVX
        29 f16c: F16C
        30 rdrand: RDRAND
        31 hypervisor: reserved for use by hypervisors
        """,
    ),
    *_word(
        0x6,
        0,
        EAX,
        """
        0 dtherm: digital temperature sensor
        1 turbo-boost: Intel Turbo Boost Technology
        2 arat: ARAT, APIC timer always running
        4 pln: PLN, power limit notification
        5 ecmd: ECMD, clock modulation duty cycle extension
        6 ptm: PTM, package thermal management
        7 hwp: HWP base registers
        """,
    ),
    *_word(0x6, 0, ECX, "0 aperfmperf: hardware coordination feedback, MPERF and APERF"),
    *_word(
        0x7,
        0,
        EBX,
        """
        0 fsgsbase: FSGSBASE
        1 tsc-adjust: IA32_TSC_ADJUST
        2 sgx: SGX
        3 bmi1: BMI1
        4 hle: HLE
        5 avx2: AVX2
        6 fdp-excptn-only: FDP_EXCPTN_ONLY
        7 smep: SMEP
        8 bmi2: BMI2
        9 erms: enhanced REP MOVSB/STOSB
        10 invpcid: INVPCID
        11 rtm: RTM
        12 pqm: RDT-M, resource director monitoring
        13 zero-fcs-fds: FPU CS and FPU DS values deprecated
        14 mpx: MPX
        15 pqe: RDT-A, resource director allocation
        16 avx512f: AVX512F
        17 avx512dq: AVX512DQ
        18 rdseed: RDSEED
        19 adx: ADX
        20 smap: SMAP
        21 avx512ifma: AVX512_IFMA
        22 pcommit: PCOMMIT
        23 clflushopt: CLFLUSHOPT
        24 clwb: CLWB
        25 intel-pt: Intel Processor Trace
        26 avx512pf: AVX512PF
        27 avx512er: AVX512ER
        28 avx512cd: AVX512CD
        29 sha-ni: SHA
        30 avx512bw: AVX512BW
        31 avx512vl: AVX512VL
        """,
    ),
    *_word(
        0x7,
        0,
        ECX,
        """
        0 prefetchwt1: PREFETCHWT1
        1 avx512vbmi: AVX512_VBMI
        2 umip: UMIP, user-mode instruction prevention
        3 pku: PKU, protection keys for user-mode pages
        4 ospke: OSPKE, CR4.PKE is set
        5 waitpkg: WAITPKG
        6 avx512vbmi2: AVX512_VBMI2
        7 cet-ss: CET_SS, shadow stacks
        8 gfni: GFNI
        9 vaes: VAES
        10 vpclmulqdq: VPCLMULQDQ
        11 avx512vnni: AVX512_VNNI
        12 avx512bitalg: AVX512_BITALG
        13 tme: TME_EN
        14 avx512-vpopcntdq: AVX512_VPOPCNTDQ
        16 la57: LA57, 57-bit linear addresses
        22 rdpid: RDPID and IA32_TSC_AUX
        23 kl: KL, key locker
        24 bus-lock-detect: BUS_LOCK_DETECT
        25 cldemote: CLDEMOTE
        27 movdiri: MOVDIRI
        28 movdir64b: MOVDIR64B
        30 sgxlc: SGX_LC
        31 pks: PKS, protection keys for supervisor-mode pages
        """,
    ),
    *_word(
        0x7,
        0,
        EDX,
        """
        2 avx512-4vnniw: AVX512_4VNNIW
        3 avx512-4fmaps: AVX512_4FMAPS
        4 fsrm: fast short REP MOV
        5 uintr: UINTR
        8 avx512-vp2intersect: AVX512_VP2INTERSECT
        9 srbds-ctrl: SRBDS_CTRL
        10 md-clear: MD_CLEAR
        11 rtm-always-abort: RTM_ALWAYS_ABORT
        14 serialize: SERIALIZE
        15 hybrid: Hybrid
        16 tsx-ldtrk: TSXLDTRK
        18 pconfig: PCONFIG
        19 arch-lbr: architectural LBRs
        20 cet-ibt: CET_IBT, indirect branch tracking
        22 amx-bf16: AMX-BF16
        23 avx512-fp16: AVX512_FP16
        24 amx-tile: AMX-TILE
        25 amx-int8: AMX-INT8
        26 spec-ctrl: IBRS and IBPB, IA32_SPEC_CTRL and IA32_PRED_CMD
        27 stibp: STIBP
        28 flush-l1d: L1D_FLUSH, IA32_FLUSH_CMD
        29 arch-capabilities: IA32_ARCH_CAPABILITIES
        30 core-capability: IA32_CORE_CAPABILITIES
        31 ssbd: SSBD
        """,
    ),
    *_word(
        0x7,
        1,
        EAX,
        """
        4 avx-vnni: AVX-VNNI
        5 avx512-bf16: AVX512_BF16
        10 fzrm: fast zero-length REP MOVSB
        11 fsrs: fast short REP STOSB
        12 fsrc: fast short REP CMPSB and SCASB
        17 fred: FRED
        18 lkgs: LKGS
        23 avx-ifma: AVX-IFMA
        26 lam: LAM, linear address masking
        """,
    ),
    *_word(
        0xD,
        1,
        EAX,
        """
        0 xsaveopt: XSAVEOPT
        1 xsavec: XSAVEC and the compacted form of XRSTOR
        2 xgetbv1: XGETBV with ECX = 1
        3 xsaves: XSAVES, XRSTORS and IA32_XSS
        4 xfd: extended feature disable
        """,
    ),
    *_word(
        0x80000001,
        0,
        EDX,
        """
        11 syscall: SysCallSysRet, SYSCALL and SYSRET
        20 nx: NX, execute disable
        22 mmxext: MmxExt, AMD extensions to MMX
        25 fxsr-opt: FFXSR, FXSAVE and FXRSTOR optimizations
        26 pdpe1gb: Page1GB, 1-GByte pages
        27 rdtscp: RDTSCP
        29 lm: LM, long mode
        30 3dnowext: 3DNowExt
        31 3dnow: 3DNow
        """,
    ),
    *_word(
        0x80000001,
        0,
        ECX,
        """
        0 lahf-lm: LahfSahf, LAHF and SAHF in 64-bit mode
        1 cmp-legacy: CmpLegacy, core multi-processing legacy mode
        2 svm: SVM, secure virtual machine
        3 extapic: ExtApicSpace
        4 cr8legacy: AltMovCr8, LOCK MOV CR0 means MOV CR8
        5 abm: ABM, LZCNT
        6 sse4a: SSE4A
        7 misalignsse: MisAlignSse
        8 3dnowprefetch: 3DNowPrefetch, PREFETCHW
        9 osvw: OSVW, OS visible workaround
        10 ibs: IBS, instruction based sampling
        11 xop: XOP
        12 skinit: SKINIT and STGI
        13 wdt: WDT, watchdog timer
        15 lwp: LWP
        16 fma4: FMA4
        17 tce: TCE, translation cache extension
        21 tbm: TBM
        22 topoext: TopologyExtensions, leaves 8000_001Dh and 8000_001Eh
        23 perfctr-core: PerfCtrExtCore
        24 perfctr-nb: PerfCtrExtNB
        29 monitorx: MONITORX and MWAITX
        """,
    ),
    *_word(0x80000007, 0, EDX, "8 invtsc: TscInvariant, invariant TSC"),
    *_word(
        0x80000008,
        0,
        EBX,
        """
        0 clzero: CLZERO
        2 xsaveerptr: RstrFpErrPtrs, error pointers always saved and restored
        4 rdpru: RDPRU
        9 wbnoinvd: WBNOINVD
        12 ibpb: IBPB, PRED_CMD
        14 ibrs: IBRS, SPEC_CTRL
        15 amd-stibp: STIBP
        23 amd-ppin: PPIN
        24 amd-ssbd: SSBD in SPEC_CTRL
        25 virt-ssbd: SsbdVirtSpecCtrl, VIRT_SPEC_CTRL
        26 amd-no-ssb: SsbdNotRequired
        """,
    ),
    *_word(
        0x8000000A,
        0,
        EDX,
        """
        0 npt: NP, nested paging
        1 lbrv: LbrVirt, LBR virtualization
        2 svm-lock: SVML, SVM lock
        3 nrip-save: NRIPS, next sequential RIP at #VMEXIT
        4 tsc-scale: TscRateMsr, MSR-based TSC rate control
        5 vmcb-clean: VmcbClean, VMCB clean bits
        6 flushbyasid: FlushByAsid
        7 decodeassists: DecodeAssists
        10 pause-filter: PauseFilter, pause intercept filter
        12 pfthreshold: PauseFilterThreshold
        13 avic: AVIC, virtual interrupt controller
        15 v-vmsave-vmload: VMSAVEvirt, virtualized VMSAVE and VMLOAD
        16 vgif: VGIF, virtualized GIF
        17 gmet: GMET, guest mode execute trap
        18 x2avic: x2AVIC
        20 v-spec-ctrl: SpecCtrl virtualization
        25 vnmi: VNMI, NMI virtualization
        28 svme-addr-chk: SVME address check
        """,
    ),
    *_word(
        0x80000021,
        0,
        EAX,
        """
        0 no-nested-data-bp: NoNestedDataBp
        2 lfence-always-serializing: LFenceAlwaysSerializing
        6 null-sel-clr-base: NullSelectClearsBase
        8 auto-ibrs: AutomaticIBRS
        """,
    ),
)

BY_NAME: dict[str, Feature] = {feature.name: feature for feature in FEATURES}

ALIASES: dict[str, str] = {
    "sse3": "pni",
    "sse4-1": "sse4.1",
    "sse4_1": "sse4.1",
    "sse4-2": "sse4.2",
    "sse4_2": "sse4.2",
    "lzcnt": "abm",
    "xd": "nx",
    "i64": "lm",
    "ffxsr": "fxsr-opt",
    "fxsr_opt": "fxsr-opt",
    "lahf_lm": "lahf-lm",
    "tsc_adjust": "tsc-adjust",
    "nrip_save": "nrip-save",
    "svm_lock": "svm-lock",
    "vmcb_clean": "vmcb-clean",
    "pause_filter": "pause-filter",
    "tsc_scale": "tsc-scale",
    "sha": "sha-ni",
    "prefetchw": "3dnowprefetch",
}
"""Other spellings of feature names that operators use."""

AMD_EDX_ALIASES = 0x0183F3FF
"""The bits of leaf 1 EDX that AMD repeats in leaf 8000_0001h EDX."""

DYNAMIC = frozenset({"osxsave", "ospke", "ht"})
"""Bits that mirror the state of the processor or its topology, so that no model sets them."""


def _declared_once(features: Iterable[Feature]) -> None:
    """Fail at import where a name or a bit is declared twice."""
    names: set[str] = set()
    places: set[tuple[int, int, int, int]] = set()
    for feature in features:
        place = (feature.leaf, feature.subleaf, feature.register, feature.bit)
        if feature.name in names or place in places or not 0 <= feature.bit < 32:
            raise TypeError(f"{feature} is declared twice or out of range")
        names.add(feature.name)
        places.add(place)


_declared_once(FEATURES)


def words(features: Iterable[Feature]) -> dict[tuple[int, int], list[int]]:
    """The feature bits as output registers: (leaf, subleaf) -> [EAX, EBX, ECX, EDX]."""
    out: dict[tuple[int, int], list[int]] = {}
    for feature in features:
        word = out.setdefault((feature.leaf, feature.subleaf), [0, 0, 0, 0])
        word[feature.register] |= feature.mask
    return out


def features_in(leaf: int, subleaf: int, answer: Iterable[int]) -> list[Feature]:
    """The declared features that an answer of (`leaf`, `subleaf`) reports, in table order."""
    registers = tuple(answer)
    return [
        feature
        for feature in FEATURES
        if (feature.leaf, feature.subleaf) == (leaf, subleaf)
        and registers[feature.register] & feature.mask
    ]


def vendor_registers(text: str, eax: int = 0) -> Answer:
    """Leaf 0's order of a 12-character vendor string: EBX, EDX, ECX."""
    data = text.encode("ascii").ljust(12, b"\0")
    if len(data) != 12:
        raise ValueError(f"{text!r} is not 12 characters")
    ebx, edx, ecx = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4, 8))
    return Answer(eax, ebx, ecx, edx)


def vendor_string(answer: Answer) -> str:
    """The vendor string in an answer of leaf 0 or 8000_0000h."""
    data = b"".join(part.to_bytes(4, "little") for part in (answer.ebx, answer.edx, answer.ecx))
    return data.rstrip(b"\0").decode("latin-1")


def signature_registers(text: str, eax: int = 0) -> Answer:
    """Leaf 4000_0000h's order of a hypervisor signature: EBX, ECX, EDX."""
    in_vendor_order = vendor_registers(text, eax)
    return in_vendor_order._replace(ecx=in_vendor_order.edx, edx=in_vendor_order.ecx)


def brand_registers(text: str) -> tuple[Answer, Answer, Answer]:
    """Leaves 8000_0002h to 8000_0004h: the 48-byte brand string."""
    data = text.encode("ascii")
    if len(data) > 47:
        raise ValueError(f"brand string {text!r} is longer than 47 characters")
    data = data.ljust(48, b"\0")
    part = [int.from_bytes(data[i : i + 4], "little") for i in range(0, 48, 4)]
    return Answer(*part[0:4]), Answer(*part[4:8]), Answer(*part[8:12])


class Version(Register):
    """Leaf 1 EAX: type, family, model and stepping."""

    WIDTH = 32
    stepping = Bits(3, 0)
    base_model = Bits(7, 4)
    base_family = Bits(11, 8)
    processor_type = Bits(13, 12)
    extended_model = Bits(19, 16)
    extended_family = Bits(27, 20)

    @classmethod
    def build(cls, family: int, model: int, stepping: int) -> Version:
        """The register for a display family, display model and stepping."""
        if not (0 <= family <= 0x10E and 0 <= model <= 0xFF and 0 <= stepping <= 0xF):
            raise ValueError(f"no encoding for family {family}, model {model}, step {stepping}")
        return cls.of(
            stepping=stepping,
            base_model=model & 0xF,
            base_family=min(family, 0xF),
            extended_model=model >> 4,
            extended_family=max(family - 0xF, 0),
        )

    @property
    def family(self) -> int:
        """The display family: the extended family counts only when the base is 0xF."""
        return self.base_family + (self.extended_family if self.base_family == 0xF else 0)

    @property
    def model(self) -> int:
        """The display model: the extended model counts only in families 6 and 0xF."""
        extended = self.extended_model if self.base_family in (0x6, 0xF) else 0
        return extended << 4 | self.base_model


class BrandAndApicId(Register):
    """Leaf 1 EBX."""

    WIDTH = 32
    brand_index = Bits(7, 0)
    clflush_size = Bits(15, 8, "CLFLUSH line size in quadwords")
    logical_processors = Bits(23, 16, "addressable ids of logical processors in the package")
    initial_apic_id = Bits(31, 24)


class CacheType(IntEnum):
    """Leaf 4 EAX[4:0] and leaf 8000_001Dh EAX[4:0]."""

    NONE = 0
    DATA = 1
    INSTRUCTION = 2
    UNIFIED = 3


class CacheParameters(Register):
    """Leaf 4 EAX and leaf 8000_001Dh EAX; counts are stored minus one."""

    WIDTH = 32
    cache_type = Bits(4, 0)
    level = Bits(7, 5)
    self_initializing = Bits(8)
    fully_associative = Bits(9)
    sharing = Bits(25, 14, "logical processors that share this cache, minus one")
    cores = Bits(31, 26, "core ids in the package, minus one (Intel)")


class CacheGeometry(Register):
    """Leaf 4 EBX and leaf 8000_001Dh EBX; all values are stored minus one."""

    WIDTH = 32
    line_size = Bits(11, 0)
    partitions = Bits(21, 12)
    ways = Bits(31, 22)


class TopologyType(IntEnum):
    """Leaves 0Bh and 1Fh ECX[15:8]."""

    INVALID = 0
    SMT = 1
    CORE = 2


class TopologyLevel(Register):
    """Leaves 0Bh and 1Fh ECX."""

    WIDTH = 32
    level = Bits(7, 0)
    level_type = Bits(15, 8)


class MonitorExtensions(Register):
    """Leaf 5 ECX."""

    WIDTH = 32
    enumerated = Bits(0)
    interrupt_break = Bits(1, about="interrupts break MWAIT even when they are masked")


class AddressWidths(Register):
    """Leaf 8000_0008h EAX."""

    WIDTH = 32
    physical = Bits(7, 0)
    linear = Bits(15, 8)
    guest_physical = Bits(23, 16, "AMD: 0 means the same as `physical`")


class CoreCount(Register):
    """Leaf 8000_0008h ECX (AMD)."""

    WIDTH = 32
    threads = Bits(7, 0, "NT: threads in the package, minus one")
    apic_id_size = Bits(15, 12, "ApicIdSize: bits of the APIC id that name a thread")


class SvmRevision(Register):
    """Leaf 8000_000Ah EAX."""

    WIDTH = 32
    revision = Bits(7, 0)


class ComputeUnit(Register):
    """Leaf 8000_001Eh EBX."""

    WIDTH = 32
    core_id = Bits(7, 0)
    threads_per_core = Bits(15, 8, "threads per core, minus one")


class NodeId(Register):
    """Leaf 8000_001Eh ECX."""

    WIDTH = 32
    node_id = Bits(7, 0)
    nodes = Bits(10, 8, "nodes per processor, minus one")


@dataclass(frozen=True, slots=True)
class Processor:
    """What rules about registers need to know of a processor.

    `features` holds names of `FEATURES` and of bits of capability MSRs; widths are in bits.
    """

    vendor: Vendor
    features: frozenset[str]
    physical_width: int = 40
    linear_width: int = 48

    def has(self, name: str) -> bool:
        """Whether the feature with QEMU's `name` is there."""
        return name in self.features

    @property
    def physical_reserved(self) -> int:
        """The bits of a 64-bit value above the physical-address width."""
        return (1 << 64) - (1 << self.physical_width)

    def is_canonical(self, address: int) -> bool:
        """Whether a 64-bit linear address is canonical at this processor's width."""
        top = address >> (self.linear_width - 1)
        return top in (0, (1 << (65 - self.linear_width)) - 1)
