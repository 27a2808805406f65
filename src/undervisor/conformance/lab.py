"""What every guest test has: L1's instructions, at once or in batches, memory, and L2's world.

A lab belongs to one processor.  Writes to memory wait until the next thing that is run, so that a
whole test is few round trips.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from undervisor.conformance.expect import Broken
from undervisor.conformance.places import CS64, STUB_SIZE, Places
from undervisor.guest.asm import assemble
from undervisor.guest.probe.answers import ALL, Answer, Returned
from undervisor.guest.probe.batch import Op
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.l1 import Runner
from undervisor.guest.probe.program import Block

T = TypeVar("T")
PIECE = 0x4000
WINDOW_FROM = 4 << 20
"""Nested tables of 4-KiB pages split this much of the address space finely: 0 to 32 MiB."""
FINE_TABLES = 16


class Lab:
    """L1 on one processor: `l1` executes at once, `batch()` collects, `write` waits for either."""

    exit_instruction: ClassVar[str]
    """What ends an L2 that has nothing more to say."""

    def __init__(self, probe: Probe, processor: int = 0) -> None:
        self.probe = probe
        self.processor = processor
        self.places = Places(processor)
        self.block = Block(processor)
        self.l1 = _AtOnce(self)
        self._runner: Runner = probe.on(processor) if processor else probe
        self._waiting = Batch()

    # -- L1 ------------------------------------------------------------------------------------

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Operations that go over together; their answers are there behind the `with`."""
        batch = Batch()
        yield batch
        self.execute(batch)

    def execute(self, batch: Batch) -> None:
        """Run `batch` on this processor, after the writes that wait."""
        waiting, self._waiting = self._waiting, Batch()
        both = Batch()
        both.requests = waiting.requests + batch.requests
        self._runner.run(both)
        for request in waiting.requests:
            _ = request.answer.value

    def flush(self) -> None:
        """Make all writes that wait."""
        if self._waiting.requests:
            self.execute(Batch())

    def call(
        self,
        source: str,
        registers: Mapping[str, int] | None = None,
        out: Iterable[str] = ALL,
    ) -> Answer[Returned]:
        """Run assembly in L1, position-independent; faults are values of the answer."""
        return self.l1.call(self.assemble(source), registers, out)

    def assemble(self, source: str, origin: int = 0) -> bytes:
        """Machine code; places and selectors are symbols."""
        return assemble(source, origin, self.places.symbols).bytes

    # -- memory --------------------------------------------------------------------------------

    def write(self, gpa: int, data: bytes) -> None:
        """`data` to `gpa`, before the next thing that runs."""
        for at in range(0, len(data), PIECE):
            self._waiting.write(gpa + at, data[at : at + PIECE])

    def write_u64(self, gpa: int, *values: int) -> None:
        """64-bit values from `gpa` on."""
        self.write(gpa, struct.pack(f"<{len(values)}Q", *values))

    def write_u32(self, gpa: int, *values: int) -> None:
        """32-bit values from `gpa` on."""
        self.write(gpa, struct.pack(f"<{len(values)}I", *values))

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """`size` times `byte`."""
        self._waiting.fill(gpa, size, byte)

    def read(self, gpa: int, size: int) -> bytes:
        """The bytes at `gpa`, now."""
        return self.l1.read(gpa, size).value

    def read_u64(self, gpa: int) -> int:
        """The 64-bit value at `gpa`, now."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def read_u32(self, gpa: int) -> int:
        """The 32-bit value at `gpa`, now."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def set_bit(self, gpa: int, bit: int, on: bool = True) -> None:
        """One bit of a bitmap: read, changed and written back."""
        byte = self.read(gpa + bit // 8, 1)[0]
        mask = 1 << bit % 8
        self.write(gpa + bit // 8, bytes([byte | mask if on else byte & ~mask]))

    def table(self, gpa: int, count: int, first: int, step: int, apart: int = 8) -> None:
        """`count` 64-bit entries from `gpa`: `first`, `first + step`, ..., made by the machine.

        An entry begins `apart` bytes behind the one before.
        """
        code = self.assemble("1: mov %rax, (%rdi); add %rdx, %rax; add %rbx, %rdi; loop 1b")
        registers = {"rdi": gpa, "rcx": count, "rax": first, "rdx": step, "rbx": apart}
        self._waiting.call(code, registers, [])

    # -- interrupts of L1 ----------------------------------------------------------------------

    def count(self, vector: int) -> int:
        """How often `vector` has been delivered to this processor's L1 and counted."""
        return self.read_u32(self.block.counts + 4 * vector)

    # -- L2's surroundings ---------------------------------------------------------------------

    def code(self, source: str, at: int | None = None, end: str | None = None) -> None:
        """Put L2's code at `at` (`places.code`); `exit_instruction` ends it unless `end` does."""
        origin = self.places.code if at is None else at
        ending = self.exit_instruction if end is None else end
        self.write(origin, self.assemble(f"{source}\n{ending}\n", origin))

    def surround(self) -> None:
        """L2's GDT, TSS and IDT; the handler of each vector ends the run.

        A handler begins at `places.stubs + STUB_SIZE * vector` and, resumed, returns by IRETQ.
        """
        places = self.places
        descriptors = [
            0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF, 0x00009B000000FFFF,
            0x000093000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF,
            0x00008B0000000067 | (places.tss & 0xFFFFFF) << 16, places.tss >> 32,
        ]  # fmt: skip
        self.write_u64(places.gdt, *descriptors)
        # Made by the machine, because a serial line is slow: handlers differ in their address only.
        low, high = struct.unpack("<2Q", gate(places.stubs, dpl=3))
        self.table(places.idt, 256, low, STUB_SIZE, 16)
        self.table(places.idt + 8, 256, high, 0, 16)
        stub = self.assemble(f"{self.exit_instruction}; iretq").ljust(STUB_SIZE, b"\x90")
        for half, value in enumerate(struct.unpack("<2Q", stub)):
            self.table(places.stubs + 8 * half, 256, value, 0, 16)
        self.fill(places.tss, 0x1000)
        self.write_u64(places.tss + 4, places.stack)
        self.fill(places.io, 0x6000)

    def stub(self, vector: int) -> int:
        """Where L2's handler of `vector` begins."""
        return self.places.stubs + STUB_SIZE * vector

    def vector_of(self, rip: int) -> int | None:
        """The vector whose handler begins at `rip`; None where none does."""
        number, rest = divmod(rip - self.places.stubs, STUB_SIZE)
        return number if not rest and 0 <= number < 256 else None

    def pages(self) -> int:
        """Page tables for L2, identity, for all privileges; their root, for CR3.

        2-MiB pages for the first GiB, except that the window has 4-KiB pages (`pte`).
        """
        places, slot = self.places, self.places.base >> 21
        self.fill(places.pml4, 0x3000)
        self.write_u64(places.pml4, places.pdpt | 7)
        self.write_u64(places.pdpt, places.pd | 7)
        self.table(places.pd, 512, 0x87, 1 << 21)
        self.write_u64(places.pd + 8 * slot, places.pt | 7)
        self.table(places.pt, 512, places.base | 7, 1 << 12)
        return places.pml4

    def pte(self, gva: int) -> int:
        """Where L2's 4-KiB entry for an address of the window is."""
        return self.places.pt + 8 * (gva >> 12 & 511)

    def nested_tables(self, shift: int, root: int, table: int, leaf: int, large: int) -> None:
        """Identity tables of pages of one size from `root`: 4 GiB, the first 32 MiB finely.

        `table` are the bits of an entry that names a table, `leaf` of one that maps a page,
        `large` what a page of more than 4 KiB has besides.
        """
        pdpt, pd, first_pt = root + 0x1000, root + 0x2000, root + 0x10000
        self.fill(root, 0x3000)
        self.write_u64(root, pdpt | table)
        self.table(pdpt, 4, leaf | large, 1 << 30)
        if shift < 30:
            self.write_u64(pdpt, pd | table)
            self.table(pd, 512, leaf | large, 1 << 21)
        if shift == 12:
            self.table(pd, FINE_TABLES, first_pt | table, 0x1000)
            self.table(first_pt, FINE_TABLES * 512, leaf, 1 << 12)

    def nested_entry(self, gpa: int, level: int = 1, root: int = 0) -> int:
        """Where the entry of a level (1: 4 KiB, 2: 2 MiB, 3: 1 GiB, 4) for `gpa` is."""
        root = root or self.places.nested
        return {
            1: root + 0x10000 + (gpa >> 12) * 8,
            2: root + 0x2000 + (gpa >> 21 & 511) * 8,
            3: root + 0x1000 + (gpa >> 30 & 511) * 8,
            4: root + (gpa >> 39) * 8,
        }[level]

    # -- other processors ----------------------------------------------------------------------

    def start_others(self, total: int) -> None:
        """Start processors until `total` run; their APIC ids are 1 to `total - 1`."""
        self.flush()
        running = self.probe.start_aps(range(1, total))
        if running != total:
            raise Broken(f"INIT-SIPI-SIPI to {total - 1} processors: {running} of {total} run")


def together(labs: Mapping[Lab, Batch], timeout: float | None = None) -> None:
    """Run a batch on each lab's processor, all at the same time."""
    for lab in labs:
        lab.flush()
    probe = next(iter(labs)).probe
    probe.together({lab.processor: batch for lab, batch in labs.items()}, timeout)


class _AtOnce(Batch):
    """A batch of one: each operation runs when it is asked for, and its answer is there."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._lab = lab

    def add(
        self,
        what: str,
        op: Op,
        arguments: bytes,
        decode: Callable[[bytes], Any],
        most: int = 0,
        out: int = 0,
    ) -> Answer[Any]:
        """The operation, run now."""
        batch = Batch()
        answer = batch.add(what, op, arguments, decode, most, out)
        self._lab.execute(batch)
        return answer


def gate(address: int, selector: int = CS64, dpl: int = 0, ist: int = 0) -> bytes:
    """An interrupt gate of 64-bit mode. SDM 3A, "64-Bit Mode IDT"."""
    low = address & 0xFFFF | selector << 16 | ist << 32 | (0x8E00 | dpl << 13) << 32
    low |= (address >> 16 & 0xFFFF) << 48
    return struct.pack("<2Q", low, address >> 32)
