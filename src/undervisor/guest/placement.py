"""Where the bytes of an image go: what every boot protocol's loader works with."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from undervisor.arch.x86.boot import FOUR_GIB, LOW_RAM_END, PAGE, BootState, MemoryMap
from undervisor.errors import BadInput

# SDM 3A, "Segment Descriptors": base 0, limit FFFFFFFFH, present, accessed.
FLAT_CODE = 0x00CF9B000000FFFF
FLAT_DATA = 0x00CF93000000FFFF


@dataclass(frozen=True, slots=True)
class Segment:
    """`data` at the guest-physical address `gpa`, zeros after it up to `size` bytes."""

    gpa: int
    data: bytes
    size: int

    @property
    def end(self) -> int:
        """The address after the last byte, zeros included."""
        return self.gpa + self.size


@dataclass(frozen=True, slots=True)
class Kernel:
    """The image itself, understood: its segments and the address of its first instruction.

    `header` is what else of the file the protocol's loader needs.
    """

    name: str
    segments: tuple[Segment, ...]
    entry: int
    header: bytes = b""

    @property
    def end(self) -> int:
        """The address after the highest segment."""
        return max(segment.end for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Module:
    """A file that the loader puts beside the kernel, with its own command line.

    `name` is the file's name as the user gave it; the guest sees `name` or `name cmdline`.
    """

    name: str
    data: bytes
    cmdline: str = ""

    @property
    def words(self) -> str:
        """The command line that the guest sees."""
        return f"{self.name} {self.cmdline}" if self.cmdline else self.name


@dataclass(frozen=True, slots=True)
class Machine:
    """What a loader must know of the machine and of the user's wishes.

    `rsdp` is the address of the ACPI root pointer, 0 where there is none.
    """

    memory: MemoryMap
    append: str = ""
    modules: Sequence[Module] = ()
    rsdp: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """An image ready to start: write `pieces`, zero `clear`, load `boot` into the processor.

    `pieces` are (gpa, bytes), `clear` are (gpa, size); none of them overlaps another and all are
    in RAM below 4 GiB.
    """

    pieces: tuple[tuple[int, bytes], ...]
    clear: tuple[tuple[int, int], ...]
    boot: BootState


@dataclass(slots=True)
class Builder:
    """Collects the parts of a placement and refuses what is not in RAM or overlaps."""

    name: str
    memory: MemoryMap
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    clear: list[tuple[int, int]] = field(default_factory=list)
    taken: list[tuple[int, int, str]] = field(default_factory=list)

    def load(self, kernel: Kernel) -> None:
        """The kernel's own segments."""
        for number, segment in enumerate(kernel.segments):
            self.take(f"segment {number}", segment.gpa, segment.end)
            if segment.data:
                self.pieces.append((segment.gpa, segment.data))
            if segment.size > len(segment.data):
                rest = segment.gpa + len(segment.data)
                self.clear.append((rest, segment.end - rest))

    def put(self, what: str, gpa: int, data: bytes) -> int:
        """`data` at `gpa`; the address after it."""
        if data:
            self.take(what, gpa, gpa + len(data))
            self.pieces.append((gpa, data))
        return gpa + len(data)

    def take(self, what: str, start: int, end: int) -> None:
        """Note that `what` is at `start` to `end`; BadInput where that is not RAM."""
        if end > FOUR_GIB or not self.memory.is_ram(start, end):
            ram = ", ".join(f"{part.start:#x}-{part.end:#x}" for part in self.memory.ram)
            raise BadInput(
                f"{self.name}: {what} at {start:#x}-{end:#x} is not in RAM below 4 GiB",
                hint=f"RAM is {ram}; --memory gives more, devices and the BIOS keep their places",
            )
        self.taken.append((start, end, what))

    def low_room(self, preferred: int, size: int) -> int:
        """`preferred`, or where the image is there itself, the highest free page below 640 KiB."""
        if not self._occupied(preferred, preferred + size):
            return preferred
        return self.high_room("boot information", size, LOW_RAM_END)

    def put_high(self, what: str, data: bytes, limit: int = FOUR_GIB) -> int:
        """`data` as high as it fits in RAM below `limit`, page-aligned; its address."""
        gpa = self.high_room(what, len(data), limit)
        self.put(what, gpa, data)
        return gpa

    def high_room(self, what: str, size: int, limit: int) -> int:
        """The highest page in RAM below `limit` from which `size` bytes are free."""
        for part in reversed(self.memory.ram):
            # The highest place ends where the range does or where something else begins.
            tops = [part.end, limit, *(start for start, _, _ in self.taken)]
            for top in sorted((t for t in tops if t <= min(part.end, limit)), reverse=True):
                gpa = (top - size) & -PAGE
                # The first page is the interrupt vectors' and the BIOS's.
                if gpa >= max(part.start, PAGE) and not self._occupied(gpa, gpa + size):
                    return gpa
        raise BadInput(
            f"{self.name}: no room in RAM for {what} of {size:#x} bytes",
            hint="--memory gives more",
        )

    def _occupied(self, start: int, end: int) -> bool:
        return any(start < e and s < end for s, e, _ in self.taken)

    def done(self, boot: BootState) -> Placement:
        """The placement; BadInput where two parts overlap."""
        self.taken.sort()
        for (start, end, what), (next_start, _, next_what) in zip(
            self.taken, self.taken[1:], strict=False
        ):
            if next_start < end:
                raise BadInput(
                    f"{self.name}: {what} at {start:#x}-{end:#x} overlaps {next_what} at "
                    f"{next_start:#x}",
                    hint="the image's headers contradict themselves",
                )
        return Placement(tuple(self.pieces), tuple(self.clear), boot)


def flat_gdt(code: int = 0x08) -> bytes:
    """A descriptor table with flat 32-bit code at the selector `code` and data after it."""
    return struct.pack(f"<{code // 8}Q2Q", *[0] * (code // 8), FLAT_CODE, FLAT_DATA)


def text(words: str) -> bytes:
    """A command line as the guest sees it: bytes to the first NUL, and a NUL."""
    return words.encode(errors="surrogateescape").split(b"\0")[0] + b"\0"


def aligned(address: int, to: int = PAGE) -> int:
    """`address` rounded up."""
    return -(-address // to) * to


def total(parts: Iterable[bytes]) -> int:
    """The bytes of all `parts`."""
    return sum(len(part) for part in parts)
