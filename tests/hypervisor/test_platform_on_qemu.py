"""The same accesses give the same answers on QEMU's PC, whose devices nobody here wrote.

A script is a list of steps; on QEMU a small Multiboot image carries them out, with interrupts
off, and sends what it read through the debug console.
"""

import shutil
import struct
import subprocess

import pytest

from undervisor.devices.clock import Clock
from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.placement import Segment
from undervisor.hypervisor.platform import Platform

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
]

ORIGIN, RESULTS = 0x100000, 0x200000
MULTIBOOT = struct.pack("<3I", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
REGISTERS = {1: "al", 2: "ax", 4: "eax"}
MIB = 1 << 20
LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000


def out(port, value, size=1):
    return ("out", port, value, size)


def get(port, size=1):
    return ("in", port, size)


def store(address, value):
    return ("store", address, value)


def load(address):
    return ("load", address)


# On QEMU.


def code_of(step):
    match step:
        case ("out", port, value, size):
            return f"mov edx, {port}\nmov eax, {value}\nout dx, {REGISTERS[size]}"
        case ("in", port, size):
            return f"xor eax, eax\nmov edx, {port}\nin {REGISTERS[size]}, dx\nstosd"
        case ("store", address, value):
            return f"mov ebx, {address}\nmov dword ptr [ebx], {value}"
        case ("load", address):
            return f"mov ebx, {address}\nmov eax, [ebx]\nstosd"
    raise AssertionError(step)


def image_of(script):
    source = "\n".join(
        [
            ".intel_syntax noprefix",
            ".code32",
            "cli",
            "cld",
            "mov esp, 0x80000",
            f"mov edi, {RESULTS}",
            *map(code_of, script),
            "mov ecx, edi",
            f"sub ecx, {RESULTS}",
            f"mov esi, {RESULTS}",
            "mov edx, 0xe9",
            "rep outsb",
            "mov edx, 0xf4",
            "out dx, eax",
            "cli",
            "hlt",
        ]
    )
    code = assemble(source, ORIGIN + len(MULTIBOOT))
    data = MULTIBOOT + code.bytes
    segment = Segment(ORIGIN, data, len(data))
    return write_elf([segment], ORIGIN + len(MULTIBOOT))


def on_qemu(script, directory):
    image, seen = directory / "image.elf", directory / "seen"
    image.write_bytes(image_of(script))
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-smp", "2", "-display", "none"]
    command += ["-kernel", str(image), "-debugcon", f"file:{seen}", "-serial", "null"]
    command += ["-icount", "shift=0,sleep=off"]  # its clock, too, is made of what it executes
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-monitor", "none", "-no-reboot"]
    subprocess.run(command, timeout=60, check=False, capture_output=True)
    data = seen.read_bytes()
    return [value for (value,) in struct.iter_unpack("<I", data)]


# Here.


class Ram:
    def is_ram(self, gpa, size):
        return False

    def read(self, gpa, size):
        raise AssertionError("no DMA here")

    def write(self, gpa, data):
        raise AssertionError("no DMA here")


class Processor:
    def nmi(self):
        pass

    init = smi = wake = nmi

    def sipi(self, vector):
        pass


def here(script):
    platform = Platform(
        Clock(lambda: 0),
        [Processor(), Processor()],
        Ram(),
        64 * MIB,
        serial_sink=lambda data: None,
        console_sink=lambda data: None,
        on_end=lambda end: None,
    )
    ports, mmio, seen = platform.ports, platform.mmio[0], []
    for step in script:
        match step:
            case ("out", port, value, size):
                ports.write(port, size, value)
            case ("in", port, size):
                seen.append(ports.read(port, size))
            case ("store", address, value):
                mmio.write(address, 4, value)
            case ("load", address):
                seen.append(mmio.read(address, 4))
    return seen


SERIAL = [
    *[out(0x3FB, 0x83), out(0x3F8, 0x01), out(0x3F9, 0x00), get(0x3F8), get(0x3F9)],
    *[out(0x3FB, 0x03), get(0x3FB), out(0x3FF, 0x5A), get(0x3FF)],
    *[out(0x3F9, 0xFF), get(0x3F9), out(0x3F9, 0x00), get(0x3FA)],
    *[out(0x3FA, 0xC7), get(0x3FA), out(0x3FA, 0x00), get(0x3FA)],
    *[out(0x3FC, 0x1E), out(0x3F8, 0xAE), get(0x3F8), get(0x3FE), out(0x3FC, 0x0B), get(0x3FC)],
    *[out(0x3F9, 0x02), get(0x3FA), get(0x3FA), get(0x3FD), out(0x3F9, 0x00), get(0x3FA)],
]
PIC = [
    *[out(0x20, 0x11), out(0x21, 0x20), out(0x21, 0x04), out(0x21, 0x01), out(0x21, 0xFB)],
    *[out(0xA0, 0x11), out(0xA1, 0x28), out(0xA1, 0x02), out(0xA1, 0x01), out(0xA1, 0xFF)],
    *[get(0x21), get(0xA1), out(0x20, 0x0B), get(0x20), out(0xA0, 0x0B), get(0xA0)],
    *[out(0x4D0, 0xFF), get(0x4D0), out(0x4D1, 0xFF), get(0x4D1), out(0x4D0, 0), out(0x4D1, 0)],
    # The UART's transmitter interrupt asks for IRQ 4; a poll takes it.
    *[out(0x21, 0xEF), out(0x3F9, 0x02), out(0x20, 0x0C), get(0x20)],
    *[out(0x20, 0x0B), get(0x20), out(0x20, 0x20), get(0x20), out(0x3F9, 0x00)],
]
PIT = [
    *[out(0x61, 0x00), out(0x43, 0xB0), out(0x43, 0xE8), get(0x42)],
    *[out(0x42, 0x34), out(0x42, 0x12), out(0x43, 0xB4), out(0x43, 0xE8), get(0x42)],
    *[out(0x43, 0x96), out(0x43, 0xE8), get(0x42), get(0x43)],
]
RTC = [
    *[step for index in (0x0B, 0x0D) for step in (out(0x70, index), get(0x71))],
    *[
        step
        for index in (0x15, 0x16, 0x17, 0x18, 0x30, 0x31)
        for step in (out(0x70, index), get(0x71))
    ],
    *[
        step
        for index in (0x34, 0x35, 0x5B, 0x5C, 0x5D, 0x5F)
        for step in (out(0x70, index), get(0x71))
    ],
]
BOARD = [
    *[out(0x510, 0, 2), get(0x511), get(0x511), get(0x511), get(0x511), get(0x511)],
    *[out(0x510, 1, 2), get(0x511), out(0x510, 5, 2), get(0x511), get(0x511)],
    *[out(0x510, 0x0F, 2), get(0x511), out(0x510, 3, 2), *[get(0x511)] * 8],
    *[get(0x514, 4), get(0x518, 4)],
    *[out(0xCF8, 0x80000000, 4), get(0xCFC, 4), get(0xCFC, 2), get(0xCFE, 2), get(0xCF8, 4)],
    *[out(0xCF8, 0x8000000A, 4), get(0xCFE, 2), out(0xCF8, 0x80FF0000, 4), get(0xCFC, 4)],
    *[out(0xCF8, 0, 4), get(0xCFC, 4), get(0xE9), get(0x1234), get(0x1234, 2), get(0x1234, 4)],
    *[out(0x64, 0xAA), get(0x60), get(0x92)],
]
LAPIC_REGISTERS = [
    load(LAPIC + 0x20),
    load(LAPIC + 0x30),
    *[store(LAPIC + 0xF0, 0x1FF), load(LAPIC + 0xF0)],
    *[store(LAPIC + 0x80, 0x45), load(LAPIC + 0x80), load(LAPIC + 0xA0)],
    *[store(LAPIC + 0xD0, 0x5A123456), load(LAPIC + 0xD0)],
    *[store(LAPIC + 0xE0, 0x0), load(LAPIC + 0xE0), store(LAPIC + 0xE0, 0xFFFFFFFF)],
    *[store(LAPIC + 0x3E0, 0xB), load(LAPIC + 0x3E0)],
    *[store(LAPIC + 0x320, 0x20041), load(LAPIC + 0x320), load(LAPIC + 0x390)],
    # Interrupts to itself wait, for IF is clear.
    *[store(LAPIC + 0x300, 0x44041), load(LAPIC + 0x220), load(LAPIC + 0x300)],
    *[store(LAPIC + 0x310, 0), store(LAPIC + 0x300, 0x4077), load(LAPIC + 0x230)],
    *[store(LAPIC + 0x300, 0x840B1), load(LAPIC + 0x250), load(LAPIC + 0x1A0)],
    *[store(LAPIC + 0x300, 0xC40C1), load(LAPIC + 0x260)],
]


def entry(pin, low, high=0):
    return [
        *[store(IOAPIC, 0x11 + 2 * pin), store(IOAPIC + 0x10, high)],
        *[store(IOAPIC, 0x10 + 2 * pin), store(IOAPIC + 0x10, low), load(IOAPIC + 0x10)],
    ]


IOAPIC_REGISTERS = [
    *[store(IOAPIC, 1), load(IOAPIC + 0x10), load(IOAPIC)],
    *entry(5, 0xFFFFFFFF, 0xFF000000),
    *[store(LAPIC + 0xF0, 0x1FF), store(LAPIC + 0x80, 0)],
    # The UART's transmitter interrupt by pin 4: an edge, then a level that waits for its EOI.
    *entry(4, 0x00034),
    *[out(0x3F9, 0x02), load(LAPIC + 0x210), out(0x3F9, 0x00)],
    *entry(4, 0x08045),
    *[out(0x3F9, 0x02), load(LAPIC + 0x220), load(LAPIC + 0x1A0), load(IOAPIC + 0x10)],
]
SCRIPTS = {
    "serial": SERIAL,
    "pic": PIC,
    "pit": PIT,
    "rtc": RTC,
    "board": BOARD,
    "lapic": LAPIC_REGISTERS,
    "ioapic": IOAPIC_REGISTERS,
}


# Where QEMU 7.2 is not as the data sheets say, by script and number of the read: (here, QEMU).
KNOWN = {
    "serial": {9: (0xD2, 0xD0)},  # MSR: loopback made DSR fall, which QEMU does not record
    "pit": {
        0: (0x70, 0x30),  # null count
        1: (0xF4, 0x34),  # mode 2 makes OUT high at once
        2: (0xD6, 0x96),  # null count
        3: (0xFF, 0x00),  # the control port drives nothing when read
    },
    "ioapic": {2: (0x1AFFF, 0xFFFFAFFF)},  # reserved bits of an entry
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_reads_the_same_here_and_on_qemu(name, tmp_path):
    script = SCRIPTS[name]
    reads = [step for step in script if step[0] in ("in", "load")]
    ours, theirs = here(script), on_qemu(script, tmp_path)
    assert len(ours) == len(theirs) == len(reads)
    known = KNOWN.get(name, {})
    different = [
        f"read {number} {step}: {mine:#x} here, {their:#x} on QEMU"
        for number, (step, mine, their) in enumerate(zip(reads, ours, theirs, strict=True))
        if mine != their and (mine, their) != known.get(number)
    ]
    assert not different, "\n".join(different)
