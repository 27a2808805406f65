"""Loading and saving MSRs on VM transitions: a broken entry of a list fails or aborts.

SDM, chapter "VM Entries", section "Loading MSRs"; chapter "VM Exits", sections "Saving MSRs" and
"Loading MSRs".  Loading on entry gives a VM exit with reason 34 whose qualification is the
entry's number from 1; on exit, saving gives VMX abort 1 and loading VMX abort 4.  The rules read
one entry of a list as pseudo-fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from undervisor.arch.rules import Outcome, Violation, judge
from undervisor.arch.vmx.capabilities import VmxCapabilities
from undervisor.arch.vmx.checks.declare import Section
from undervisor.arch.vmx.checks.inputs import EntryInput

ENTRY_SIZE = 16


class ListedMsr(IntEnum):
    """One entry of an MSR-load or MSR-store area: bits 31:0, 63:32 and 127:64.

    WRITABLE says whether WRMSR at CPL 0 would take the value (1) or fault (0), READABLE whether
    RDMSR at CPL 0 would give one.
    """

    INDEX = 0x1_0100
    RESERVED = 0x1_0101
    DATA = 0x1_0102
    WRITABLE = 0x1_0103
    READABLE = 0x1_0104


INDEX = ListedMsr.INDEX
IA32_FS_BASE, IA32_GS_BASE = 0xC000_0100, 0xC000_0101
IA32_BIOS_UPDT_TRIG = 0x79
IA32_SMM_MONITOR_CTL = 0x9B
IA32_SMBASE = 0x9E
X2APIC_FIRST = 0x8

MSR_LOADING = Section("vmx.msr-load", "Loading MSRs", Outcome.EXIT_MSR_LOADING)
MSR_LOADING.rule(
    "fs-base",
    "An entry must not load IA32_FS_BASE (C0000100H)",
    (INDEX,),
    lambda s, c: s[INDEX] != IA32_FS_BASE,
    "use the base field of FS in the VMCS",
)
MSR_LOADING.rule(
    "gs-base",
    "An entry must not load IA32_GS_BASE (C0000101H)",
    (INDEX,),
    lambda s, c: s[INDEX] != IA32_GS_BASE,
    "use the base field of GS in the VMCS (IA32_KERNEL_GS_BASE, C0000102H, may be loaded)",
)
MSR_LOADING.rule(
    "x2apic",
    "Bits 31:8 of an entry's index must not be 000008H: the x2APIC MSRs",
    (INDEX,),
    lambda s, c: s[INDEX] >> 8 != X2APIC_FIRST,
    "write APIC registers with WRMSR outside the transition",
)
MSR_LOADING.rule(
    "smm-only",
    "An entry must not load an MSR that can be written only in SMM (IA32_SMM_MONITOR_CTL) if the "
    "processor is not in SMM",
    (INDEX, EntryInput.IN_SMM),
    lambda s, c: s[INDEX] != IA32_SMM_MONITOR_CTL or s[EntryInput.IN_SMM],
    "remove the entry",
)
MSR_LOADING.rule(
    "never-loaded",
    "An entry must not load an MSR that the processor does not load on VM transitions "
    "(IA32_BIOS_UPDT_TRIG)",
    (INDEX,),
    lambda s, c: s[INDEX] != IA32_BIOS_UPDT_TRIG,
    "update microcode with WRMSR outside the transition",
)
MSR_LOADING.rule(
    "reserved",
    "Bits 63:32 of an entry must be 0",
    (ListedMsr.RESERVED, INDEX),
    lambda s, c: not s[ListedMsr.RESERVED],
    "clear the 4 bytes after the index; an entry is 16 bytes: index, 0, value",
)
MSR_LOADING.rule(
    "writable",
    "WRMSR with an entry's index and value must not fault at CPL 0",
    (INDEX, ListedMsr.DATA, ListedMsr.WRITABLE),
    lambda s, c: s[ListedMsr.WRITABLE],
    "remove the entry, or correct the value's reserved bits and canonical address",
)

LOAD_RULES = tuple(MSR_LOADING.rules)
"""The rules for an entry of an MSR-load area, in the manual's order."""

MSR_SAVING = Section("vmx.msr-store", "Saving MSRs", Outcome.ABORT_MSR_SAVING)
MSR_SAVING.rule(
    "x2apic",
    "Bits 31:8 of an entry's index must not be 000008H: the x2APIC MSRs",
    (INDEX,),
    lambda s, c: s[INDEX] >> 8 != X2APIC_FIRST,
    "read APIC registers with RDMSR outside the transition",
)
MSR_SAVING.rule(
    "smm-only",
    "An entry must not save an MSR that can be read only in SMM (IA32_SMBASE) if the processor "
    "is not in SMM",
    (INDEX, EntryInput.IN_SMM),
    lambda s, c: s[INDEX] != IA32_SMBASE or s[EntryInput.IN_SMM],
    "remove the entry",
)
MSR_SAVING.rule(
    "reserved",
    "Bits 63:32 of an entry must be 0",
    (ListedMsr.RESERVED, INDEX),
    lambda s, c: not s[ListedMsr.RESERVED],
    "clear the 4 bytes after the index; an entry is 16 bytes: index, 0, value",
)
MSR_SAVING.rule(
    "readable",
    "RDMSR of an entry's index must not fault at CPL 0",
    (INDEX, ListedMsr.READABLE),
    lambda s, c: s[ListedMsr.READABLE],
    "remove the entry: the processor has no such MSR",
)
STORE_RULES = tuple(MSR_SAVING.rules)
"""The rules for an entry of an MSR-store area, in the manual's order."""

RULES = (*LOAD_RULES, *STORE_RULES)


@dataclass(frozen=True, slots=True)
class MsrListFailure:
    """The first entry that cannot be loaded or saved.

    `number` counts from 1, as the qualification does.
    """

    number: int
    violations: list[Violation[int, VmxCapabilities]]


def read_list(
    read_u64: Callable[[int], int], address: int, count: int
) -> Iterable[tuple[int, int, int]]:
    """The entries (index, reserved, data) of the area at `address`, read as they are needed."""
    for number in range(count):
        first = read_u64(address + ENTRY_SIZE * number)
        yield first & 0xFFFF_FFFF, first >> 32, read_u64(address + ENTRY_SIZE * number + 8)


def check_msr_load(
    entries: Iterable[tuple[int, int, int]],
    capabilities: VmxCapabilities,
    *,
    writable: Callable[[int, int], bool] | None = None,
    inputs: Mapping[int, int] | None = None,
    load: Callable[[int, int], None] | None = None,
) -> MsrListFailure | None:
    """The first entry that breaks a rule, or None.

    `writable(index, value)` says whether WRMSR would succeed; without it that rule is not
    checked.  `load` is called for each good entry in turn, because MSRs that precede a bad entry
    are loaded.  `inputs` hold EntryInput.IN_SMM; the default is outside SMM.
    """
    facts = {EntryInput.IN_SMM: 0} | dict(inputs or {})
    for number, (index, reserved, data) in enumerate(entries, 1):
        state = {**facts, INDEX: index, ListedMsr.RESERVED: reserved, ListedMsr.DATA: data}
        if writable is not None:
            state[ListedMsr.WRITABLE] = int(writable(index, data))
        broken = judge(LOAD_RULES, state, capabilities).broken
        if broken:
            return MsrListFailure(number, broken)
        if load is not None:
            load(index, data)
    return None


def check_msr_store(
    entries: Iterable[tuple[int, int]],
    capabilities: VmxCapabilities,
    *,
    readable: Callable[[int], bool] | None = None,
    inputs: Mapping[int, int] | None = None,
    save: Callable[[int, int], None] | None = None,
) -> MsrListFailure | None:
    """The first entry (index, reserved) of an MSR-store area that breaks a rule, or None.

    `readable(index)` says whether RDMSR would succeed; without it that rule is not checked.
    `save(number, index)` is called for each good entry in turn; the number counts from 1.
    """
    facts = {EntryInput.IN_SMM: 0} | dict(inputs or {})
    for number, (index, reserved) in enumerate(entries, 1):
        state = {**facts, INDEX: index, ListedMsr.RESERVED: reserved}
        if readable is not None:
            state[ListedMsr.READABLE] = int(readable(index))
        broken = judge(STORE_RULES, state, capabilities).broken
        if broken:
            return MsrListFailure(number, broken)
        if save is not None:
            save(number, index)
    return None
