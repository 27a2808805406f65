"""The ACPI tables of the machine (ACPI Specification, "ACPI System Description Tables").

They lie in the BIOS's read-only area, where a scan for the RSDP finds them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from undervisor.devices import ioapic
from undervisor.devices.lapic_layout import DEFAULT_BASE as LAPIC_BASE

AREA: Final = 0xE0000
AREA_END: Final = 0xF0000
POWER_BASE: Final = 0x600
SCI_IRQ: Final = 9
RESET_PORT, RESET_VALUE = 0xCF9, 0x06
OEM: Final = b"UNDRVS"
OEM_TABLE: Final = b"UNDRVSPC"
CREATOR: Final = b"UNDV"
HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
CHECKSUM_AT: Final = 9
ALIGNMENT: Final = 64  # what the FACS asks for

# Fixed ACPI description table: flags and boot architecture of a PC without buttons.
FADT_FLAGS: Final = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10
FADT_BOOT_ARCHITECTURE: Final = 1 << 0 | 1 << 1
NO_SUCH_C_STATE: Final = 0xFFF
PC_COMPATIBLE: Final = 1  # MADT flags: there is an 8259 pair as well
ENABLED: Final = 1
LEVEL_HIGH: Final = 0xD

# ACPI machine language, "AML Byte Stream Byte Values".
ZERO, NAME, PACKAGE, SCOPE, EXTENDED, PROCESSOR = 0x00, 0x08, 0x12, 0x10, 0x5B, 0x83

Placed = list[tuple[int, bytes]]


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of `data` and itself zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header, checksum, body."""
    length = HEADER.size + len(body)
    header = HEADER.pack(signature, length, revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1)
    whole = bytearray(header + body)
    whole[CHECKSUM_AT] = checksum(whole)
    return bytes(whole)


def build(cpu_count: int) -> Placed:
    """All tables as `(gpa, bytes)`, the RSDP first; ValueError when they do not fit their area."""
    tables: Placed = []
    end = AREA + ALIGNMENT  # the RSDP's place

    def place(data: bytes) -> int:
        nonlocal end
        address, end = end, -(-(end + len(data)) // ALIGNMENT) * ALIGNMENT
        tables.append((address, data))
        return address

    control = place(_facs())
    program = place(table(b"DSDT", 2, _dsdt(cpu_count)))
    described = [
        place(table(b"FACP", 3, _fadt(control, program))),
        place(table(b"APIC", 3, _madt(cpu_count))),
    ]
    old = place(table(b"RSDT", 1, b"".join(struct.pack("<I", at) for at in described)))
    new = place(table(b"XSDT", 1, b"".join(struct.pack("<Q", at) for at in described)))
    if end > AREA_END:
        raise ValueError(f"the ACPI tables for {cpu_count} processors do not fit")
    return [(AREA, _rsdp(old, new)), *tables]


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer: its first 20 bytes are the one of ACPI 1.0, with their own checksum."""
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM, 2, rsdt))
    first[8] = checksum(first)
    whole = bytearray(first + struct.pack("<IQB3x", 36, xsdt, 0))
    whole[32] = checksum(whole)
    return bytes(whole)


def _facs() -> bytes:
    """Firmware ACPI control structure."""
    return struct.pack("<4sI", b"FACS", 64).ljust(32, b"\0") + b"\x01" + bytes(31)


def _register(address: int, bits: int) -> bytes:
    """A generic address structure in I/O space; all zero where there is no register."""
    return struct.pack("<BBBBQ", 1 if bits else 0, bits, 0, 0, address)


def _fadt(facs: int, dsdt: int) -> bytes:
    event, control, timer = POWER_BASE, POWER_BASE + 4, POWER_BASE + 8
    none = _register(0, 0)
    return b"".join(
        (
            struct.pack("<IIBBH", facs, dsdt, 0, 0, SCI_IRQ),
            struct.pack("<I4B", 0, 0, 0, 0, 0),  # no SMI command: always in ACPI mode
            struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
            struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),
            struct.pack("<4H", NO_SUCH_C_STATE, NO_SUCH_C_STATE, 0, 0),
            struct.pack("<5BHB", 0, 0, 0, 0, 0x32, FADT_BOOT_ARCHITECTURE, 0),
            struct.pack("<I", FADT_FLAGS),
            _register(RESET_PORT, 8),
            struct.pack("<B3x", RESET_VALUE),
            struct.pack("<QQ", 0, dsdt),
            *(_register(event, 32), none, _register(control, 16), none),
            *(none, _register(timer, 32), none, none),
        )
    )


def _madt(cpu_count: int) -> bytes:
    """Multiple APIC description table: processors, the I/O APIC, how ISA interrupts are wired."""
    local = [struct.pack("<BBBBI", 0, 8, cpu, cpu, ENABLED) for cpu in range(cpu_count)]
    return b"".join(
        (
            struct.pack("<II", LAPIC_BASE, PC_COMPATIBLE),
            *local,
            struct.pack("<BBBBII", 1, 12, cpu_count, 0, ioapic.DEFAULT_BASE, 0),
            struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
            struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, LEVEL_HIGH),
            struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),  # NMI is LINT1 of every processor
        )
    )


def _dsdt(cpu_count: int) -> bytes:
    """The definition block: processors, and the sleep type that powers off."""
    processors = (
        bytes((EXTENDED, PROCESSOR))
        + _packed(f"CP{cpu:02X}".encode() + struct.pack("<BIB", cpu, 0, 0))
        for cpu in range(cpu_count)
    )
    return _scope(b"\\_PR_", processors) + bytes((NAME,)) + b"_S5_" + _package((ZERO,) * 4)


def _scope(name: bytes, terms: Iterable[bytes]) -> bytes:
    return bytes((SCOPE,)) + _packed(name + b"".join(terms))


def _package(elements: tuple[int, ...]) -> bytes:
    return bytes((PACKAGE,)) + _packed(bytes((len(elements), *elements)))


def _packed(content: bytes) -> bytes:
    """`content` behind its PkgLength, which counts itself ("Package Length Encoding")."""
    if len(content) + 1 < 0x40:
        return bytes((len(content) + 1,)) + content
    length = len(content) + 2
    return bytes((0x40 | length & 0xF, length >> 4)) + content
