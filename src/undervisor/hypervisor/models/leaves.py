"""What CPUID answers for a model: fixed answers made once, and the few that depend on state.

SDM 2A "CPUID--CPU Identification"; APM 3 appendix "Obtaining Processor Information Via the CPUID
Instruction".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from undervisor.arch.x86 import cpuid
from undervisor.arch.x86.cpuid import Answer, Leaf, Output, Processor, Vendor
from undervisor.arch.x86.msr import MiscEnable

TSC_HZ: Final = 1_000_000_000
"""The frequency of the TSC, of the core crystal clock and of the local APIC's timer."""

HYPERVISOR_SIGNATURE: Final = "UndervisorL0"
NOTHING: Final = Answer()
LINE: Final = 64
"""Bytes of a cache line."""


@dataclass(slots=True)
class CpuidState:
    """What CPUID mirrors of a logical processor; its owner keeps it up to date.

    `cpus`: logical processors of the machine, one thread per core, one package.  `osxsave`:
    CR4.OSXSAVE.  `apic_enabled`: IA32_APIC_BASE bit 11.  `misc_enable`: IA32_MISC_ENABLE, Intel.
    """

    apic_id: int = 0
    cpus: int = 1
    osxsave: bool = False
    apic_enabled: bool = True
    misc_enable: int = MiscEnable.monitor


@dataclass(frozen=True, slots=True)
class Identity:
    """What a processor says it is, apart from its features."""

    family: int
    model: int
    stepping: int
    brand: str
    basic_limit: int
    extended_limit: int

    def reaching(self, features: Iterable[str]) -> Identity:
        """The same with limits high enough to report `features`."""
        leaves = [cpuid.BY_NAME[name].leaf for name in features if name in cpuid.BY_NAME]
        basic = [leaf for leaf in leaves if leaf < Leaf.HYPERVISOR_VENDOR]
        extended = [leaf for leaf in leaves if leaf >= Leaf.EXTENDED_VENDOR]
        return replace(
            self,
            basic_limit=max([self.basic_limit, *basic]),
            extended_limit=max([self.extended_limit, *extended]),
        )


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache; sizes in bytes. `shared`: by all logical processors of the package."""

    level: int
    kind: cpuid.CacheType
    size: int
    ways: int
    shared: bool = False

    @property
    def sets(self) -> int:
        """The number of sets."""
        return self.size // (self.ways * LINE)


CACHES: Final[dict[Vendor, tuple[Cache, ...]]] = {
    Vendor.INTEL: (
        Cache(1, cpuid.CacheType.DATA, 32 << 10, 8),
        Cache(1, cpuid.CacheType.INSTRUCTION, 32 << 10, 8),
        Cache(2, cpuid.CacheType.UNIFIED, 256 << 10, 4),
        Cache(3, cpuid.CacheType.UNIFIED, 8 << 20, 16, shared=True),
    ),
    Vendor.AMD: (
        Cache(1, cpuid.CacheType.DATA, 32 << 10, 8),
        Cache(1, cpuid.CacheType.INSTRUCTION, 64 << 10, 4),
        Cache(2, cpuid.CacheType.UNIFIED, 512 << 10, 8),
        Cache(3, cpuid.CacheType.UNIFIED, 8 << 20, 16, shared=True),
    ),
}

# Leaf 2: data TLB 63h and 03h, instruction TLB 76h and B5h, 64-byte prefetch F0h, second-level
# TLB C3h; FFh says that leaf 4 describes the caches.
_DESCRIPTORS: Final = Answer(0x76036301, 0x00F0B5FF, 0, 0x00C30000)

# Leaves 8000_0005h, 8000_0006h and 8000_0019h: entries and associativity of the TLBs, then size,
# associativity, lines per tag and line size of the caches.
_AMD_L1: Final = Answer(0xFF40FF40, 0xFF40FF40, 0x20080140, 0x40040140)
_AMD_L2_L3: Final = Answer(0x36006400, 0x56006400, 0x02006140, 0x00408140)
_INTEL_L2: Final = Answer(ecx=0x01004040)
_AMD_TLB_1GB: Final = Answer(0xF040F040, 0)

XSAVE_AREA: Final = 576
"""Bytes of the x87 and SSE state with the XSAVE header: all that XCR0 can enable."""

XCR0_SUPPORTED: Final = 0b11

_MONITOR: Final = MiscEnable.monitor
_RESTRICT: Final = MiscEnable.monitor | MiscEnable.limit_cpuid | MiscEnable.xd_disable
_LIMITED: Final = 2
_MONITOR_BREAKS: Final = cpuid.MonitorExtensions.of(enumerated=1, interrupt_break=1)
_C1_SUBSTATES: Final = 0x10
_BUS_MHZ: Final = 100
_SVM_REVISION: Final = 1
_NO_WORDS: Final = [0, 0, 0, 0]
NASID: Final = 16
"""Address space identifiers, ASID 0 included (8000_000Ah EBX)."""

Dynamic = Callable[[int, CpuidState], Answer]


def _width(count: int) -> int:
    """The bits of an APIC id that `count` logical processors need."""
    return (count - 1).bit_length()


def _by_subleaf(answers: dict[int, Answer]) -> Dynamic:
    """Answers that depend on ECX alone."""

    def answer(subleaf: int, _state: CpuidState) -> Answer:
        return answers.get(subleaf, NOTHING)

    return answer


class Leaves:
    """The answers of one model."""

    def __init__(self, processor: Processor, identity: Identity) -> None:
        self.processor = processor
        self.identity = identity
        self._words = cpuid.words(
            cpuid.BY_NAME[name] for name in processor.features if name in cpuid.BY_NAME
        )
        amd = processor.vendor is Vendor.AMD
        # The settings of IA32_MISC_ENABLE that hide nothing; AMD does not have the register.
        self._watched = 0 if amd else _RESTRICT
        self._usual = _MONITOR if processor.has("monitor") else 0
        fixed = self._common() | (self._amd() if amd else self._intel())
        dynamic = self._common_dynamic() | (self._amd_dynamic() if amd else self._intel_dynamic())
        self._fixed = {
            leaf: Answer(*map(int, answer)) for leaf, answer in fixed.items() if self._offers(leaf)
        }
        self._dynamic = {leaf: answer for leaf, answer in dynamic.items() if self._offers(leaf)}

    def answer(self, leaf: int, subleaf: int, state: CpuidState) -> Answer:
        """EAX, EBX, ECX, EDX of CPUID; `leaf` and `subleaf` are the 32-bit inputs."""
        if (state.misc_enable ^ self._usual) & self._watched:
            return self._restricted(leaf, subleaf, state)
        fixed = self._fixed.get(leaf)
        if fixed is not None:
            return fixed
        dynamic = self._dynamic.get(leaf)
        if dynamic is not None:
            return dynamic(subleaf, state)
        return self._absent(leaf, subleaf, state)

    def _offers(self, leaf: int) -> bool:
        """Whether `leaf` is within the limits that leaves 0 and 8000_0000h report."""
        if leaf >= Leaf.EXTENDED_VENDOR:
            return leaf <= self.identity.extended_limit
        if leaf >= Leaf.HYPERVISOR_VENDOR:
            return self.processor.has("hypervisor") and leaf == Leaf.HYPERVISOR_VENDOR
        return leaf <= self.identity.basic_limit

    def _absent(self, leaf: int, subleaf: int, state: CpuidState) -> Answer:
        """A leaf without data: zeros in range; out of range Intel repeats the highest basic."""
        highest = self.identity.basic_limit
        described = highest in self._fixed or highest in self._dynamic
        if self._offers(leaf) or self.processor.vendor is Vendor.AMD or not described:
            return NOTHING
        return self.answer(highest, subleaf, state)

    def _restricted(self, leaf: int, subleaf: int, state: CpuidState) -> Answer:
        """The same under IA32_MISC_ENABLE's less usual settings."""
        misc = state.misc_enable
        limited = misc & MiscEnable.limit_cpuid
        if limited and leaf < Leaf.HYPERVISOR_VENDOR:
            leaf = min(leaf, _LIMITED)
        usual = replace(state, misc_enable=self._usual)
        answer = self.answer(leaf, subleaf, usual)
        if leaf == Leaf.VENDOR and limited:
            return answer._replace(eax=min(answer.eax, _LIMITED))
        if leaf == Leaf.VERSION_AND_FEATURES and not misc & MiscEnable.monitor:
            return answer._replace(ecx=answer.ecx & ~cpuid.BY_NAME["monitor"].mask)
        if leaf == Leaf.EXTENDED_FEATURES and misc & MiscEnable.xd_disable:
            return answer._replace(edx=answer.edx & ~cpuid.BY_NAME["nx"].mask)
        return answer

    def _word(self, leaf: int, subleaf: int, register: Output) -> int:
        """The feature bits of one output register."""
        return self._words.get((leaf, subleaf), _NO_WORDS)[register]

    def _version(self) -> int:
        who = self.identity
        return cpuid.Version.build(who.family, who.model, who.stepping)

    def _common(self) -> dict[int, Answer]:
        """The fixed answers that do not depend on the vendor."""
        who, has = self.identity, self.processor.has
        brand = cpuid.brand_registers(who.brand)
        monitor = Answer(LINE, LINE, _MONITOR_BREAKS, _C1_SUBSTATES) if has("monitor") else NOTHING
        return {
            Leaf.VENDOR: cpuid.vendor_registers(self.processor.vendor.value, who.basic_limit),
            Leaf.MONITOR_MWAIT: monitor,
            Leaf.THERMAL_AND_POWER: Answer(
                self._word(6, 0, Output.EAX), 0, self._word(6, 0, Output.ECX)
            ),
            Leaf.HYPERVISOR_VENDOR: cpuid.signature_registers(
                HYPERVISOR_SIGNATURE, Leaf.HYPERVISOR_VENDOR
            ),
            Leaf.BRAND_STRING_1: brand[0],
            Leaf.BRAND_STRING_2: brand[1],
            Leaf.BRAND_STRING_3: brand[2],
            Leaf.POWER_MANAGEMENT: Answer(edx=self._word(0x80000007, 0, Output.EDX)),
        }

    def _common_dynamic(self) -> dict[int, Dynamic]:
        """The answers that depend on state or on ECX, for both vendors."""
        dynamic: dict[int, Dynamic] = {
            Leaf.VERSION_AND_FEATURES: self._version_and_features(),
            Leaf.STRUCTURED_FEATURES: self._structured_features(),
        }
        if self.processor.has("xsave"):
            dynamic[Leaf.EXTENDED_STATE] = self._extended_state()
        if self.processor.has("x2apic"):
            dynamic[Leaf.EXTENDED_TOPOLOGY] = self._extended_topology
        return dynamic

    def _intel(self) -> dict[int, Answer]:
        widths = cpuid.AddressWidths.of(
            physical=self.processor.physical_width, linear=self.processor.linear_width
        )
        mhz = TSC_HZ // 1_000_000
        return {
            Leaf.CACHE_DESCRIPTORS: _DESCRIPTORS,
            Leaf.TIME_STAMP_COUNTER: Answer(1, 1, TSC_HZ),
            Leaf.PROCESSOR_FREQUENCY: Answer(mhz, mhz, _BUS_MHZ),
            Leaf.EXTENDED_VENDOR: Answer(self.identity.extended_limit),
            Leaf.EXTENDED_FEATURES: Answer(
                0,
                0,
                self._word(0x80000001, 0, Output.ECX),
                self._word(0x80000001, 0, Output.EDX),
            ),
            Leaf.L2_L3_CACHE_AND_TLB: _INTEL_L2,
            Leaf.ADDRESS_WIDTHS: Answer(widths, self._word(0x80000008, 0, Output.EBX)),
        }

    def _intel_dynamic(self) -> dict[int, Dynamic]:
        return {Leaf.CACHE_PARAMETERS: self._caches}

    def _amd(self) -> dict[int, Answer]:
        has = self.processor.has
        aliases = self._word(1, 0, Output.EDX) & cpuid.AMD_EDX_ALIASES
        vendor = self.processor.vendor.value
        svm = Answer(_SVM_REVISION, NASID, 0, self._word(0x8000000A, 0, Output.EDX))
        return {
            Leaf.EXTENDED_VENDOR: cpuid.vendor_registers(vendor, self.identity.extended_limit),
            Leaf.EXTENDED_FEATURES: Answer(
                self._version(),
                0,
                self._word(0x80000001, 0, Output.ECX),
                self._word(0x80000001, 0, Output.EDX) | aliases,
            ),
            Leaf.L1_CACHE_AND_TLB: _AMD_L1,
            Leaf.L2_L3_CACHE_AND_TLB: _AMD_L2_L3,
            Leaf.SVM: svm if has("svm") else NOTHING,
            Leaf.TLB_1GB: _AMD_TLB_1GB if has("pdpe1gb") else NOTHING,
        }

    def _amd_dynamic(self) -> dict[int, Dynamic]:
        dynamic: dict[int, Dynamic] = {Leaf.ADDRESS_WIDTHS: self._amd_widths}
        if self.processor.has("topoext"):
            dynamic[Leaf.CACHE_PROPERTIES] = self._caches
            dynamic[Leaf.TOPOLOGY_EXTENSIONS] = self._topology_extensions
        return dynamic

    def _version_and_features(self) -> Dynamic:
        """Leaf 1, the busiest leaf: everything fixed is computed once."""
        eax = int(self._version())
        ecx, edx = self._word(1, 0, Output.ECX), self._word(1, 0, Output.EDX)
        osxsave, many = cpuid.BY_NAME["osxsave"].mask, cpuid.BY_NAME["ht"].mask
        lines = LINE // 8 << 8
        apic_bit = ~cpuid.BY_NAME["apic"].mask

        def answer(_subleaf: int, state: CpuidState) -> Answer:
            c, d = ecx, edx
            if state.osxsave:
                c |= osxsave
            if state.cpus > 1:
                d |= many
            if not state.apic_enabled:
                d &= apic_bit
            ids = 1 << (state.cpus - 1).bit_length()
            return Answer(eax, (state.apic_id & 0xFF) << 24 | ids << 16 | lines, c, d)

        return answer

    def _structured_features(self) -> Dynamic:
        """Leaf 7; EAX of subleaf 0 is the highest subleaf."""
        answers = {
            subleaf: Answer(*word) for (leaf, subleaf), word in self._words.items() if leaf == 7
        }
        answers[0] = answers.get(0, NOTHING)._replace(eax=max(answers, default=0))
        return _by_subleaf(answers)

    def _extended_state(self) -> Dynamic:
        """Leaf 0Dh; x87 and SSE need the same area whichever of them XCR0 enables."""
        compacted = XSAVE_AREA if self.processor.has("xsaves") else 0
        return _by_subleaf(
            {
                0: Answer(XCR0_SUPPORTED, XSAVE_AREA, XSAVE_AREA, 0),
                1: Answer(self._word(0xD, 1, Output.EAX), compacted, 0, 0),
            }
        )

    def _extended_topology(self, subleaf: int, state: CpuidState) -> Answer:
        """Leaf 0Bh: one thread per core, all cores in one package."""
        if subleaf == 0:
            level = cpuid.TopologyLevel.of(level=0, level_type=cpuid.TopologyType.SMT)
            return Answer(0, 1, int(level), state.apic_id)
        if subleaf == 1:
            level = cpuid.TopologyLevel.of(level=1, level_type=cpuid.TopologyType.CORE)
            return Answer(_width(state.cpus), state.cpus, int(level), state.apic_id)
        return Answer(0, 0, subleaf & 0xFF, state.apic_id)

    def _caches(self, subleaf: int, state: CpuidState) -> Answer:
        """Leaves 4 (Intel) and 8000_001Dh (AMD)."""
        vendor = self.processor.vendor
        caches = CACHES[vendor]
        if subleaf >= len(caches):
            return NOTHING
        cache = caches[subleaf]
        ids = 1 << _width(state.cpus)
        parameters = cpuid.CacheParameters.of(
            cache_type=cache.kind,
            level=cache.level,
            self_initializing=1,
            sharing=ids - 1 if cache.shared else 0,
            cores=min(ids - 1, 63) if vendor is Vendor.INTEL else 0,
        )
        geometry = cpuid.CacheGeometry.of(line_size=LINE - 1, partitions=0, ways=cache.ways - 1)
        return Answer(int(parameters), int(geometry), cache.sets - 1, 0)

    def _amd_widths(self, _subleaf: int, state: CpuidState) -> Answer:
        """Leaf 8000_0008h."""
        widths = cpuid.AddressWidths.of(
            physical=self.processor.physical_width, linear=self.processor.linear_width
        )
        cores = cpuid.CoreCount.of(threads=state.cpus - 1, apic_id_size=_width(state.cpus))
        return Answer(int(widths), self._word(0x80000008, 0, Output.EBX), int(cores), 0)

    def _topology_extensions(self, _subleaf: int, state: CpuidState) -> Answer:
        """Leaf 8000_001Eh."""
        return Answer(state.apic_id, int(cpuid.ComputeUnit.of(core_id=state.apic_id & 0xFF)), 0, 0)
