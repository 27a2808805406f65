"""One page of L2 whose EPT entries a test sets, and how an EPT exit is looked at."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import Lacking
from undervisor.conformance.vmx.lab import EPT_LARGE, VmxLab
from undervisor.conformance.vmx.run import Run

READ, WRITE, FETCH = 1, 2, 4
LINEAR, TRANSLATED = 1 << 7, 1 << 8
DEFINED: Final = 0x3F | LINEAR | TRANSLATED
"""The bits of the qualification that every processor defines alike."""
WRITE_BACK: Final = 6 << 3
SIZES: Final[dict[str, object]] = {"4 KiB": 12, "2 MiB": 21, "1 GiB": 30}
"""The page sizes as cases: by their shifts."""
NEEDED: Final = {12: "walk_length_4", 21: "page_2m", 30: "page_1g"}
BEYOND: Final = 0x4000_0000
"""The second GiB of guest-physical addresses: nothing else of L2 is there."""
ACCESS: Final = {READ: "mov (%rbx), %rax", WRITE: "mov %rax, (%rbx)", FETCH: "call *%rbx"}
VIOLATION, MISCONFIGURATION = ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION


def needs_pages(lab: VmxLab, shift: int) -> None:
    """Lacking where EPT has no pages of a size."""
    if not getattr(lab.ept_capability(), NEEDED[shift]):
        raise Lacking(f"EPT has no pages of {1 << shift:#x} bytes")


class Target:
    """One page of L2's second GiB, whose EPT entries a test sets; it is `data` of the window."""

    def __init__(self, lab: VmxLab, shift: int) -> None:
        needs_pages(lab, shift)
        self.lab, self.shift, self.gpa = lab, shift, BEYOND + lab.places.data + 0x128
        self.changes = lab.ept(21 if lab.ept_capability().page_2m else 12)
        root = lab.places.nested
        self.tables = {3: root + 0x1008, 2: root + 0x4000, 1: root + 0x5000}
        lab.fill(root + 0x4000, 0x2000)
        lab.write(lab.places.data + 0x128, lab.assemble("ret"))
        level = {30: 3, 21: 2, 12: 1}[shift]
        self.leaf = self.entry(level)
        for above in range(level + 1, 4):
            lab.write_u64(self.entry(above), self.tables[above - 1] | 7)

    def entry(self, level: int) -> int:
        """Where the entry of a level for the page is."""
        if level == 3:
            return self.tables[3]
        return self.tables[level] + 8 * (self.gpa >> (12 + 9 * (level - 1)) & 511)

    def map(self, rights: int, bits: int = WRITE_BACK) -> None:
        """Set the leaf, and forget what was cached."""
        page = self.lab.places.data & -(1 << self.shift)
        large = EPT_LARGE if self.shift > 12 else 0
        self.lab.write_u64(self.leaf, page | large | bits | rights)
        self.lab.l1.invept(1, self.changes[F.EPT_POINTER])

    def touch(self, access: int) -> Run:
        """L2 reads, writes or calls the page."""
        return self.lab.run(ACCESS[access], self.changes, {"rbx": self.gpa, "rax": 0xC3})


def outcome(run: Run) -> tuple[int, int, int]:
    """The reason, the defined qualification and the guest-physical address of an EPT exit."""
    if run.reason == VIOLATION:
        return run.reason, run.qualification & DEFINED, run[F.GUEST_PHYSICAL_ADDRESS]
    if run.reason == MISCONFIGURATION:
        return run.reason, 0, run[F.GUEST_PHYSICAL_ADDRESS]
    return run.reason, 0, 0
