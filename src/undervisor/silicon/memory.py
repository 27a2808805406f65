"""Host-physical memory: the guest's RAM, one `mmap` shared with the processor, and our own frames.

Host-physical addresses equal L1's guest-physical ones: RAM from 0 to at most 3 GiB and the rest
from 4 GiB, as on a PC.  Frames of our own (VMCBs, nested page tables) lie above `PRIVATE_BASE`.
A guest may well name an address up there, so `Memory` never follows one: it is of RAM alone, and
our frames are reached through `Memory.frames`.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable

from undervisor.errors import BadInput

PAGE = 4096
LOW_END = 3 << 30
HIGH_START = 4 << 30
PRIVATE_BASE = 1 << 38
PRIVATE_SIZE = 64 << 20
MAX_RAM = 64 << 30
MIN_RAM = 1 << 20

_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_ABSENT = (1 << 64) - 1
_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a fork of a machine has memory of its own


class Frames:
    """Private pages by host-physical address; only for addresses that we made ourselves."""

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, PRIVATE_SIZE, flags=_OWN)
        self._fresh = iter(range(PRIVATE_BASE, PRIVATE_BASE + PRIVATE_SIZE, PAGE))
        self._free: list[int] = []

    def allocate(self) -> int:
        """A zeroed page, by its host-physical address."""
        if self._free:
            frame = self._free.pop()
            self.view(frame)[:] = bytes(PAGE)
            return frame
        try:
            return next(self._fresh)
        except StopIteration:
            raise MemoryError("the silicon's private memory is full") from None

    def release(self, frame: int) -> None:
        """Give a page back."""
        self._free.append(frame)

    def u64(self, hpa: int) -> int:
        """The 64-bit value at `hpa`."""
        value: int = _U64.unpack_from(self.buffer, hpa - PRIVATE_BASE)[0]
        return value

    def set_u64(self, hpa: int, value: int) -> None:
        """Write a 64-bit value, of a table or of a VMCB."""
        _U64.pack_into(self.buffer, hpa - PRIVATE_BASE, value)

    def view(self, frame: int) -> memoryview:
        """A writable view of one page."""
        offset = frame - PRIVATE_BASE
        return memoryview(self.buffer)[offset : offset + PAGE]


class Memory:
    """RAM by host-physical address, and `frames` of our own.

    Absent memory reads as all ones and swallows writes, as on a PC.  `write` tells the processor
    that code may have changed; `set_u64` and `set_u32` do not and are for tables, never for code.
    """

    def __init__(self, size: int) -> None:
        if not MIN_RAM <= size <= MAX_RAM or size % PAGE:
            raise BadInput(
                f"{size} bytes of memory: it must be whole pages between 1 MiB and 64 GiB",
                hint="for example --memory 256M",
            )
        self.size = size
        self.low = min(size, LOW_END)
        try:
            self.ram = mmap.mmap(-1, size, flags=_OWN)
        except (OSError, ValueError) as error:
            raise BadInput(f"no {size >> 20} MiB of memory for the guest: {error}") from None
        self.frames = Frames()
        self.code_changed: Callable[[int, int], None] = lambda start, end: None

    # -- regions ------------------------------------------------------------------------------

    def regions(self) -> list[tuple[int, int, int]]:
        """`(hpa, size, address in this process)` of every piece that the processor maps."""
        ram = _address_of(self.ram)
        pieces = [(0, self.low, ram)]
        if self.size > self.low:
            pieces.append((HIGH_START, self.size - self.low, ram + self.low))
        return [*pieces, (PRIVATE_BASE, PRIVATE_SIZE, _address_of(self.frames.buffer))]

    def ram_ranges(self) -> list[tuple[int, int]]:
        """`(start, end)` of the guest's RAM, in host- and so in L1's guest-physical addresses."""
        ranges = [(0, self.low)]
        if self.size > self.low:
            ranges.append((HIGH_START, HIGH_START + self.size - self.low))
        return ranges

    def is_ram(self, address: int, size: int = 1) -> bool:
        """Whether all of `address`, `size` is the guest's RAM."""
        return any(start <= address and address + size <= end for start, end in self.ram_ranges())

    def host_pointer(self, hpa: int) -> int:
        """The address in this process of a host-physical address; ValueError where absent."""
        for start, size, pointer in self.regions():
            if start <= hpa < start + size:
                return pointer + hpa - start
        raise ValueError(f"{hpa:#x} is no memory")

    # -- access -------------------------------------------------------------------------------

    def u64(self, hpa: int) -> int:
        """The 64-bit little-endian value at `hpa`; all ones where there is no memory."""
        if hpa <= self.low - 8:
            value: int = _U64.unpack_from(self.ram, hpa)[0]
            return value
        buffer, offset = self._find(hpa, 8)
        return _ABSENT if buffer is None else int(_U64.unpack_from(buffer, offset)[0])

    def u32(self, hpa: int) -> int:
        """The 32-bit little-endian value at `hpa`; all ones where there is no memory."""
        buffer, offset = self._find(hpa, 4)
        return 0xFFFF_FFFF if buffer is None else int(_U32.unpack_from(buffer, offset)[0])

    def set_u64(self, hpa: int, value: int) -> None:
        """Write a 64-bit table entry."""
        if hpa <= self.low - 8:
            _U64.pack_into(self.ram, hpa, value)
            return
        buffer, offset = self._find(hpa, 8)
        if buffer is not None:
            _U64.pack_into(buffer, offset, value)

    def set_u32(self, hpa: int, value: int) -> None:
        """Write a 32-bit table entry."""
        buffer, offset = self._find(hpa, 4)
        if buffer is not None:
            _U32.pack_into(buffer, offset, value)

    def read(self, hpa: int, size: int) -> bytes:
        """`size` bytes from `hpa`; absent bytes read as 0xff."""
        buffer, offset = self._find(hpa, size)
        if buffer is not None:
            return bytes(buffer[offset : offset + size])
        if size <= 1:
            return b"\xff" * size
        half = min(size // 2, -hpa % PAGE or PAGE) or 1
        return self.read(hpa, half) + self.read(hpa + half, size - half)

    def write(self, hpa: int, data: bytes) -> None:
        """Write `data` at `hpa` and let the processor see changed code; absent bytes are lost."""
        size = len(data)
        buffer, offset = self._find(hpa, size)
        if buffer is not None:
            buffer[offset : offset + size] = data
            self.code_changed(hpa, hpa + size)
        elif size > 1:
            half = min(size // 2, -hpa % PAGE or PAGE) or 1
            self.write(hpa, data[:half])
            self.write(hpa + half, data[half:])

    def clear(self, hpa: int, size: int) -> None:
        """Zero `size` bytes from `hpa`."""
        for start in range(hpa, hpa + size, 1 << 20):
            self.write(start, bytes(min(1 << 20, hpa + size - start)))

    def view(self, frame: int) -> memoryview:
        """A writable view of one page of RAM; ValueError where there is none."""
        buffer, offset = self._find(frame, PAGE)
        if buffer is None:
            raise ValueError(f"{frame:#x} is no page of RAM")
        return memoryview(buffer)[offset : offset + PAGE]

    def _find(self, hpa: int, size: int) -> tuple[mmap.mmap | None, int]:
        """The buffer and the offset in it of a range that lies wholly in one piece."""
        end = hpa + size
        if hpa >= 0 and end <= self.low:
            return self.ram, hpa
        if hpa >= HIGH_START and end <= HIGH_START + self.size - self.low:
            return self.ram, hpa - HIGH_START + self.low
        return None, 0


def _address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
