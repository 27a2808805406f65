"""What a PC's firmware leaves in memory for old software: BIOS data area and MP table.

IBM PC's BIOS data area; Intel MultiProcessor Specification 1.4, "MP Configuration Table".
"""

from __future__ import annotations

import struct
from typing import Final

from undervisor.arch.x86.boot import LOW_RAM_END
from undervisor.devices import ioapic
from undervisor.devices.acpi import Placed, checksum
from undervisor.devices.lapic_layout import DEFAULT_BASE as LAPIC_BASE

MP_POINTER: Final = 0xF0000
MP_TABLE: Final = 0xF0010
OEM: Final = b"UNDRVS  "
PRODUCT: Final = b"PC          "
ISA_BUS: Final = 0
ISA_IRQS: Final = tuple(irq for irq in range(16) if irq != 2)
TIMER_PIN: Final = 2
INT, NMI, EXTINT = 0, 1, 3
ALL_PROCESSORS: Final = 0xFF
FEATURES: Final = 0x201  # on-chip FPU and APIC

# BIOS data area: address, format, value.
BIOS_DATA: Final = (
    (0x400, "<H", 0x3F8),  # COM1
    (0x40E, "<H", LOW_RAM_END >> 4),  # segment of the extended BIOS data area
    (0x410, "<H", 0x0226),  # equipment: one serial port, 80x25 color, mouse, FPU
    (0x413, "<H", LOW_RAM_END >> 10),  # KiB of base memory
    (0x449, "<B", 3),  # video mode
    (0x44A, "<H", 80),  # columns
    (0x44C, "<H", 0x1000),  # bytes per screen
    (0x463, "<H", 0x3D4),  # CRT controller's port
    (0x484, "<B", 24),  # last row
    (0x485, "<H", 16),  # character height
)
EXTENDED_BIOS_DATA: Final = (LOW_RAM_END, b"\x01")  # its size in KiB


def build(cpu_count: int, cpu_signature: int = 0) -> Placed:
    """Everything as `(gpa, bytes)`; `cpu_signature` is CPUID.01H:EAX."""
    data = [(address, struct.pack(form, value)) for address, form, value in BIOS_DATA]
    return [
        *data,
        EXTENDED_BIOS_DATA,
        (MP_POINTER, _mp_pointer()),
        (MP_TABLE, _mp_table(cpu_count, cpu_signature)),
    ]


def _mp_pointer() -> bytes:
    """The floating pointer structure."""
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", MP_TABLE, 1, 4, 0))
    pointer[10] = checksum(pointer)
    return bytes(pointer)


def _mp_table(cpu_count: int, signature: int) -> bytes:
    """The configuration table: processors first, as the specification orders entries."""
    io_id = cpu_count
    entries = [
        struct.pack("<BBBBII8x", 0, cpu, 0x14, 3 if cpu == 0 else 1, signature, FEATURES)
        for cpu in range(cpu_count)
    ]
    entries.append(struct.pack("<BB6s", 1, ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_id, 0x20, 1, ioapic.DEFAULT_BASE))
    for irq in ISA_IRQS:
        pin = TIMER_PIN if irq == 0 else irq
        entries.append(struct.pack("<BBHBBBB", 3, INT, 0, ISA_BUS, irq, io_id, pin))
    entries.append(struct.pack("<BBHBBBB", 4, EXTINT, 0, ISA_BUS, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, NMI, 0, ISA_BUS, 0, ALL_PROCESSORS, 1))
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        *(b"PCMP", 44 + len(body), 4, 0, OEM, PRODUCT, 0, 0, len(entries), LAPIC_BASE, 0, 0, 0),
    )
    table = bytearray(header + body)
    table[7] = checksum(table)
    return bytes(table)
