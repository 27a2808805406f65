"""The two address spaces that devices live in: I/O ports and memory-mapped I/O.

As on a PC, what no device answers reads as all ones and swallows writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

PORTS = 0x10000


class Device(Protocol):
    """What a bus needs of a device: accesses by offset from its first port or address.

    `size` is the access's width in bytes; values are unsigned and fit the size.
    """

    def read(self, offset: int, size: int) -> int:
        """The value that the access sees."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the value."""


class Queue(Protocol):
    """A device whose first port is a queue of bytes: a string instruction moves many at once."""

    def read_all(self, count: int) -> bytes:
        """The port read `count` times in a row."""

    def write_all(self, data: bytes) -> None:
        """The port written with each byte in a row."""


class GuestMemory(Protocol):
    """The guest's RAM by guest-physical address, for devices that do DMA."""

    def is_ram(self, gpa: int, size: int, /) -> bool:
        """Whether all of the range is the guest's RAM; ask before `read` and `write`."""

    def read(self, gpa: int, size: int, /) -> bytes:
        """`size` bytes from `gpa`."""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Put `data` at `gpa`."""


@dataclass(frozen=True, slots=True)
class Registers:
    """A device of two functions, for one that is reached through several ranges."""

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]


def all_ones(size: int) -> int:
    """What an absent device reads as."""
    return (1 << (8 * size)) - 1


class PortBus:
    """I/O ports.  A byte-only device sees a wider access as bytes at successive ports."""

    __slots__ = ("_ports", "queues")

    def __init__(self) -> None:
        self._ports: dict[int, tuple[Device, int, bool]] = {}
        self.queues: dict[int, Queue] = {}
        """Byte-wide ports that are queues."""

    def register(self, first: int, count: int, device: Device, *, byte_only: bool = False) -> None:
        """Let `device` answer ports `first` to `first + count - 1`.

        Raises ValueError when a port is taken or out of range: that is our own mistake.
        """
        wanted = range(first, first + count)
        if first < 0 or first + count > PORTS or not self._ports.keys().isdisjoint(wanted):
            raise ValueError(f"ports {first:#x}+{count} are taken or do not exist")
        for port in wanted:
            self._ports[port] = (device, first, byte_only)

    def read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        entry = self._ports.get(port)
        if entry is not None and (size == 1 or not entry[2]):
            return entry[0].read(port - entry[1], size)
        if size == 1:
            return 0xFF
        value = 0
        for at in range(size):
            value |= self.read((port + at) % PORTS, 1) << (8 * at)
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        entry = self._ports.get(port)
        if entry is not None and (size == 1 or not entry[2]):
            entry[0].write(port - entry[1], size, value)
        elif size > 1:
            for at in range(size):
                self.write((port + at) % PORTS, 1, value >> (8 * at) & 0xFF)


class MmioBus:
    """Memory-mapped registers that all processors share, by guest-physical address."""

    __slots__ = ("_regions",)

    def __init__(self) -> None:
        self._regions: list[tuple[int, int, Device]] = []

    def register(self, first: int, count: int, device: Device) -> None:
        """Let `device` answer `count` bytes from `first`; ValueError where one already does."""
        if any(first < end and start < first + count for start, end, _ in self._regions):
            raise ValueError(f"addresses {first:#x}+{count:#x} are taken")
        self._regions.append((first, first + count, device))

    def covers(self, gpa: int) -> bool:
        """Whether a device answers at `gpa`."""
        return any(start <= gpa < end for start, end, _ in self._regions)

    def read(self, gpa: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        for start, end, device in self._regions:
            if start <= gpa < end:
                return device.read(gpa - start, size)
        return all_ones(size)

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        for start, end, device in self._regions:
            if start <= gpa < end:
                device.write(gpa - start, size, value)
                return
