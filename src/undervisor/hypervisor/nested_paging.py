"""Nested page tables that the silicon walks: L1's identity map, and the shadows for L2.

A shadow holds the composition of L1's own nested tables (EPT or NPT) with ours, filled at faults.
Since L1's guest-physical addresses are host-physical ones, composing means taking L1's
translation and narrowing it to what is RAM.
"""

from __future__ import annotations

from typing import Final

from undervisor.silicon.memory import PAGE, Memory

PRESENT: Final = 1
WRITABLE: Final = 2
USER: Final = 4
LARGE: Final = 0x80
NO_EXECUTE: Final = 1 << 63
ALL: Final = PRESENT | WRITABLE | USER
ADDRESS: Final = 0x000F_FFFF_FFFF_F000

_2M: Final = 1 << 21
_1G: Final = 1 << 30
_SHIFTS: Final = (39, 30, 21, 12)


class NestedTables:
    """One tree of four levels in private frames, in the form that AMD's nested paging wants."""

    def __init__(self, memory: Memory) -> None:
        self._frames = memory.frames
        self.root = self._frames.allocate()
        self._tables = [self.root]

    def clear(self) -> None:
        """Forget every translation and give back all frames but the root."""
        for table in self._tables[1:]:
            self._frames.release(table)
        del self._tables[1:]
        self._frames.view(self.root)[:] = bytes(PAGE)

    def release(self) -> None:
        """Give back every frame; the tree is dead after this."""
        for table in self._tables:
            self._frames.release(table)
        self._tables.clear()

    def map(self, gpa: int, hpa: int, shift: int, rights: int) -> None:
        """Translate the page of `1 << shift` bytes at `gpa` to `hpa` with `rights`.

        `rights` is made of `PRESENT`, `WRITABLE`, `USER` and `NO_EXECUTE`.
        """
        frames, table = self._frames, self.root
        for level in _SHIFTS:
            where = table | (gpa >> (level - 3) & 0xFF8)
            if level == shift:
                leaf = hpa & ~((1 << shift) - 1) | rights | (LARGE if shift > 12 else 0)
                frames.set_u64(where, leaf)
                return
            entry = frames.u64(where)
            if not entry & PRESENT:
                entry = self._new_table() | ALL
                frames.set_u64(where, entry)
            elif entry & LARGE:
                entry = self._split(entry, level) | ALL
                frames.set_u64(where, entry)
            table = entry & ADDRESS
        raise ValueError(f"no page has {1 << shift} bytes")

    def unmap(self, gpa: int) -> None:
        """Let accesses to the 4-KiB page at `gpa` exit."""
        self.map(gpa, 0, 12, 0)

    def _new_table(self) -> int:
        table = self._frames.allocate()
        self._tables.append(table)
        return table

    def _split(self, leaf: int, level: int) -> int:
        """A table of smaller pages in place of a large leaf."""
        table, step = self._new_table(), 1 << (level - 9)
        below_large = LARGE if level > 21 else 0
        base = leaf & ADDRESS & ~((1 << level) - 1)
        rights = leaf & (ALL | NO_EXECUTE)
        for index in range(512):
            self._frames.set_u64(table + 8 * index, base + index * step | rights | below_large)
        return table


def identity(memory: Memory, read_only: tuple[tuple[int, int], ...] = ()) -> NestedTables:
    """L1's tables: all RAM at its own address, in the largest pages that fit.

    `read_only` ranges `(start, end)` are ROM; the video memory's window is left to devices.
    """
    tables = NestedTables(memory)
    for start, end in memory.ram_ranges():
        at = start
        while at < end:
            shift = next(s for s in (30, 21, 12) if not at % (1 << s) and at + (1 << s) <= end)
            tables.map(at, at, shift, ALL)
            at += 1 << shift
    for gpa in range(0xA0000, 0xC0000, PAGE):
        tables.unmap(gpa)
    for start, end in read_only:
        for gpa in range(start, end, PAGE):
            tables.map(gpa, gpa, 12, PRESENT | USER)
    return tables
