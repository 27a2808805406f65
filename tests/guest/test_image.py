import itertools
import random
import struct
import time

import pytest
from guest_images import BASE, DUMP, multiboot_elf, multiboot_flat, pvh_elf

from undervisor.arch.x86.boot import BootMode, BootState, MemoryKind, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest.elf_writer import note, write_elf
from undervisor.guest.image import Image, Module, Protocol
from undervisor.guest.placement import Segment

RAM = MemoryMap.pc(16 << 20)


def memory_of(placement, size=16 << 20):
    memory = bytearray(size)
    for gpa, data in placement.pieces:
        memory[gpa : gpa + len(data)] = data
    return memory


def words(memory, at, form):
    return struct.unpack_from("<" + form, memory, at)


def string(memory, at):
    return bytes(memory[at : memory.index(b"\0", at)]).decode()


# Recognition


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_with_a_multiboot_header_is_multiboot(bits):
    image = Image.parse(multiboot_elf(bits=bits), "k.elf")
    assert image.protocol is Protocol.MULTIBOOT
    assert image.kernel.entry == BASE + 12


def test_a_flat_file_with_address_fields_is_multiboot():
    image = Image.parse(multiboot_flat(), "k")
    (segment,) = image.kernel.segments
    assert (segment.gpa, len(segment.data), segment.size) == (BASE, 48, 0x1000)
    assert image.kernel.entry == BASE + 32


def test_a_load_end_of_zero_means_the_whole_file():
    (segment,) = Image.parse(multiboot_flat(load_end=0) + bytes(100), "k").kernel.segments
    assert len(segment.data) == 148


def test_a_bss_end_of_zero_means_no_bss():
    (segment,) = Image.parse(multiboot_flat(bss_end=0), "k").kernel.segments
    assert segment.size == 48


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("width", [4, 8])
def test_an_elf_with_a_xen_entry_note_is_pvh(bits, width):
    image = Image.parse(pvh_elf(bits, width), "vmlinux")
    assert image.protocol is Protocol.PVH
    assert image.kernel.entry == BASE


def test_multiboot_goes_before_pvh():
    both = multiboot_elf(notes=note(b"Xen\0", 18, struct.pack("<I", BASE + 12)))
    assert Image.parse(both, "k").protocol is Protocol.MULTIBOOT


@pytest.mark.parametrize(("at", "found"), [(0, True), (8140, True), (8144, False), (2, False)])
def test_the_multiboot_header_is_aligned_in_the_first_8_kib(at, found):
    header = multiboot_flat(header=BASE + at)
    data = bytes(at) + header + bytes(16384)
    if found:
        assert Image.parse(data, "k").protocol is Protocol.MULTIBOOT
    else:
        with pytest.raises(BadInput, match="neither Linux, Multiboot nor PVH"):
            Image.parse(data, "k")


def test_a_wrong_checksum_is_no_multiboot_header():
    data = bytearray(multiboot_flat())
    data[8] ^= 1
    with pytest.raises(BadInput, match="neither Linux, Multiboot nor PVH"):
        Image.parse(bytes(data), "k")


def test_a_virtual_entry_point_is_taken_to_its_physical_address():
    data = bytearray(multiboot_elf(bits=64))
    high = 0xFFFFFFFF80000000
    struct.pack_into("<Q", data, 24, high + 12)  # e_entry
    struct.pack_into("<Q", data, 64 + 16, high)  # p_vaddr
    assert Image.parse(bytes(data), "k").kernel.entry == BASE + 12


# Placement


def test_multiboot_registers_and_information():
    image = Image.parse(multiboot_elf(bss=0x2345), "dir/k.elf")
    placement = image.place(RAM, "a b=c")
    boot = placement.boot
    assert (boot.mode, boot.eip, boot.eax) == (BootMode.PROTECTED32, BASE + 12, 0x2BADB002)
    memory = memory_of(placement)
    flags, lower, upper, device, cmdline, count = words(memory, boot.ebx, "6I")
    assert flags == 0b1001001111
    assert (lower, upper, device, count) == (639, 15 << 10, 0x8000FFFF, 0)
    assert string(memory, cmdline) == "dir/k.elf a b=c"
    assert string(memory, words(memory, boot.ebx + 64, "I")[0]) == "undervisor"


def test_multiboot_memory_map_rows_are_the_machines():
    machine = MemoryMap.pc(5 << 30)
    placement = Image.parse(multiboot_elf(), "k").place(machine)
    memory = memory_of(placement)
    length, at = words(memory, placement.boot.ebx + 44, "2I")
    rows = [words(memory, at + i, "IQQI") for i in range(0, length, 24)]
    assert rows == [(20, r.start, r.size, r.kind) for r in machine.ranges]
    assert (20, 1 << 32, 2 << 30, MemoryKind.RAM) in rows


def test_modules_follow_the_kernel_page_aligned_with_their_command_lines():
    modules = [Module("a.bin", b"A" * 5000), Module("b.bin", b"B", "two words")]
    placement = Image.parse(multiboot_elf(bss=0x5000), "k").place(RAM, modules=modules)
    memory = memory_of(placement)
    count, table = words(memory, placement.boot.ebx + 20, "2I")
    assert count == 2
    for row, module in enumerate(modules):
        start, end, line, zero = words(memory, table + 16 * row, "4I")
        assert start % 4096 == 0
        assert start > BASE + 0x5000
        assert memory[start:end] == module.data
        assert zero == 0
        assert string(memory, line) == ("a.bin", "b.bin two words")[row]


def test_a_bss_is_a_range_and_no_bytes():
    size = 700 << 20
    placement = Image.parse(multiboot_elf(bss=size), "k").place(MemoryMap.pc(1 << 30))
    ((gpa, length),) = placement.clear
    assert length == size
    assert gpa + length > BASE + size
    assert sum(len(data) for _, data in placement.pieces) < 4096


def test_the_descriptor_table_has_the_flat_segments_of_the_boot_state():
    boot = Image.parse(multiboot_elf(), "k").place(RAM)
    base, limit = boot.boot.gdt
    table = words(memory_of(boot), base, f"{(limit + 1) // 8}Q")
    assert table[boot.boot.cs // 8] == 0x00CF9B000000FFFF
    assert table[boot.boot.data // 8] == 0x00CF93000000FFFF


def test_pvh_start_information():
    modules = [Module("initrd", b"I" * 5000, "x=y"), Module("other", b"O")]
    placement = Image.parse(pvh_elf(), "vmlinux").place(RAM, "quiet", modules, rsdp=0xE0000)
    memory, boot = memory_of(placement), placement.boot
    magic, version, flags, count, table, cmdline, rsdp, memmap, entries, zero = words(
        memory, boot.ebx, "4I4Q2I"
    )
    assert (magic, version, flags, count, rsdp, zero) == (0x336EC578, 1, 0, 2, 0xE0000, 0)
    assert string(memory, cmdline) == "quiet"
    rows = [words(memory, memmap + 24 * i, "QQII") for i in range(entries)]
    assert rows == [(r.start, r.size, r.kind, 0) for r in RAM.ranges]
    for row, module in enumerate(modules):
        gpa, size, line, zero = words(memory, table + 32 * row, "4Q")
        assert gpa % 4096 == 0
        assert memory[gpa : gpa + size] == module.data
        assert string(memory, line) == module.cmdline


def test_modules_of_pvh_may_lie_on_both_sides_of_a_high_kernel():
    kernel = write_elf(
        [Segment(15 << 20, b"\xf4", 0x1000)], 15 << 20, note(b"Xen\0", 18, b"\0\0\xf0\0"), 64
    )
    modules = [Module("a", bytes(0x80000)), Module("b", bytes(0x80000)), Module("c", bytes(9))]
    placement = Image.parse(kernel, "k").place(RAM, modules=modules)
    starts = [gpa for gpa, data in placement.pieces if len(data) == 0x80000]
    assert starts == [0xF80000, 0xE80000]


def test_a_raw_image_starts_in_real_mode_where_it_was_put():
    image = Image.raw(b"\xf4", "boot.bin", 0x7C00, BootMode.REAL)
    placement = image.place(RAM)
    assert (0x7C00, b"\xf4") in placement.pieces
    assert placement.boot == BootState(BootMode.REAL, 0x7C00, cs=0, data=0, esp=0x7C00)


def test_a_raw_image_starts_in_32_bit_mode_at_its_entry():
    image = Image.raw(bytes(64), "flat.bin", 0x200000, BootMode.PROTECTED32, entry=0x200010)
    boot = image.place(RAM).boot
    assert (boot.mode, boot.eip) == (BootMode.PROTECTED32, 0x200010)


def test_a_raw_image_refuses_a_command_line_that_it_could_not_see():
    image = Image.raw(bytes(64), "flat.bin", 0x200000, BootMode.PROTECTED32)
    with pytest.raises(BadInput, match="neither a command line nor modules"):
        image.place(RAM, "words")


# Hostile files


def patched(data, at, form, *values):
    data = bytearray(data)
    struct.pack_into("<" + form, data, at, *values)
    return bytes(data)


ELF = multiboot_elf()
ROW = 52  # the first program header of an ELF32 file
TWO = write_elf([Segment(BASE, ELF[96:], 0x1000), Segment(BASE + 0x800, b"x", 0x1000)], BASE + 12)
LIES = {
    "empty": (b"", "the file is empty"),
    "a text": (b"#!/bin/sh\n" * 100, "neither Linux, Multiboot nor PVH"),
    "only the magic": (b"\x7fELF", "neither a 32-bit nor a 64-bit"),
    "a header cut off": (ELF[:40] + multiboot_flat()[:0], "ELF header is truncated"),
    "another machine": (patched(ELF, 18, "H", 40), "machine 40"),
    "big-endian": (patched(ELF, 5, "B", 2), "little-endian"),
    "program headers beyond the end": (patched(ELF, 28, "I", len(ELF)), "beyond the file's end"),
    "program headers at the end of memory": (patched(ELF, 28, "I", 2**32 - 1), "beyond the file"),
    "60000 program headers": (patched(ELF, 44, "H", 60000), "60000 program headers"),
    "no program headers": (patched(ELF, 44, "H", 0), "no segment to load"),
    "small program headers": (patched(ELF, 42, "H", 8), "program headers of 8 bytes"),
    "data beyond the end": (patched(ELF, ROW + 4, "I", 0x10000), "beyond the file's end"),
    "more in the file than in memory": (patched(ELF, ROW + 20, "I", 4), "only 0x4 in memory"),
    "a segment that wraps": (patched(ELF, ROW + 20, "I", 2**32 - 1), "wraps around"),
    "an entry point outside": (patched(ELF, 24, "I", 0x500000), "0x500000 is in no segment"),
    "neither header nor note": (write_elf([Segment(BASE, b"\xf4", 1)], BASE), "neither a Multi"),
    "an entry note too short": (
        write_elf([Segment(BASE, b"\xf4", 1)], BASE, note(b"Xen\0", 18, b"\0\0")),
        "holds 2 bytes",
    ),
    "an entry note that points outside": (pvh_elf(entry=0x99), "0x99 is in no segment"),
    "a header address below the load address": (
        multiboot_flat(header=BASE - 4),
        "do not fit a header",
    ),
    "a header address beyond the file": (multiboot_flat(header=BASE + 64), "do not fit a header"),
    "a load end beyond the file": (multiboot_flat(load_end=BASE + 0x1000), "load_end_addr"),
    "a load end below the start": (multiboot_flat(load_end=BASE - 1), "load_end_addr"),
    "a bss end inside the data": (multiboot_flat(bss_end=BASE + 4), "bss_end_addr"),
    "a Multiboot header cut off": (multiboot_flat()[:20], "header at 0x0 is truncated"),
    "a Multiboot header and nothing to load": (
        struct.pack("<3I", 0x1BADB002, 0, -0x1BADB002 % 2**32) + bytes(50),
        "not ELF",
    ),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_file_that_lies_is_refused_in_one_line(lie):
    data, why = LIES[lie]
    with pytest.raises(BadInput, match=why) as refusal:
        Image.parse(data, "evil.elf")
    assert refusal.value.message.startswith("evil.elf: ")
    assert "\n" not in str(refusal.value)


def at_address(gpa, size=0x1000, header_at=0):
    return write_elf([Segment(gpa, multiboot_elf()[96:], size)], gpa + 12)


PLACES = {
    "the video memory": (0xA0000, 0x1000),
    "the BIOS": (0xF0000, 0x1000),
    "the EBDA": (0x9FC00, 0x100),
    "across the video memory": (0x90000, 0x80000),
    "the local APIC": (0xFEE00000, 0x1000),
    "the I/O APIC": (0xFEC00000, 0x1000),
    "the PCI hole": (0xD0000000, 0x1000),
    "beyond RAM": (16 << 20, 0x1000),
    "across the end of RAM": ((16 << 20) - 0x800, 0x1000),
    "more than there is": (0x100000, 1 << 30),
}


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_image_that_is_not_in_ram_is_refused(place):
    image = Image.parse(at_address(*PLACES[place]), "k.elf")
    with pytest.raises(BadInput, match=r"^k.elf: segment 0 at .* is not in RAM"):
        image.place(RAM)


def test_overlapping_segments_are_refused():
    with pytest.raises(BadInput, match="segment 0 at 0x100000-0x101000 overlaps segment 1"):
        Image.parse(TWO, "k").place(RAM)


def pvh_at(gpa, size):
    return write_elf([Segment(gpa, b"\xf4", size)], gpa, note(b"Xen\0", 18, struct.pack("<I", gpa)))


@pytest.mark.parametrize("image", [at_address(0x4000, 0x8000), pvh_at(0x4000, 0x8000)])
def test_boot_information_makes_room_for_a_low_image(image):
    placement = Image.parse(image, "k").place(RAM, "words")
    info = placement.boot.ebx
    assert 0xC000 <= info < 0x9FC00
    memory = memory_of(placement)
    at = 16 if placement.boot.eax else 24
    assert string(memory, words(memory, info + at, "I")[0]).endswith("words")
    base, _ = placement.boot.gdt
    assert words(memory, base + 8, "Q") == (0x00CF9B000000FFFF,)


def test_an_image_that_fills_the_low_memory_is_refused():
    with pytest.raises(BadInput, match="no room in RAM for boot information"):
        Image.parse(pvh_at(0x1000, 0x9EC00), "k").place(RAM)


def test_a_module_that_does_not_fit_is_refused():
    modules = [Module("huge", bytes(17 << 20))]
    for data in (multiboot_elf(), pvh_elf()):
        with pytest.raises(BadInput, match="module huge"):
            Image.parse(data, "k").place(RAM, modules=modules)


def test_a_command_line_that_does_not_fit_is_refused():
    for data in (multiboot_elf(), pvh_elf()):
        with pytest.raises(BadInput):
            Image.parse(data, "k").place(MemoryMap.pc(2 << 20), append="x" * (1 << 20))


@pytest.mark.parametrize("size", [0, 4096, (1 << 20) - 4096, (1 << 20) + 1])
def test_a_machine_without_enough_memory_is_refused(size):
    with pytest.raises(BadInput, match="cannot make a PC"):
        MemoryMap.pc(size)


def corruptions(count):
    """Deterministic damage: bytes changed, cut off, put in, copied over others."""
    rng = random.Random(20)
    sources = [
        ELF,
        multiboot_elf(bits=64),
        pvh_elf(32),
        pvh_elf(64, 8),
        multiboot_flat(),
        multiboot_elf(DUMP, tail=4096),
    ]
    for _ in range(count):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(max(1, min(len(data), rng.choice((64, 160, 1 << 20)))))
            match rng.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    data[at : at + 4] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "little")
                case 2:
                    del data[at:]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
                case 4:
                    data[at : at + 8] = data[: 8 * rng.randint(0, 2)]
        yield bytes(data)


def test_a_thousand_corruptions_give_an_image_or_one_line():
    begin, outcomes = time.process_time(), {"placed": 0, "refused": 0}
    for data in corruptions(1000):
        try:
            placement = Image.parse(data, "c").place(RAM, "x", [Module("m", b"m")])
        except BadInput as refusal:
            outcomes["refused"] += "\n" not in str(refusal)
        else:
            assert all(RAM.is_ram(gpa, gpa + size) for gpa, size in placement.clear)
            outcomes["placed"] += 1
    assert sum(outcomes.values()) == 1000
    assert min(outcomes.values()) >= 50, outcomes
    assert time.process_time() - begin < 10


def test_no_two_parts_of_any_placement_overlap():
    rng, placed = random.Random(5), 0
    for _ in range(400):
        base = rng.choice((0x1000, 0x9000, 0x100000, 0x200000, 0xE00000))
        size = rng.randint(1, 0x8000)
        kernel = Segment(base, multiboot_elf()[96:], max(size, 300))
        data = write_elf([kernel], base + 12, note(b"Xen\0", 18, struct.pack("<I", base)))
        if rng.random() < 0.5:
            data = data.replace(struct.pack("<I", 0x1BADB002), bytes(4))
        modules = [Module(str(n), bytes(rng.randint(0, 0x90000))) for n in range(rng.randint(0, 5))]
        try:
            where = Image.parse(data, "k").place(RAM, "x" * rng.randint(0, 5000), modules)
        except BadInput:
            continue
        placed += 1
        spans = [(gpa, gpa + len(part)) for gpa, part in where.pieces]
        spans = sorted(spans + [(gpa, gpa + size) for gpa, size in where.clear])
        assert all(RAM.is_ram(start, end) for start, end in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert placed > 200
