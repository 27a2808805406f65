"""QEMU's firmware configuration device ("QEMU Firmware Configuration (fw_cfg) Device").

It hands named byte strings to the guest: byte by byte at 0x511, or by DMA at 0x514.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Final

from undervisor.arch.x86.boot import MemoryMap
from undervisor.devices.bus import GuestMemory, all_ones

SIGNATURE: Final = b"QEMU"
DMA_SIGNATURE: Final = int.from_bytes(b"QEMU CFG", "big")
TRADITIONAL_AND_DMA: Final = 3
CHUNK: Final = 64 << 10
NAME_SIZE: Final = 56
DMA_REQUEST: Final = struct.Struct(">IIQ")
E820_ENTRY: Final = struct.Struct("<QQI")


class Item(IntEnum):
    """Selectors of the items that this machine has."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NO_GRAPHICS = 0x04
    CPU_COUNT = 0x05
    MAX_CPU_COUNT = 0x0F
    COMMAND_LINE_SIZE = 0x14
    COMMAND_LINE = 0x15
    DIRECTORY = 0x19
    FIRST_FILE = 0x20


class DmaControl(IntFlag):
    """The control word of a DMA request; its upper half is a selector."""

    ERROR = 1
    READ = 2
    SKIP = 4
    SELECT = 8
    WRITE = 16


def standard_items(ram_size: int, cpu_count: int) -> dict[int, bytes]:
    """The numbered items of a machine."""
    return {
        Item.SIGNATURE: SIGNATURE,
        Item.ID: TRADITIONAL_AND_DMA.to_bytes(4, "little"),
        Item.RAM_SIZE: ram_size.to_bytes(8, "little"),
        Item.NO_GRAPHICS: b"\x01\x00",
        Item.CPU_COUNT: cpu_count.to_bytes(2, "little"),
        Item.MAX_CPU_COUNT: cpu_count.to_bytes(2, "little"),
    }


def standard_files(ram_size: int) -> dict[str, bytes]:
    """The named items of a machine: its memory map."""
    ranges = MemoryMap.pc(ram_size).ranges
    return {"etc/e820": b"".join(E820_ENTRY.pack(r.start, r.size, r.kind) for r in ranges)}


class FwCfg:
    """The device: a selected item and a position in it.  Items cannot be written."""

    def __init__(
        self, items: Mapping[int, bytes], files: Mapping[str, bytes], memory: GuestMemory
    ) -> None:
        self._memory = memory
        self._items = dict(items)
        directory = len(files).to_bytes(4, "big")
        for number, (name, data) in enumerate(sorted(files.items())):
            selector = Item.FIRST_FILE + number
            self._items[selector] = data
            directory += struct.pack(">IHH", len(data), selector, 0)
            directory += name.encode().ljust(NAME_SIZE, b"\0")
        self._items[Item.DIRECTORY] = directory
        self.set_command_line("")
        self._select(0)
        self._dma_address = 0

    def set_command_line(self, text: str) -> None:
        """The kernel's command line, for images that read it here."""
        line = text.encode() + b"\0"
        self._items[Item.COMMAND_LINE_SIZE] = len(line).to_bytes(4, "little")
        self._items[Item.COMMAND_LINE] = line

    def _select(self, selector: int) -> None:
        self._data = self._items.get(selector, b"")
        self._position = 0

    def read_data(self, offset: int, size: int) -> int:
        """0x511: the next byte; zero past the item's end.  0x510 is write-only."""
        if offset == 0:
            return all_ones(size)
        at, self._position = self._position, self._position + 1
        return self._data[at] if at < len(self._data) else 0

    def write_selector(self, offset: int, size: int, value: int) -> None:
        """0x510, 16 bits: select an item; 0x511 takes no data."""
        if offset == 0 and size == 2:
            self._select(value)

    def read_dma(self, offset: int, size: int) -> int:
        """0x514 reads as a signature, in big-endian order."""
        whole = DMA_SIGNATURE.to_bytes(8, "big")
        return int.from_bytes(whole[offset : offset + size], "little")

    def write_dma(self, offset: int, size: int, value: int) -> None:
        """0x514 takes the request's address, high dword first; the low one starts it."""
        if size != 4:
            return
        part = int.from_bytes(value.to_bytes(4, "little"), "big")
        if offset == 0:
            self._dma_address = part << 32
        elif offset == 4:
            address, self._dma_address = self._dma_address | part, 0
            self._transfer(address)

    def _transfer(self, request: int) -> None:
        """Carry out the request at a guest-physical address, and store its result there."""
        if not self._memory.is_ram(request, DMA_REQUEST.size):
            return
        control, length, address = DMA_REQUEST.unpack(self._memory.read(request, DMA_REQUEST.size))
        if control & DmaControl.SELECT:
            self._select(control >> 16)
        error = 0
        if control & DmaControl.READ:
            error = 0 if self._copy(address, length) else int(DmaControl.ERROR)
        elif control & DmaControl.WRITE:
            error = int(DmaControl.ERROR)
        elif control & DmaControl.SKIP:
            self._position += length
        self._memory.write(request, error.to_bytes(4, "big"))

    def _copy(self, address: int, length: int) -> bool:
        """Copy from the item, zeros past its end; False where the target is not RAM."""
        if not self._memory.is_ram(address, length):
            return False
        for done in range(0, length, CHUNK):
            count = min(CHUNK, length - done)
            start = self._position + done
            self._memory.write(
                address + done, self._data[start : start + count].ljust(count, b"\0")
            )
        self._position += length
        return True
