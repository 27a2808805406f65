"""What the rules of VM entry read that is in no VMCS field: the processor's mode, and memory.

These are pseudo-fields: their numbers lie above all encodings, so that one mapping holds both.
A state without them is checked all the same; the rules that need one that is missing count as
not checked.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from enum import IntEnum

from undervisor.arch.vmx.controls import EntryControls, PrimaryControls, SecondaryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4

ALL_ONES = (1 << 64) - 1
CR0_PG = Cr0.pg
CR4_PAE = Cr4.pae
IA32E_GUEST = EntryControls.ia32e_mode_guest
VTPR_OFFSET = 0x80
PAGE_OFFSET = 0xFFF


class EntryInput(IntEnum):
    """Facts at the time of VM entry.

    LONG_MODE_ACTIVE, IN_SMM, TRACING (IA32_RTIT_CTL.TraceEn): 0 or 1.
    CURRENT_VMCS: its physical address.  LINKED_VMCS: the first 32 bits of the region at the VMCS
    link pointer.  VIRTUAL_TPR: the byte at offset 80H of the virtual-APIC page.
    MEMORY_PDPTEn: the PDPTEs at guest CR3, for PAE paging without EPT.
    """

    LONG_MODE_ACTIVE = 0x1_0000
    IN_SMM = 0x1_0001
    TRACING = 0x1_0002
    CURRENT_VMCS = 0x1_0003
    LINKED_VMCS = 0x1_0004
    VIRTUAL_TPR = 0x1_0005
    MEMORY_PDPTE0 = 0x1_0006
    MEMORY_PDPTE1 = 0x1_0007
    MEMORY_PDPTE2 = 0x1_0008
    MEMORY_PDPTE3 = 0x1_0009


_LINK, _PRIMARY, _SECONDARY = F.VMCS_LINK_POINTER, F.PRIMARY_CONTROLS, F.SECONDARY_CONTROLS
_APIC, _ENTRY, _CR0, _CR3, _CR4 = (
    F.VIRTUAL_APIC_ADDRESS,
    F.ENTRY_CONTROLS,
    F.GUEST_CR0,
    F.GUEST_CR3,
    F.GUEST_CR4,
)
_TPR_SHADOW = PrimaryControls.use_tpr_shadow
_ACTIVATE = PrimaryControls.activate_secondary_controls
_EPT = SecondaryControls.enable_ept


def refresh_inputs(
    state: MutableMapping[int, int], read_u64: Callable[[int], int], facts: dict[int, int]
) -> set[int]:
    """Bring `state`'s pseudo-fields up to date; which ones changed.

    `facts` are the ones that memory does not give (mode and current VMCS).  `read_u64` reads
    physical memory, and only where an entry that gets so far would: what no rule will look at
    is not read.
    """
    found = dict(facts)
    link = state[_LINK]
    if link != ALL_ONES and not link & PAGE_OFFSET:
        found[EntryInput.LINKED_VMCS] = read_u64(link) & 0xFFFF_FFFF
    controls = state[_PRIMARY]
    if controls & _TPR_SHADOW and not state[_APIC] & PAGE_OFFSET:
        found[EntryInput.VIRTUAL_TPR] = read_u64(state[_APIC] + VTPR_OFFSET) & 0xFF
    if state[_CR4] & CR4_PAE and state[_CR0] & CR0_PG and not state[_ENTRY] & IA32E_GUEST:
        ept = controls & _ACTIVATE and state[_SECONDARY] & _EPT
        if not ept:
            table = state[_CR3] & 0xFFFF_FFE0
            for n in range(4):
                found[EntryInput.MEMORY_PDPTE0 + n] = read_u64(table + 8 * n)
    changed = {name for name, value in found.items() if state.get(name) != value}
    state.update(found)
    return changed
