"""What answers at I/O ports: a serial port, and the ways in which a guest ends its own run.

The interrupt controllers and the timer are in the kernel.  Everything else reads as all ones.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Final

from undervisor.arch.kvm import COALESCED_ENTRY, COALESCED_RING, EXIT_AT, EXIT_IO, EXIT_MMIO
from undervisor.devices.board import FastA20, Keyboard, ResetControl
from undervisor.devices.bus import Device, PortBus, Registers
from undervisor.devices.ends import DebugExit, OnEnd, ShutdownPort
from undervisor.devices.serial import Serial
from undervisor.targets.kvm.vcpu import Vcpu
from undervisor.targets.kvm.vm import Vm

SERIAL, SERIAL_IRQ, SERIAL_PORTS = 0x3F8, 4, 8
STARVED_POLLS: Final = 2
STARVED_WAIT: Final = 0.01
"""Seconds that a processor rests that polls for input in vain; input ends the rest."""
HELD: Final = 0x4000
"""Bytes of output that are held back until the guest looks for input."""
PAGE: Final = 0x1000
_RING_MOST: Final = (PAGE - COALESCED_RING.size) // COALESCED_ENTRY.size
_DATA_IN_ENTRY: Final = 16
_FIRST: Final = struct.Struct("<I")


class Board:
    """The ports; `lock` is held in every call and let go only while a processor rests."""

    def __init__(self, vm: Vm, send: Callable[[bytes], None], on_end: OnEnd) -> None:
        self.lock = threading.RLock()
        self._came = threading.Condition(self.lock)
        self._send, self._said = send, bytearray()
        self.serial = Serial(
            lambda level: vm.irq(SERIAL_IRQ, level), self._say, starved_polls=STARVED_POLLS
        )
        self.serial.on_starved = self._rest
        self._ports = PortBus()
        keyboard = Keyboard(on_end)
        rows: list[tuple[int, int, Device]] = [
            (0x060, 1, Registers(keyboard.read_data, keyboard.write_data)),
            (0x064, 1, Registers(keyboard.read_status, keyboard.write_command)),
            (0x092, 1, FastA20(on_end)),
            (SERIAL, SERIAL_PORTS, self.serial),
            (0xCF9, 1, ResetControl(on_end)),
            (0x8900, 1, ShutdownPort(on_end)),
        ]
        for first, count, device in rows:
            self._ports.register(first, count, device, byte_only=True)
        self._ports.register(0x0F4, 4, DebugExit(on_end))
        ring = vm.gather_output(SERIAL)
        self._ring = None if ring is None else (vm.vcpus[0].page, ring * PAGE)

    def feed(self, data: bytes) -> None:
        """Input for the serial port."""
        with self.lock:
            self.serial.feed(data)
            self._came.notify_all()

    def tend(self) -> None:
        """Hand over the output of a guest that does not ask for anything, or has ended."""
        with self.lock:
            self.drain()
            self.serial.flush()
            self._hand_over()

    def _say(self, data: bytes) -> None:
        # A line of its own is nothing special here: the fewer pieces, the sooner they are there.
        self._said += data
        if len(self._said) >= HELD:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._said:
            data = bytes(self._said)
            self._said.clear()
            self._send(data)

    def _rest(self) -> None:
        self._hand_over()
        self._came.wait(STARVED_WAIT)

    def drain(self) -> None:
        """Take the output that KVM has gathered: it is older than any exit."""
        if self._ring is None:
            return
        page, start = self._ring
        first, last = COALESCED_RING.unpack_from(page, start)
        if first == last:
            return
        entries = start + COALESCED_RING.size
        parts = [(first, last)] if first < last else [(first, _RING_MOST), (0, last)]
        said = bytearray()
        for begin, end in parts:
            # Each entry is one byte for the one port that is gathered.
            data = entries + begin * COALESCED_ENTRY.size + _DATA_IN_ENTRY
            said += page[data : entries + end * COALESCED_ENTRY.size : COALESCED_ENTRY.size]
        self.serial.write_all(bytes(said))
        _FIRST.pack_into(page, start, last)  # the other half is the kernel's

    def io(self, vcpu: Vcpu) -> None:
        """IN, OUT and their string forms."""
        out, size, port, count, at = EXIT_IO.unpack_from(vcpu.page, EXIT_AT)
        if port == SERIAL and size == 1 and not out:
            vcpu.page[at : at + count] = self.serial.read_all(count)
            return
        for place in range(at, at + size * count, size):
            if out:
                value = int.from_bytes(vcpu.page[place : place + size], "little")
                self._ports.write(port, size, value)
            else:
                value = self._ports.read(port, size)
                vcpu.page[place : place + size] = value.to_bytes(size, "little")

    def mmio(self, vcpu: Vcpu) -> None:
        """Memory that is neither RAM nor a device: reads give all ones."""
        address, _, size, write = EXIT_MMIO.unpack_from(vcpu.page, EXIT_AT)
        if not write:
            EXIT_MMIO.pack_into(vcpu.page, EXIT_AT, address, b"\xff" * 8, size, write)
