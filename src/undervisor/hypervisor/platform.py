"""A PC out of devices: who answers which port and address, and how interrupts are wired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from undervisor.devices import acpi, firmware, ioapic
from undervisor.devices.board import (
    FastA20,
    Keyboard,
    Pci,
    Power,
    ResetControl,
    Vga,
    VideoMemory,
)
from undervisor.devices.bus import Device, GuestMemory, MmioBus, PortBus, Registers
from undervisor.devices.clock import Clock
from undervisor.devices.ends import DebugConsole, DebugExit, OnEnd, ShutdownPort
from undervisor.devices.fwcfg import FwCfg, standard_files, standard_items
from undervisor.devices.interrupts import InterruptBus, InterruptSink
from undervisor.devices.ioapic import IoApic
from undervisor.devices.lapic import Lapic
from undervisor.devices.output import Output
from undervisor.devices.pic import Pic
from undervisor.devices.pit import Pit
from undervisor.devices.rtc import Rtc
from undervisor.devices.serial import Input, Serial

TIMER_IRQ, SERIAL_IRQ, RTC_IRQ = 0, 4, 8
TIMER_PIN: Final = 2  # where ISA's IRQ 0 enters the I/O APIC
PAGE: Final = 0x1000
BYTE_ONLY: Final = True


@dataclass(frozen=True, slots=True)
class Features:
    """What the CPU model says about the local APIC and addresses."""

    x2apic: bool = True
    tsc_deadline: bool = True
    physical_address_bits: int = 40
    signature: int = 0  # CPUID.01H:EAX, for the MP table


class ProcessorMmio:
    """Memory-mapped I/O as one processor sees it: its own local APIC, then what all share."""

    __slots__ = ("_lapic", "_shared")

    def __init__(self, lapic: Lapic, shared: MmioBus) -> None:
        self._lapic = lapic
        self._shared = shared

    def covers(self, gpa: int) -> bool:
        """Whether a device answers at `gpa`."""
        return gpa & -PAGE == self._lapic.mmio_page or self._shared.covers(gpa)

    def read(self, gpa: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        if gpa & -PAGE == self._lapic.mmio_page:
            return self._lapic.read(gpa & PAGE - 1, size)
        return self._shared.read(gpa, size)

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        if gpa & -PAGE == self._lapic.mmio_page:
            self._lapic.write(gpa & PAGE - 1, size, value)
        else:
            self._shared.write(gpa, size, value)


class Platform:
    """The board with `len(sinks)` processors; its state is as firmware leaves it for a kernel.

    `sinks[i]` is processor i's interrupt input, `on_end` is told when the guest ends its run.
    `rsdp` is where `tables` puts the ACPI root pointer, for loaders that pass it on.
    `serial_sink` and `console_sink` take output in pieces; without the latter the debug console
    is absent.  `source` gives the serial port's input; without one only `feed_serial` does.
    """

    rsdp: Final = acpi.AREA

    def __init__(
        self,
        clock: Clock,
        sinks: Sequence[InterruptSink],
        memory: GuestMemory,
        ram_size: int,
        *,
        serial_sink: Callable[[bytes], None],
        on_end: OnEnd,
        console_sink: Callable[[bytes], None] | None = None,
        source: Input | None = None,
        command_line: str = "",
        features: Features | None = None,
    ) -> None:
        self.clock = clock
        self.features = features or Features()
        self.cpu_count = len(sinks)
        self.ports = PortBus()
        self.bus = InterruptBus()
        self.lapics = [self._make_lapic(cpu, sink) for cpu, sink in enumerate(sinks)]
        self.ioapic = IoApic(self.bus, self.cpu_count)
        self.pic = Pic(self._drive_lint0)
        self.pit = Pit(clock, self._tick)
        self.rtc = Rtc(clock, lambda level: self.irq(RTC_IRQ, level), ram_size, self.cpu_count)
        self.serial = Serial(lambda level: self.irq(SERIAL_IRQ, level), serial_sink)
        self.console = Output(console_sink) if console_sink else None
        self.fw_cfg = FwCfg(
            standard_items(ram_size, self.cpu_count), standard_files(ram_size), memory
        )
        self.fw_cfg.set_command_line(command_line)
        self.mmio = self._make_mmio()
        self._source = source
        self.serial.on_starved = self._poll_source
        self.pic.on_change = self.ioapic.on_change = self._resume_ticks
        self._wire_ports(on_end)
        self._set_up_by_firmware()

    def irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line: to the 8259 pair and to the I/O APIC."""
        self.pic.set_irq(line, level)
        self.ioapic.set_pin(TIMER_PIN if line == TIMER_IRQ else line, level)

    def feed_serial(self, data: bytes) -> None:
        """Input to the serial port, besides what `source` gives."""
        self.serial.feed(data)

    def take_input(self, seconds: float | None = None) -> bool:
        """Wait, at most so long, for input that interrupts; whether some came."""
        self.flush()  # who is to answer must have read the question
        if self._source is None or not self.expects_input:
            return False
        data = self._source.wait(seconds)
        if data:
            self.serial.feed(data)
        return bool(data)

    @property
    def expects_input(self) -> bool:
        """Whether input may come, and would interrupt."""
        return (
            self._source is not None and self._source.open and self.serial.can_interrupt_for_input
        )

    def set_command_line(self, text: str) -> None:
        """The kernel's command line, for images that ask fw_cfg for it."""
        self.fw_cfg.set_command_line(text)

    def flush(self) -> None:
        """Hand all buffered output to its sinks: now and then, and when every processor idles."""
        self.serial.flush()
        if self.console:
            self.console.flush()

    def tables(self) -> list[tuple[int, bytes]]:
        """What firmware puts into memory, as `(gpa, bytes)`: ACPI, MP table, BIOS data area."""
        return [
            *acpi.build(self.cpu_count),
            *firmware.build(self.cpu_count, self.features.signature),
        ]

    def _make_lapic(self, cpu: int, sink: InterruptSink) -> Lapic:
        return Lapic(
            cpu,
            self.clock,
            self.bus,
            sink,
            x2apic=self.features.x2apic,
            tsc_deadline=self.features.tsc_deadline,
            physical_address_bits=self.features.physical_address_bits,
        )

    def _make_mmio(self) -> list[ProcessorMmio]:
        shared = MmioBus()
        shared.register(ioapic.DEFAULT_BASE, PAGE, self.ioapic)
        shared.register(VideoMemory.FIRST, VideoMemory.SIZE, VideoMemory())
        return [ProcessorMmio(lapic, shared) for lapic in self.lapics]

    def _poll_source(self) -> None:
        if self._source is not None and (data := self._source.poll()):
            self.serial.feed(data)

    def _set_up_by_firmware(self) -> None:
        for lapic in self.lapics:
            lapic.external = self.pic
        self.lapics[0].set_up_by_firmware()
        self.pic.set_up_by_firmware()
        self.pit.set_up_by_firmware()

    def _drive_lint0(self, level: bool) -> None:
        for lapic in self.lapics:
            lapic.set_lint(0, level)

    def _tick(self) -> bool:
        """IRQ 0; whether another tick could do more than this one did."""
        self.irq(TIMER_IRQ, False)
        self.irq(TIMER_IRQ, True)
        return not self._tick_waits()

    def _tick_waits(self) -> bool:
        """Whether the 8259 holds a tick that nobody took, and the I/O APIC lets none through."""
        held = self.pic.master.requests >> TIMER_IRQ & 1
        return bool(held) and self.ioapic.is_masked(TIMER_PIN)

    def _resume_ticks(self) -> None:
        timer = self.pit.channels[0]
        if timer.resting and not self._tick_waits():
            timer.resume()

    def _wire_ports(self, on_end: OnEnd) -> None:
        keyboard, pci, fw_cfg = Keyboard(on_end), Pci(), self.fw_cfg
        power = Power(self.clock, on_end)
        rows: list[tuple[int, int, Device, bool]] = [
            (0x020, 2, self.pic.master, BYTE_ONLY),
            (0x040, 4, self.pit, BYTE_ONLY),
            (0x060, 1, Registers(keyboard.read_data, keyboard.write_data), BYTE_ONLY),
            (0x061, 1, Registers(self.pit.read_speaker, self.pit.write_speaker), BYTE_ONLY),
            (0x064, 1, Registers(keyboard.read_status, keyboard.write_command), BYTE_ONLY),
            (0x070, 2, self.rtc, BYTE_ONLY),
            (0x092, 1, FastA20(on_end), BYTE_ONLY),
            (0x0A0, 2, self.pic.slave, BYTE_ONLY),
            (0x0F4, 4, DebugExit(on_end), False),
            (0x3B0, 0x30, Vga(), BYTE_ONLY),
            (0x3F8, 8, self.serial, BYTE_ONLY),
            (0x4D0, 2, Registers(self.pic.read_elcr, self.pic.write_elcr), BYTE_ONLY),
            (0x510, 2, Registers(fw_cfg.read_data, fw_cfg.write_selector), False),
            (0x514, 8, Registers(fw_cfg.read_dma, fw_cfg.write_dma), False),
            (acpi.POWER_BASE, 12, power, False),
            (0xCF8, 1, Registers(pci.read_address, pci.write_address), False),
            (0xCF9, 1, ResetControl(on_end), BYTE_ONLY),
            (0xCFC, 4, Registers(pci.read_data, pci.write_data), False),
            (0x8900, 1, ShutdownPort(on_end), BYTE_ONLY),
        ]
        if self.console:
            rows.append((0x0E9, 1, DebugConsole(self.console.put), BYTE_ONLY))
        for first, count, device, byte_only in rows:
            self.ports.register(first, count, device, byte_only=byte_only)
        self.ports.queues[0x3F8] = self.serial
