"""Linux: recognise a bzImage and start it at its 32-bit entry point.

Linux, "The Linux/x86 Boot Protocol": "The Real-Mode Kernel Header" and "32-bit Boot Protocol".
The kernel goes to 1 MiB and moves itself to where it wants to be; the initial RAM disk goes as
high as it may, as QEMU puts it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from undervisor.arch.x86.boot import HIGH_RAM, BootMode, BootState, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest.placement import (
    Builder,
    Kernel,
    Machine,
    Placement,
    Segment,
    aligned,
    flat_gdt,
    text,
)

SECTOR = 512
MAGIC_AT, MAGIC = 0x202, b"HdrS"
HEADER_AT = 0x1F1
HEADER_END_MOST = 0x280
"""The setup header may grow up to here; the zero page uses what follows."""
OLDEST = 0x206
"""Protocol 2.06 of Linux 2.6.22: the header says how long the command line may be."""
LOADED_HIGH = 1
RELOCATABLE_SINCE = 0x20A

GDT = 0x9000
ZERO_PAGE = 0x8F000
COMMAND_LINE = 0x90000
BOOT_CS = 0x10
E820_AT, E820_MOST = 0x2D0, 128
UNDEFINED_LOADER = 0xFF


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The fields of the setup header that a loader reads, by the names of the document."""

    setup_sects: int
    version: int
    loadflags: int
    initrd_addr_max: int
    kernel_alignment: int
    cmdline_size: int
    pref_address: int
    init_size: int

    @classmethod
    def of(cls, setup: bytes) -> SetupHeader:
        """From the first sectors of the file; a field that the version does not have is 0."""
        version = _field(setup, 0x206, "H")
        newer = version >= RELOCATABLE_SINCE
        return cls(
            _field(setup, HEADER_AT, "B") or 4,
            version,
            _field(setup, 0x211, "B"),
            _field(setup, 0x22C, "I"),
            _field(setup, 0x230, "I") if newer else 0,
            _field(setup, 0x238, "I"),
            _field(setup, 0x258, "Q") if newer else HIGH_RAM,
            _field(setup, 0x260, "I") if newer else 0,
        )


def _field(setup: bytes, at: int, form: str) -> int:
    (value,) = struct.unpack_from("<" + form, setup.ljust(HEADER_END_MOST, b"\0"), at)
    return int(value)


def recognise(data: bytes, name: str) -> Kernel | None:
    """The kernel of a bzImage; None where it is something else, BadInput if it cannot start."""
    if data[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
        return None
    header = SetupHeader.of(data[:HEADER_END_MOST])
    if header.version < OLDEST or not header.loadflags & LOADED_HIGH:
        raise BadInput(
            f"{name}: a Linux kernel with boot protocol "
            f"{header.version >> 8}.{header.version & 0xFF:02}, or loaded low",
            hint="protocol 2.06 and a bzImage are needed: Linux 2.6.22 or newer",
        )
    start = (header.setup_sects + 1) * SECTOR
    if len(data) <= start:
        raise BadInput(
            f"{name}: the Linux kernel should begin at {start:#x}, the file ends at {len(data):#x}",
            hint="the file is truncated",
        )
    kernel = data[start:]
    segment = Segment(HIGH_RAM, kernel, len(kernel))
    return Kernel(name, (segment,), HIGH_RAM, data[:start])


def place(kernel: Kernel, machine: Machine) -> Placement:
    """The kernel, its zero page, command line and initial RAM disk, and the registers."""
    header = SetupHeader.of(kernel.header)
    builder = Builder(kernel.name, machine.memory)
    builder.load(kernel)
    end = _run_end(kernel, header, machine.memory)
    words = text(machine.append)
    if len(words) - 1 > header.cmdline_size:
        raise BadInput(
            f"{kernel.name}: the command line has {len(words) - 1} bytes, the kernel takes "
            f"{header.cmdline_size}"
        )
    disk = _initial_ram_disk(kernel, machine)
    at = 0
    if disk:
        at = builder.put_high("the initial RAM disk", disk, header.initrd_addr_max + 1)
        if at < end:
            raise BadInput(
                f"{kernel.name}: the initial RAM disk does not fit above {end:#x}",
                hint="--memory gives more",
            )
    builder.put("boot information", ZERO_PAGE, _zero_page(kernel, machine, at, len(disk)))
    builder.put("the command line", COMMAND_LINE, words)
    builder.put("boot information", GDT, flat_gdt(BOOT_CS))
    return builder.done(
        BootState(
            BootMode.PROTECTED32,
            kernel.entry,
            cs=BOOT_CS,
            data=BOOT_CS + 8,
            esi=ZERO_PAGE,
            gdt=(GDT, len(flat_gdt(BOOT_CS)) - 1),
        )
    )


def _run_end(kernel: Kernel, header: SetupHeader, memory: MemoryMap) -> int:
    """The end of the memory that the kernel uses before it knows the memory map.

    "init_size": linear contiguous memory from where the kernel moves itself to.
    """
    alignment = max(header.kernel_alignment, 1)
    start = max(aligned(HIGH_RAM, alignment), header.pref_address)
    end = max(start + header.init_size, kernel.end)
    if not memory.is_ram(HIGH_RAM, end):
        raise BadInput(
            f"{kernel.name}: the kernel unpacks itself up to {end:#x}, which is not all RAM",
            hint=f"at least {(end >> 20) + 1} MiB of memory",
        )
    return end


def _initial_ram_disk(kernel: Kernel, machine: Machine) -> bytes:
    """All modules, one after the other: Linux unpacks archives that follow each other."""
    for module in machine.modules:
        if module.cmdline:
            raise BadInput(
                f"{kernel.name}: Linux gives a module no command line, {module.name} has one"
            )
    return b"".join(m.data.ljust(aligned(len(m.data), 4), b"\0") for m in machine.modules)


def _zero_page(kernel: Kernel, machine: Machine, disk: int, disk_size: int) -> bytes:
    """`struct boot_params`. "The Zero Page"."""
    page = bytearray(4096)
    # "copied ... up to offset 0x202 + byte value at offset 0x201"
    end = min(0x202 + kernel.header[0x201], HEADER_END_MOST, len(kernel.header))
    page[HEADER_AT:end] = kernel.header[HEADER_AT:end]
    ranges = machine.memory.ranges[:E820_MOST]
    struct.pack_into("<Q", page, 0x70, machine.rsdp)
    struct.pack_into("<B", page, 0x1E8, len(ranges))
    struct.pack_into("<B", page, 0x210, UNDEFINED_LOADER)
    struct.pack_into("<2I", page, 0x218, disk, disk_size)
    struct.pack_into("<I", page, 0x228, COMMAND_LINE)
    for number, part in enumerate(ranges):
        struct.pack_into("<QQI", page, E820_AT + 20 * number, part.start, part.size, part.kind)
    return bytes(page)
