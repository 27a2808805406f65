"""The 8259A pair of a PC (Intel 8259A data sheet), with the ELCR of PCI chip sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

CASCADE: Final = 2
SPURIOUS: Final = 7
LEVELS_SELECTABLE: Final = (0xF8, 0xDE)  # ELCR: IRQ 0-2, 8 and 13 are always edge-triggered
ICW1, OCW3 = 0x10, 0x08
ICW1_NEEDS_ICW4, ICW1_SINGLE, ICW1_LEVEL = 0x01, 0x02, 0x08
ICW4_AUTOMATIC_EOI, ICW4_SPECIAL_NESTING = 0x02, 0x10  # the latter for a master


class Controller:
    """One 8259A; `changed()` is called when its INT output may have changed."""

    def __init__(self, changed: Callable[[], None], followed: int = 0) -> None:
        self._changed = changed
        self._followed = followed  # inputs whose request falls with the line: another 8259's INT
        self.elcr = 0
        self._lines = 0
        self._reset()

    def _reset(self) -> None:
        self.requests = self.in_service = 0
        self.mask = 0
        self._base = 0
        self._lowest = 7  # the input of the lowest priority
        self._step = 0  # the next ICW that the data port expects; 0 is none
        self._single = self._needs_icw4 = False
        self._all_level = False
        self._read_in_service = self._polled = self._special_mask = False
        self._automatic_eoi = self._rotate_automatically = self._special_nesting = False

    def set_line(self, line: int, level: bool) -> None:
        """Drive an input: a rise requests, or a level does where ELCR or ICW1 says so."""
        bit = 1 << line
        by_level = (self.elcr | self._followed) & bit or self._all_level
        if level:
            if by_level or not self._lines & bit:
                self.requests |= bit
            self._lines |= bit
        else:
            self._lines &= ~bit
            if by_level:
                self.requests &= ~bit
        self._changed()

    def candidate(self) -> int | None:
        """The input that INT is asserted for, or None."""
        waiting = self.requests & ~self.mask
        if not waiting:
            return None
        blocking = self.in_service & ~self.mask if self._special_mask else self.in_service
        if self._special_nesting:  # the slave's own priorities decide
            blocking &= ~(1 << CASCADE)
        for step in range(1, 9):
            line = (self._lowest + step) & 7
            if waiting >> line & 1:
                return None if blocking >> line & 1 else line
            if blocking >> line & 1 and not self._special_mask:
                return None
        return None

    def vector(self, line: int) -> int:
        """The vector of an input."""
        return self._base | line

    def accept(self, line: int) -> None:
        """The acknowledge cycle's effect for an input."""
        bit = 1 << line
        if not (self.elcr | self._followed) & bit and not self._all_level:
            self.requests &= ~bit
        if self._automatic_eoi:
            if self._rotate_automatically:
                self._lowest = line
        else:
            self.in_service |= bit
        self._changed()

    def read(self, offset: int, size: int) -> int:
        """The data port gives the mask; the command port IRR, ISR, or a poll's answer."""
        if self._polled:
            self._polled = False
            line = self.candidate()
            if line is None:
                return SPURIOUS
            self.accept(line)
            return 0x80 | line
        if offset:
            return self.mask
        return self.in_service if self._read_in_service else self.requests

    def write(self, offset: int, size: int, value: int) -> None:
        """ICW1 to ICW4, OCW1 to OCW3."""
        if offset:
            self._write_data(value)
        elif value & ICW1:
            self._initialize(value)
        elif value & OCW3:
            self._operate(value)
        else:
            self._end_of_interrupt(value)
        self._changed()

    def _initialize(self, icw1: int) -> None:
        self._reset()
        self._single = bool(icw1 & ICW1_SINGLE)
        self._needs_icw4 = bool(icw1 & ICW1_NEEDS_ICW4)
        self._all_level = bool(icw1 & ICW1_LEVEL)
        self._step = 2

    def _write_data(self, value: int) -> None:
        if self._step == 0:
            self.mask = value
        elif self._step == 2:
            self._base = value & 0xF8
            self._step = 3 if not self._single else (4 if self._needs_icw4 else 0)
        elif self._step == 3:  # ICW3: the wiring, which is a PC's
            self._step = 4 if self._needs_icw4 else 0
        else:
            self._automatic_eoi = bool(value & ICW4_AUTOMATIC_EOI)
            self._special_nesting = bool(value & ICW4_SPECIAL_NESTING)
            self._step = 0

    def _operate(self, ocw3: int) -> None:
        if ocw3 & 0x04:
            self._polled = True
        if ocw3 & 0x02:
            self._read_in_service = bool(ocw3 & 0x01)
        if ocw3 & 0x40:
            self._special_mask = bool(ocw3 & 0x20)

    def _end_of_interrupt(self, ocw2: int) -> None:
        rotate, specific, end = bool(ocw2 & 0x80), bool(ocw2 & 0x40), bool(ocw2 & 0x20)
        if not end:
            if specific and rotate:
                self._lowest = ocw2 & 7
            elif not specific:
                self._rotate_automatically = rotate
            return
        line = ocw2 & 7 if specific else self._highest_in_service()
        if line is not None:
            self.in_service &= ~(1 << line)
            if rotate:
                self._lowest = line

    def _highest_in_service(self) -> int | None:
        for step in range(1, 9):
            line = (self._lowest + step) & 7
            if self.in_service >> line & 1:
                return line
        return None


class Pic:
    """Master and slave; `output(level)` is the master's INT pin.

    `on_change` is called after each change of the master's state.
    """

    def __init__(self, output: Callable[[bool], None]) -> None:
        self._output = output
        self.on_change: Callable[[], None] = lambda: None
        self._level = False
        self.master = Controller(self._update, followed=1 << CASCADE)
        self.slave = Controller(self._update_slave)

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive IRQ 0 to 15; IRQ 2 is the cascade and not a device's."""
        if irq >= 8:
            self.slave.set_line(irq - 8, level)
        elif irq != CASCADE:
            self.master.set_line(irq, level)

    def set_up_by_firmware(self) -> None:
        """What a PC's firmware leaves: vectors 8 and 0x70; disks, keyboard, clocks on."""
        for controller, base, wiring, mask in (
            (self.master, 0x08, 1 << CASCADE, 0xB8),
            (self.slave, 0x70, CASCADE, 0x8E),
        ):
            controller.write(0, 1, ICW1 | ICW1_NEEDS_ICW4)
            for value in (base, wiring, 0x01, mask):
                controller.write(1, 1, value)

    def peek(self) -> int:
        """The vector that `acknowledge` would return; the spurious one if nothing asks."""
        line = self.master.candidate()
        if line is None:
            return self.master.vector(SPURIOUS)
        if line != CASCADE:
            return self.master.vector(line)
        behind = self.slave.candidate()
        return self.slave.vector(SPURIOUS if behind is None else behind)

    def acknowledge(self) -> int:
        """The interrupt-acknowledge cycle; returns the vector."""
        line = self.master.candidate()
        if line is None:
            return self.master.vector(SPURIOUS)
        vector = self.peek()
        behind = self.slave.candidate() if line == CASCADE else None
        self.master.accept(line)
        if behind is not None:
            self.slave.accept(behind)
        return vector

    def read_elcr(self, offset: int, size: int) -> int:
        """The edge/level control registers, 0x4d0 and 0x4d1."""
        return (self.master, self.slave)[offset].elcr

    def write_elcr(self, offset: int, size: int, value: int) -> None:
        """Choose level (1) or edge (0) per input, where the PC lets."""
        (self.master, self.slave)[offset].elcr = value & LEVELS_SELECTABLE[offset]

    def _update_slave(self) -> None:
        self.master.set_line(CASCADE, self.slave.candidate() is not None)

    def _update(self) -> None:
        level = self.master.candidate() is not None
        if level != self._level:
            self._level = level
            self._output(level)
        self.on_change()
