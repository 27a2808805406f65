import io
import shutil
import struct
import subprocess

import pycdlib
import pytest
from guest_images import BASE, DUMP, multiboot_elf
from test_image_on_qemu import LOW_SIZE, Found

from undervisor.arch.x86.boot import BootMode, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest.disk import disk_image, iso_image
from undervisor.guest.elf_writer import note, write_elf
from undervisor.guest.image import Image, Module
from undervisor.guest.placement import Segment

RAM = MemoryMap.pc(16 << 20)
TAIL = 0x6000
needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"
)
WRITERS = {"disk": disk_image, "cdrom": iso_image}


def placement(append="from disk"):
    modules = [Module("m.bin", bytes(range(256)) * 20)]
    image = Image.parse(multiboot_elf(DUMP, bss=0x1234, tail=TAIL), "k.elf")
    return image.place(RAM, append, modules)


def qemu(folder, medium, data):
    path = folder / "medium"
    path.write_bytes(data)
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-boot", "c" if medium == "disk" else "d"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    command += ["-drive", f"file={path},format=raw,if=ide,media={medium}"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    return result.returncode, result.stdout


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("medium", WRITERS)
def test_a_medium_starts_a_multiboot_image_as_its_placement_says(tmp_path, medium):
    code, dump = qemu(tmp_path, medium, WRITERS[medium](placement()))
    assert code == 1
    found = Found(dump)
    assert found.eax == 0x2BADB002
    assert found.string(found.information[4]) == "k.elf from disk"
    ((start, end, data, words, _),) = found.modules()
    assert (end - start, data, words) == (5120, bytes(range(256)) * 20, "m.bin")


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("medium", WRITERS)
def test_every_byte_of_a_large_image_arrives(tmp_path, medium):
    filler = b"".join(struct.pack("<I", n * 0x9E3779B1 % 2**32) for n in range(50_000))
    end = BASE + 0x10000 + len(filler)
    image = write_elf(
        [
            Segment(
                BASE,
                Image.parse(multiboot_elf(DUMP, tail=0x50000), "k").kernel.segments[0].data,
                0x8000,
            ),
            Segment(BASE + 0x10000, filler, len(filler) + 3),
        ],
        BASE + 12,
    )
    where = Image.parse(image, "k").place(RAM)
    code, dump = qemu(tmp_path, medium, WRITERS[medium](where))
    assert code == 1
    assert end < BASE + 0x50000
    assert dump[8 + LOW_SIZE + 0x10000 :][: len(filler) + 3] == filler + bytes(3)


@pytest.mark.qemu
@needs_qemu
def test_a_real_mode_image_starts_from_a_disk(tmp_path):
    # mov $'R', %al; mov $0x3f8, %dx; out; mov $1, %al; out to the debug exit port; hlt
    program = bytes.fromhex("b052 baf803 ee b001 e6f4 f4")
    where = Image.raw(program, "r", 0x20000, BootMode.REAL).place(RAM)
    assert qemu(tmp_path, "disk", disk_image(where)) == (3, b"R")


def test_an_iso_has_a_boot_entry_without_emulation_for_four_sectors():
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(iso_image(placement())))
    entry = iso.eltorito_boot_catalog.initial_entry
    assert (entry.boot_media_type, entry.sector_count, entry.load_segment) == (0, 4, 0)
    iso.close()


def test_a_disk_is_bootable_and_ends_on_a_cylinder():
    disk = disk_image(placement())
    assert disk[510:512] == b"\x55\xaa"
    assert len(disk) % (16 * 63 * 512) == 0


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_an_image_on_the_loaders_memory_is_refused(writer):
    where = Image.raw(b"\xf4", "r", 0x7C00, BootMode.REAL).place(RAM)
    with pytest.raises(BadInput, match="overlaps the boot loader's memory"):
        writer(where)


def test_more_pieces_than_the_loader_can_hold_are_refused():
    segments = [Segment(BASE + n * 0x1000, b"\xf4", 1) for n in range(200)]
    image = write_elf(segments, BASE, note(b"Xen\0", 18, struct.pack("<I", BASE)))
    with pytest.raises(BadInput, match="pieces, more than fit"):
        disk_image(Image.parse(image, "k").place(RAM))
