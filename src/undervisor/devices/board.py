"""The small ports of a PC's board: resets, the keyboard controller, PCI's scan, ACPI power."""

from __future__ import annotations

from typing import Final

from undervisor.devices.bus import all_ones
from undervisor.devices.clock import Clock
from undervisor.devices.ends import EndOfRun, EndReason, OnEnd

NS: Final = 1_000_000_000
PM_TIMER_FREQUENCY: Final = 3_579_545


class FastA20:
    """Port 0x92: bit 1 is A20, which is always on here; a rise of bit 0 resets."""

    __slots__ = ("_on_end", "_value")

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._value = 0x02

    def read(self, offset: int, size: int) -> int:
        """What was written, A20 on."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset when bit 0 rises."""
        if value & ~self._value & 1:
            self._on_end(EndOfRun(EndReason.RESET))
        self._value = value | 0x02


class ResetControl:
    """Port 0xcf9: bit 2 resets, bit 1 says how hard (Intel chip sets' "Reset Control")."""

    __slots__ = ("_on_end", "_value")

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """The bits that stay."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset with bit 2."""
        self._value = value & 0x0A
        if value & 0x04:
            self._on_end(EndOfRun(EndReason.RESET))


# Keyboard controller commands that give an answer, and the answer.
KEYBOARD_ANSWERS: Final = {0xAA: 0x55, 0xA9: 0x00, 0xAB: 0x00, 0xC0: 0x80, 0xD0: 0x03}
KEYBOARD_READ_COMMAND_BYTE, KEYBOARD_WRITE_COMMAND_BYTE, KEYBOARD_WRITE_OUTPUT = 0x20, 0x60, 0xD1
KEYBOARD_FIRST_PULSE: Final = 0xF0
OUTPUT_FULL, SYSTEM_FLAG, COMMAND_LAST, NOT_LOCKED = 0x01, 0x04, 0x08, 0x10
ACKNOWLEDGE, DEVICE_RESET, SELF_TEST_PASSED = 0xFA, 0xFF, 0xAA


class Keyboard:
    """The 8042 keyboard controller, 0x60 and 0x64, with a keyboard on which no key is pressed.

    It answers self-tests and resets; it raises no interrupt, for nothing is ever typed.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._answers: list[int] = []
        self._command_byte = 0x61
        self._expects: int | None = None  # the command whose data byte comes next
        self._status = SYSTEM_FLAG | NOT_LOCKED

    def read_data(self, offset: int, size: int) -> int:
        """Port 0x60: the next answer."""
        return self._answers.pop(0) if self._answers else 0

    def read_status(self, offset: int, size: int) -> int:
        """Port 0x64: ready for input, and whether an answer waits."""
        return self._status | bool(self._answers)

    def write_data(self, offset: int, size: int, value: int) -> None:
        """Port 0x60: a command's data, or a byte to the keyboard."""
        command, self._expects = self._expects, None
        self._status &= ~COMMAND_LAST
        if command == KEYBOARD_WRITE_COMMAND_BYTE:
            self._command_byte = value
        elif command == KEYBOARD_WRITE_OUTPUT:
            if not value & 1:
                self._on_end(EndOfRun(EndReason.RESET))
        elif command is None:
            # Bounded: a guest that never reads its answers loses the oldest.
            tested = [SELF_TEST_PASSED] if value == DEVICE_RESET else []
            self._answers = [*self._answers, ACKNOWLEDGE, *tested][-16:]

    def write_command(self, offset: int, size: int, value: int) -> None:
        """Port 0x64: a command; an even pulse, as 0xfe, resets."""
        self._status |= COMMAND_LAST
        self._expects = None
        if value >= KEYBOARD_FIRST_PULSE:
            if not value & 1:
                self._on_end(EndOfRun(EndReason.RESET))
        elif value == KEYBOARD_READ_COMMAND_BYTE:
            self._answers = [self._command_byte]
        elif value in KEYBOARD_ANSWERS:
            self._answers = [KEYBOARD_ANSWERS[value]]
        elif value in (KEYBOARD_WRITE_COMMAND_BYTE, KEYBOARD_WRITE_OUTPUT) or value in (
            0xD2, 0xD3, 0xD4,
        ):  # fmt: skip
            self._expects = value


class Vga:
    """Ports 0x3b0 to 0x3df of a display that nobody sees.

    The retrace bits of the status registers change with each read, so that waiting for them ends.
    """

    STATUS = (0x0A, 0x2A)
    RETRACE = 0x09

    def __init__(self) -> None:
        self._status = 0

    def read(self, offset: int, size: int) -> int:
        """The changing status; zero elsewhere."""
        if offset not in self.STATUS:
            return 0
        self._status ^= self.RETRACE
        return self._status

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing."""


class VideoMemory:
    """The video memory's window, 0xa0000 to 0xbffff, which keeps what is written."""

    FIRST, SIZE = 0xA0000, 0x20000

    def __init__(self) -> None:
        self._bytes = bytearray(self.SIZE)

    def read(self, offset: int, size: int) -> int:
        """What was written; all ones beyond the end."""
        part = self._bytes[offset : offset + size].ljust(size, b"\xff")
        return int.from_bytes(part, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the bytes that lie in the window."""
        kept = min(size, self.SIZE - offset)
        self._bytes[offset : offset + kept] = value.to_bytes(size, "little")[:kept]


# The host bridge's configuration space: 82441FX ("440FX PCIset", "PCI Configuration Registers").
HOST_BRIDGE: Final = {0x00: 0x12378086, 0x08: 0x06000002, 0x2C: 0x11001AF4}
HOST_BRIDGE_COMMAND, HOST_BRIDGE_MASTER = 0x04, 0x0006


class Pci:
    """Configuration mechanism #1, 0xcf8 and 0xcfc: a bus with nothing but its host bridge.

    Other functions read as all ones, which is how a scan sees that they are absent.
    """

    def __init__(self) -> None:
        self._address = 0

    def read_address(self, offset: int, size: int) -> int:
        """The address register; only a whole dword is one."""
        return self._address if (offset, size) == (0, 4) else all_ones(size)

    def write_address(self, offset: int, size: int, value: int) -> None:
        """Select a function and register."""
        if (offset, size) == (0, 4):
            self._address = value & 0x80FFFFFC

    def read_data(self, offset: int, size: int) -> int:
        """The selected register's bytes from `offset` on."""
        if self._address >> 8 != 0x800000:  # enabled, bus 0, device 0, function 0
            return all_ones(size)
        register = self._address & 0xFC
        value = HOST_BRIDGE.get(register, 0)
        if register == HOST_BRIDGE_COMMAND:
            value = HOST_BRIDGE_MASTER
        return value >> (8 * offset) & all_ones(size)

    def write_data(self, offset: int, size: int, value: int) -> None:
        """Nothing here can be configured."""


EVENT, CONTROL, TIMER = 0x0, 0x4, 0x8
SCI_ENABLED, SLEEP_ENABLE, SLEEP_TYPE = 0x0001, 0x2000, 0x1C00
SOFT_OFF_TYPE: Final = 0


class Power:
    """ACPI PM1 event and control registers and the PM timer, as the 82371AB has them.

    The machine is always in ACPI mode.  No event ever occurs, so none interrupts.
    """

    def __init__(self, clock: Clock, on_end: OnEnd) -> None:
        self._clock = clock
        self._on_end = on_end
        self._enable = 0
        self._control = SCI_ENABLED

    def timer(self) -> int:
        """The PM timer: 24 bits at 3.579545 MHz."""
        return self._clock.now() * PM_TIMER_FREQUENCY // NS & 0xFFFFFF

    def read(self, offset: int, size: int) -> int:
        """PM1 status (0), enable (2), control (4), timer (8)."""
        whole = {EVENT: self._enable << 16, CONTROL: self._control}.get(offset & 0xC, 0)
        if offset & 0xC == TIMER:
            whole = self.timer()
        return whole >> (8 * (offset & 3)) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """PM1 enable and control; SLP_EN with the type of S5 powers off."""
        if offset & 0xC == EVENT:
            if offset + size > 2:
                self._enable = value >> (16 if offset == 0 else 0) & 0xFFFF
        elif offset == CONTROL:
            self._write_control(value & 0xFFFF)
        elif offset == CONTROL + 1:
            self._write_control(value << 8 & 0xFF00 | self._control & 0xFF)

    def _write_control(self, value: int) -> None:
        self._control = value & ~SLEEP_ENABLE | SCI_ENABLED
        if value & SLEEP_ENABLE and value & SLEEP_TYPE == SOFT_OFF_TYPE:
            self._on_end(EndOfRun(EndReason.POWER_OFF))
