"""The valid states of `arch.vmx.boundary`, as a running processor really enters them.

Addresses are of real pages, control words are what the processor's capabilities make of them, and
host and guest state are the probe's own where the generator's would not run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from undervisor.arch.vmx.boundary import MODES, valid_state
from undervisor.arch.vmx.capabilities import ControlCapability
from undervisor.arch.vmx.checks import EntryInput, check_vm_entry
from undervisor.arch.vmx.controls import (
    CONTROL_WORDS,
    EntryControls,
    ExitControls,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.ept import Eptp
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4
from undervisor.conformance.entries.trial import Patch
from undervisor.conformance.entries.vmx.processor import VmxProcessor
from undervisor.guest.probe.program import CODE32, FREE, Block
from undervisor.guest.probe.vmx_setup import host_fields

# Pages of their own for everything that a VMCS can name, above what CPL 3 may use.
BASE: Final = FREE + (2 << 20)
REGION, VMCS, LINK, SCRATCH = (BASE + 0x1000 * n for n in (0, 1, 2, 4))
CODE, STACK, APIC_PAGE, MSR_LIST = (BASE + 0x1000 * n for n in (16, 18, 19, 20))
OUTSIDE = BASE + 0x1000 * 21
EPT, PAE = BASE + 0x1000 * 24, BASE + 0x1000 * 28
ROWS, CHANGES = BASE + 0x1000 * 32, BASE + 0x1000 * 48
STRUCTURES: Final = BASE + 0x1000 * 64
END: Final = BASE + 0x1000 * 96
LOW_CODE: Final = 0x1_0000
"""Where the generator's real-mode and virtual-8086 segments begin."""
EXIT: Final = b"\x0f\x01\xc1"
"""VMCALL, which always exits, whatever the mode."""
EVERY_EXCEPTION: Final = 0xFFFF_FFFF
_TABLE: Final = struct.Struct("<512Q")
_HARMLESS: Final = (Msr.KERNEL_GS_BASE, Msr.SYSENTER_CS)
"""MSRs that a list may load and store: the probe uses neither."""
_REAL_STRUCTURES: Final = {F.VIRTUAL_APIC_ADDRESS: APIC_PAGE, F.ENTRY_MSR_LOAD_ADDRESS: MSR_LIST}
_COUNTS: Final = (F.EXIT_MSR_STORE_COUNT, F.EXIT_MSR_LOAD_COUNT, F.ENTRY_MSR_LOAD_COUNT)


def structure_fields() -> Iterator[tuple[F, int]]:
    """Every field that holds the address of a structure, and a page for it."""
    names = [
        f for f in F if f.name.endswith("ADDRESS") and (f.name[:6] not in ("GUEST_", "HOST_S"))
    ]
    names += [F.SUB_PAGE_PERMISSION_TABLE_POINTER, F.HLAT_POINTER]
    for number, name in enumerate(n for n in names if n.name[:5] != "HOST_"):
        yield name, _REAL_STRUCTURES.get(name, STRUCTURES + 0x1000 * number)


def memory() -> Iterator[tuple[int, bytes]]:
    """What must be in memory before any entry: code, tables, MSR lists; the rest from `BASE` on
    to `END` is zero.
    """
    entries = b"".join(struct.pack("<2IQ", msr, 0, 0) for msr in _HARMLESS)
    yield CODE, EXIT
    yield LOW_CODE, EXIT
    for name, page in structure_fields():
        if "MSR_LOAD" in name.name or "MSR_STORE" in name.name:
            yield page, entries
    yield EPT, struct.pack("<Q", EPT + 0x1000 | 7)
    yield EPT + 0x1000, struct.pack("<Q", EPT + 0x2000 | 7)
    # Leaves of 2 MiB: write-back, read, write and execute; SDM 3C "EPT Paging-Structure Entries".
    yield EPT + 0x2000, _TABLE.pack(*(n << 21 | 0xB7 | 1 << 10 for n in range(512)))
    yield PAE, struct.pack("<4Q", *pdptes())
    yield PAE + 0x1000, _TABLE.pack(*(n << 21 | 0x87 for n in range(512)))


def pdptes() -> tuple[int, int, int, int]:
    """The page-directory-pointer-table entries of a 32-bit guest: the first GiB."""
    return PAE + 0x1000 | 1, 0, 0, 0


class VmxStates:
    """The valid states that one processor enters."""

    def __init__(self, processor: VmxProcessor, block: Block) -> None:
        self.processor = processor
        self.capabilities = processor.capabilities
        self._block = block
        self._states = {mode: self._live(mode) for mode in MODES}
        self._broken: dict[str, list[str]] = {}

    def valid(self, mode: str) -> dict[int, int]:
        """The state `mode` with all fields and inputs."""
        return dict(self._states[mode])

    def broken(self, mode: str) -> list[str]:
        """The rules that `mode` breaks on this processor, which then cannot be in it."""
        if mode not in self._broken:
            verdict = check_vm_entry(self._states[mode], self.capabilities)
            self._broken[mode] = [violation.rule.id for violation in verdict.broken]
        return self._broken[mode]

    def eptp(self) -> int:
        """An EPT pointer that this processor takes."""
        return int(
            Eptp.of(
                memory_type=6 if self.capabilities.ept_vpid.memory_type_wb else 0,
                walk_length=3,
                accessed_dirty=self.capabilities.ept_vpid.accessed_dirty,
            )
            | EPT
        )

    def _live(self, mode: str) -> dict[int, int]:
        state = valid_state(mode)
        for name in CONTROL_WORDS:
            state[name] = self._adjust(name, state[name])
        _drop_what_is_inactive(state)
        host = host_fields(self.processor.l1, self._block)
        state.update({int(name): value for name, value in host.items()})
        state.update({int(name): page for name, page in structure_fields()})
        state.update(self._registers(mode, state))
        state.update(self._inputs(mode))
        if any(state[count] for count in _COUNTS):
            state.update(dict.fromkeys(_COUNTS, len(_HARMLESS)))
        return state

    def _adjust(self, name: F, value: int) -> int:
        if name not in self.processor.fields:
            return 0
        capability: ControlCapability = self.capabilities.controls[name]
        return capability.adjust(value)

    def _registers(self, mode: str, state: Mapping[int, int]) -> dict[int, int]:
        """Control registers, EFER, RIP and RSP; tables of pages for what is not in 64-bit mode."""
        l1, misc = self.processor.l1, self.capabilities.misc
        low = mode in ("real", "vm86")
        found: dict[int, int] = {
            F.GUEST_RIP: 0 if low else CODE,
            F.GUEST_RSP: 0x800 if low else STACK,
            F.GUEST_CR0: l1.cr0,
            F.GUEST_CR3: l1.cr3
            if state[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest
            else PAE,
            F.GUEST_CR4: l1.cr4,
            F.HOST_EFER: l1.efer,
            F.HOST_RSP: STACK,
            F.HOST_RIP: CODE,
            F.EXCEPTION_BITMAP: EVERY_EXCEPTION,
            F.EPT_POINTER: self.eptp(),
            F.CR3_TARGET_COUNT: min(state[F.CR3_TARGET_COUNT], misc.cr3_targets),
        }
        if state[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest:
            found[F.GUEST_EFER] = l1.efer
        if mode == "host-32":
            found |= {F.HOST_CR3: PAE, F.HOST_CR4: l1.cr4 & ~Cr4.pcide, F.HOST_EFER: 0}
            found[F.HOST_CS_SELECTOR] = CODE32
        if mode == "real":
            found[F.GUEST_CR0] = l1.cr0 & ~(Cr0.pe | Cr0.pg)
            found[F.GUEST_CR4] = l1.cr4 & ~Cr4.pae
        if mode == "protected-ept":
            found |= {F[f"GUEST_PDPTE{n}"]: entry for n, entry in enumerate(pdptes())}
        return found

    def _inputs(self, mode: str) -> dict[int, int]:
        found: dict[int, int] = {
            EntryInput.LONG_MODE_ACTIVE: int(mode != "host-32"),
            EntryInput.CURRENT_VMCS: VMCS,
            EntryInput.LINKED_VMCS: self.capabilities.basic.revision,
            EntryInput.VIRTUAL_TPR: 0,
        }
        return found | {EntryInput.MEMORY_PDPTE0 + n: e for n, e in enumerate(pdptes())}


def _drop_what_is_inactive(state: dict[int, int]) -> None:
    """Clear a word that nothing activates: the processor may not look at it."""
    primary = state[F.PRIMARY_CONTROLS]
    if not primary & PrimaryControls.activate_secondary_controls:
        state[F.SECONDARY_CONTROLS] = 0
    if not primary & PrimaryControls.activate_tertiary_controls:
        state[F.TERTIARY_CONTROLS] = 0
    if not state[F.SECONDARY_CONTROLS] & SecondaryControls.enable_vm_functions:
        state[F.VM_FUNCTION_CONTROLS] = 0
    if not state[F.EXIT_CONTROLS] & ExitControls.activate_secondary_controls:
        state[F.SECONDARY_EXIT_CONTROLS] = 0


def patches(old: Mapping[int, int], new: Mapping[int, int]) -> tuple[Patch, ...]:
    """The writes to memory that turn `old`'s inputs into `new`'s."""
    found = []
    for name, (gpa, size) in _IN_MEMORY.items():
        before, after = (state[name].to_bytes(size, "little") for state in (old, new))
        if before != after:
            found.append(Patch(gpa, after, before))
    return tuple(found)


_IN_MEMORY: Final = {
    EntryInput.LINKED_VMCS: (LINK, 4),
    EntryInput.VIRTUAL_TPR: (APIC_PAGE + 0x80, 1),
    **{EntryInput[f"MEMORY_PDPTE{n}"]: (PAE + 8 * n, 8) for n in range(4)},
}
"""Where the inputs are that memory holds, and their bytes."""
