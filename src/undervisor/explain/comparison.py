"""What one machine's processor lacks that another's has, what follows, and what to type."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.errors import BadInput
from undervisor.explain.capabilities import CapabilitySet
from undervisor.explain.dump import SVM
from undervisor.explain.features import (
    SVM_FEATURES,
    VMX_FEATURES,
    Feature,
    Setting,
    number_of,
    setting,
)


@dataclass(frozen=True, slots=True)
class Consequence:
    """What goes wrong without a feature, and how to live with that."""

    weight: int
    happens: str
    remedy: str


# Manual's name of the bit, or QEMU's -> what its absence does.  The heavier, the earlier.
CONSEQUENCES: dict[str, Consequence] = {
    "vmx-xsaves": Consequence(
        100,
        'without "Enable XSAVES/XRSTORS" these two instructions raise #UD in L2, whatever CPUID '
        "says there: a hypervisor that takes over a running system (and its CPUID) sees the "
        "kernel die with an invalid opcode at its next context switch",
        "hide XSAVES from the guest (-cpu ...,-xsaves, or policy='disable'), or let L0 offer it "
        "(-cpu ...,+xsaves,+vmx-xsaves) where L0's own processor has it",
    ),
    "vmx-rdtscp-exit": Consequence(
        90,
        "RDTSCP and RDPID raise #UD in L2 unless it is enabled",
        "hide RDTSCP from the guest, or offer vmx-rdtscp-exit",
    ),
    "vmx-invpcid-exit": Consequence(
        85,
        "INVPCID raises #UD in L2 unless it is enabled",
        "hide INVPCID from the guest, or offer vmx-invpcid-exit",
    ),
    "vmx-enable-user-wait-pause": Consequence(
        80,
        "TPAUSE, UMONITOR and UMWAIT raise #UD in L2 unless they are enabled",
        "hide WAITPKG from the guest, or offer the control",
    ),
    "vmx-ept": Consequence(
        95,
        "L1 must shadow L2's page tables: everything in L2 that touches memory maps is slow",
        "offer vmx-ept (module parameter ept=1 in L0)",
    ),
    "vmx-unrestricted-guest": Consequence(
        75,
        "L2 can't run in real mode or without paging; L1 must emulate it, slowly and in part",
        "offer vmx-unrestricted-guest",
    ),
    "vmx-vpid": Consequence(
        60,
        "every entry and exit of L2 flushes its translations",
        "offer vmx-vpid and vmx-invvpid",
    ),
    "vmx-invvpid": Consequence(
        58,
        "L1 can't use VPIDs: it could not invalidate their translations",
        "offer vmx-invvpid and its types",
    ),
    "vmx-shadow-vmcs": Consequence(
        40, "VMREAD and VMWRITE of an L2 hypervisor always exit", "offer vmx-shadow-vmcs"
    ),
    "vmx-pml": Consequence(
        30, "dirty logging of L2 (its migration) takes a fault for each page", "offer vmx-pml"
    ),
    "vmx-ept-1gb": Consequence(
        28, "EPT entries for 1-GByte pages are a misconfiguration", "use 2-MByte pages in EPT"
    ),
    "vmx-eptad": Consequence(
        28, "an EPTP that enables accessed and dirty flags fails VM entry", "clear EPTP bit 6"
    ),
    "npt": Consequence(
        95,
        "L1 must shadow L2's page tables: everything in L2 that touches memory maps is slow",
        "offer npt (module parameter npt=1 in L0)",
    ),
    "nrip-save": Consequence(
        70,
        "the VMCB has no next RIP: L1 must decode each intercepted instruction itself, and "
        "injected software interrupts return to the wrong place in some hypervisors",
        "offer nrip-save",
    ),
    "vgif": Consequence(
        45,
        "STGI and CLGI of a hypervisor in L2 always exit",
        "offer vgif",
    ),
    "v-vmsave-vmload": Consequence(
        45,
        "VMLOAD and VMSAVE of a hypervisor in L2 always exit",
        "offer v-vmsave-vmload",
    ),
    "flushbyasid": Consequence(
        40,
        "TLB_CONTROL 3 and 7 do not exist: L1 flushes everything or changes the ASID",
        "offer flushbyasid",
    ),
    "decodeassists": Consequence(
        35,
        "exits bring no instruction bytes and operands: L1 must read and decode guest memory",
        "offer decodeassists",
    ),
    "vmx-entry-load-perf-global-ctrl": Consequence(
        50,
        "a guest that was given it refuses to start or to arrive here; KVM offers it to L1 only "
        "with a virtual PMU of version 2 or later",
        "give the guest pmu=on on both sides, or disable the feature in its CPU definition",
    ),
    "vmx-exit-load-perf-global-ctrl": Consequence(
        50,
        "a guest that was given it refuses to start or to arrive here; KVM offers it to L1 only "
        "with a virtual PMU of version 2 or later",
        "give the guest pmu=on on both sides, or disable the feature in its CPU definition",
    ),
}
_GENERAL = Consequence(
    10,
    "setting the control makes VM entry fail with error 7",
    "adjust control words to the capability MSRs before writing them",
)
_REPORTED = Consequence(5, "software that relies on it fails", "check for it first")


@dataclass(frozen=True, slots=True)
class Difference:
    """A feature that `have` has and `lack` lacks; `field` is its control word's name, or a MSR."""

    feature: Feature
    ours: str
    theirs: str
    consequence: Consequence

    @property
    def bit(self) -> str:
        """Where it is reported: MSR and bit."""
        bits = self.feature.bits
        shift = 32 if self.feature.word is not None and not self.feature.word.flexible else 0
        known = VmxMsr._value2member_map_.get(self.feature.msr)
        msr = known.name if isinstance(known, VmxMsr) else self.feature.group
        place = f"{bits.lsb + shift}" if bits.lsb == bits.msb else f"{bits.msb}:{bits.lsb}"
        return f"{msr} bit {place}"


@dataclass(frozen=True, slots=True)
class WidthDifference:
    """Two address widths that differ."""

    kind: str
    ours: int
    theirs: int

    @property
    def happens(self) -> str:
        """What follows."""
        if self.ours < self.theirs:
            return (
                f"the second believes in {self.theirs} {self.kind} address bits and the first has "
                f"{self.ours}: addresses and reserved bits between them pass the checks of the "
                "second and fail on the first (an L2 page fault or EPT misconfiguration that "
                "nobody expects, or VM entry error 7 for an address of a VMX structure). It is a "
                "choice of the CPU model (QEMU's default is 40), not an off-by-one error"
            )
        return (
            f"addresses above {self.theirs} bits that the first accepts are reserved on the "
            "second: page tables with memory there fault, and a guest moved there breaks"
        )

    @property
    def remedy(self) -> str:
        """What to type."""
        if self.kind == "physical":
            return (
                "-cpu ...,host-phys-bits=on (libvirt: <maxphysaddr mode='passthrough'/>), or "
                f"phys-bits={min(self.ours, self.theirs)} on both"
            )
        return "switch LA57 on or off on both sides (-cpu ...,-la57)"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`lost`: what the second lacks; `gained`: what only it has; `unknown`: not comparable."""

    first: str
    second: str
    lost: list[Difference]
    gained: list[Difference]
    widths: list[WidthDifference]
    unknown: list[str]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.lost or self.gained or self.widths)


def compare(first: CapabilitySet, second: CapabilitySet) -> Comparison:
    """What `second` lacks that `first` has, the gravest first; BadInput across vendors."""
    if first.vendor and second.vendor and first.vendor != second.vendor:
        raise BadInput(
            f"{first.name} has {first.vendor.upper()} and {second.name} {second.vendor.upper()}: "
            "nothing is comparable, and a guest that nests can't move between them"
        )
    svm = SVM in (first.vendor, second.vendor)
    ours, theirs = _values(first, svm), _values(second, svm)
    lost: list[Difference] = []
    gained: list[Difference] = []
    unknown: list[str] = []
    for feature in SVM_FEATURES if svm else VMX_FEATURES:
        mine, other = setting(feature, ours), setting(feature, theirs)
        if Setting.UNKNOWN in (mine, other):
            if mine is not other:
                unknown.append(feature.group)
            continue
        difference = _difference(feature, ours, theirs)
        if difference is None:
            continue
        (lost if _loses(feature, ours, theirs) else gained).append(difference)
    order = lambda d: (-d.consequence.weight, d.feature.msr, d.feature.bits.lsb)  # noqa: E731
    return Comparison(
        first.name,
        second.name,
        sorted(lost, key=order),
        sorted(gained, key=order),
        _widths(first, second),
        sorted(set(unknown)),
    )


def _values(found: CapabilitySet, svm: bool) -> dict[int, int]:
    if not svm:
        return found.msrs
    return dict(enumerate(found.svm)) if found.svm is not None else {}


IGNORED_NUMBERS = frozenset({"VMCS revision identifier", "MSEG revision identifier"})
"""Numbers that identify and do not offer anything."""


def _difference(
    feature: Feature, ours: dict[int, int], theirs: dict[int, int]
) -> Difference | None:
    """The difference in one feature, None where there is none."""
    if feature.is_number and feature.word is None:
        mine, other = number_of(feature, ours), number_of(feature, theirs)
        if mine == other or feature.manual in IGNORED_NUMBERS:
            return None
        return Difference(feature, str(mine), str(other), _REPORTED)
    one, two = setting(feature, ours), setting(feature, theirs)
    if one is two:
        return None
    return Difference(feature, one.value, two.value, _consequence(feature, two))


def _consequence(feature: Feature, theirs: Setting) -> Consequence:
    if feature.qemu_frees and theirs is not Setting.NO:
        return Consequence(8, "the control can't be 0 there: what it does always happens", "")
    known = CONSEQUENCES.get(feature.qemu)
    if known is not None:
        return known
    return _GENERAL if feature.word is not None else _REPORTED


_FREEDOM = {Setting.NO: 0, Setting.FORCED: 1, Setting.ALLOWED: 2, Setting.DEFAULT: 2}


def _loses(feature: Feature, ours: dict[int, int], theirs: dict[int, int]) -> bool:
    """Whether the second has less."""
    if feature.is_number and feature.word is None:
        return (number_of(feature, theirs) or 0) < (number_of(feature, ours) or 0)
    one, two = setting(feature, ours), setting(feature, theirs)
    if feature.word is None:
        return two is Setting.NO
    return _FREEDOM[two] < _FREEDOM[one]


def _widths(first: CapabilitySet, second: CapabilitySet) -> list[WidthDifference]:
    pairs = (
        ("physical", first.physical_width, second.physical_width),
        ("linear", first.linear_width, second.linear_width),
    )
    return [WidthDifference(kind, a, b) for kind, a, b in pairs if a and b and a != b]


def qemu_switches(comparison: Comparison, *, common: bool = False) -> list[tuple[str, bool]]:
    """QEMU's features that make the two equal: (name, on).

    Those that the second must be given; with `common`, those that the first must give up, so that
    a guest runs on both.
    """
    names: dict[str, bool] = {}
    for difference in comparison.lost:
        if difference.feature.qemu:
            names.setdefault(difference.feature.qemu, not common)
    if not common:
        for difference in comparison.gained:
            if difference.feature.qemu:
                names.setdefault(difference.feature.qemu, False)
    return list(names.items())


def cpu_option(switches: list[tuple[str, bool]]) -> str:
    """The features for QEMU's -cpu."""
    return ",".join(f"{name}={'on' if on else 'off'}" for name, on in switches)


def libvirt_lines(switches: list[tuple[str, bool]]) -> list[str]:
    """The lines for libvirt's <cpu>."""
    return [
        f"<feature policy='{'require' if on else 'disable'}' name='{name}'/>"
        for name, on in switches
    ]
