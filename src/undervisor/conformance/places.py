"""Where a test's structures are: a window of 2 MiB for each processor, above what the probe uses.

Each name is an attribute (`places.data`) and, in capitals, a symbol of every piece of code that a
lab assembles (`DATA`).
"""

from __future__ import annotations

from typing import Final

FIRST_WINDOW: Final = 0x600000
WINDOW: Final = 2 << 20
MEMORY: Final = 64 << 20
"""RAM of a machine under test."""
STUB_SIZE: Final = 16
"""Bytes of L2's handler of one vector."""

# L2's GDT
CS64, DS, CS32, CS16, DS16, CS3, DS3, TR = 0x08, 0x10, 0x18, 0x20, 0x28, 0x33, 0x3B, 0x40
SELECTORS: Final = {
    "CS64": CS64, "DS": DS, "CS32": CS32, "CS16": CS16, "DS16": DS16, "CS3": CS3, "DS3": DS3,
    "TR": TR,
}  # fmt: skip


class Places:
    """The addresses in the window of processor `number`; physical, and identity-mapped."""

    def __init__(self, number: int = 0) -> None:
        self.base = base = FIRST_WINDOW + WINDOW * number
        self.region = base  # VMXON region, host save area
        self.control = base + 0x1000  # the VMCS or VMCB
        self.control2 = base + 0x2000
        self.shadow = base + 0x3000
        self.io = base + 0x4000  # I/O bitmaps A and B, or the IOPM of 12 KiB
        self.msr = base + 0x8000  # the MSR bitmap, or the MSRPM of 8 KiB
        self.apic_page = base + 0xA000
        self.read_bitmap = base + 0xB000
        self.write_bitmap = base + 0xC000
        self.eptp_list = base + 0xD000
        self.pml = base + 0xE000
        self.msr_list = base + 0x10000
        self.msr_list2 = base + 0x14000
        self.scratch = base + 0x18000  # 32 KiB that the lab itself uses
        self.code = base + 0x20000
        self.stack = base + 0x32000
        self.gdt = base + 0x33000
        self.idt = base + 0x34000
        self.tss = base + 0x35000
        self.stubs = base + 0x36000
        self.data = base + 0x40000  # 64 KiB for the test
        self.user_stack = base + 0x52000
        self.pml4 = base + 0x60000  # L2's page tables: PML4, PDPT, PD, PT
        self.pdpt = base + 0x61000
        self.pd = base + 0x62000
        self.pt = base + 0x63000
        self.nested = base + 0x80000  # L1's nested page tables: root, PDPT, PD, 16 PTs
        self.nested2 = base + 0xC0000  # another set
        self.free = base + 0x100000  # 1 MiB that nothing uses

    @property
    def symbols(self) -> dict[str, int]:
        """Every place and every selector by its name in capitals."""
        return {name.upper(): value for name, value in vars(self).items()} | SELECTORS
