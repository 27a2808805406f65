"""The same image and arguments given to QEMU's loader and to ours: what the guest finds."""

import shutil
import struct
import subprocess

import pytest
from guest_images import BASE, DUMP, dump_flat, multiboot_elf

from undervisor.arch.x86.boot import MemoryMap
from undervisor.guest.image import Image, Module

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
]
TAIL = 0x6000
LOW, LOW_SIZE = 0x8000, 0x8000


def found_on_qemu(folder, image, append, modules):
    (folder / "k.elf").write_bytes(image)
    for module in modules:
        (folder / module.name).write_bytes(module.data)
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-kernel", "k.elf", "-append", append]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    command += ["-initrd", ",".join(module.words for module in modules)]
    result = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert result.returncode == 1, result.stderr
    return result.stdout


def found_on_ours(image, append, modules):
    placement = Image.parse(image, "k.elf").place(MemoryMap.pc(16 << 20), append, modules)
    memory = bytearray(16 << 20)
    for gpa, data in placement.pieces:
        memory[gpa : gpa + len(data)] = data
    registers = struct.pack("<2I", placement.boot.eax, placement.boot.ebx)
    return registers + memory[LOW : LOW + LOW_SIZE] + memory[BASE : BASE + TAIL]


class Found:
    """What a guest knows at its start: eax, ebx, the information, the strings and modules."""

    def __init__(self, dump):
        assert len(dump) == 8 + LOW_SIZE + TAIL
        self.eax, self.ebx = struct.unpack_from("<2I", dump)
        self.memory = {LOW: dump[8 : 8 + LOW_SIZE], BASE: dump[8 + LOW_SIZE :]}
        self.information = self.words(self.ebx, 22)

    def words(self, at, count):
        return struct.unpack(f"<{count}I", self.bytes(at, 4 * count))

    def bytes(self, at, size):
        base = BASE if at >= BASE else LOW
        assert at + size <= base + len(self.memory[base])
        return self.memory[base][at - base : at - base + size]

    def string(self, at):
        return self.bytes(at, 256).split(b"\0")[0].decode()

    def modules(self):
        count, table = self.information[5:7]
        rows = [self.words(table + 16 * row, 4) for row in range(count)]
        return [(s, e, self.bytes(s, e - s), self.string(line), z) for s, e, line, z in rows]


IMAGES = {
    "ELF": lambda: multiboot_elf(DUMP, bss=0x1234, tail=TAIL),
    "flat": lambda: dump_flat(TAIL),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_guest_finds_the_same_as_on_qemu(tmp_path, kind):
    image = IMAGES[kind]()
    modules = [Module("one.bin", b"first" * 1000), Module("two.bin", b"2", "with words")]
    theirs = Found(found_on_qemu(tmp_path, image, "test=1 verbose", modules))
    ours = Found(found_on_ours(image, "test=1 verbose", modules))
    assert (ours.eax, ours.ebx) == (theirs.eax, theirs.ebx)
    assert ours.modules() == theirs.modules()
    assert len(ours.modules()) == 2
    assert ours.information[0] == theirs.information[0]
    assert ours.information[1] == theirs.information[1]
    # QEMU's firmware keeps the last 128 KiB for its tables, and reports more holes.
    assert ours.information[2] - theirs.information[2] in range(256)
    assert ours.information[3] == theirs.information[3]
    assert ours.information[5:7] == theirs.information[5:7]
    assert ours.information[12] == theirs.information[12]
    assert ours.string(ours.information[4]) == theirs.string(theirs.information[4])
    assert ours.string(ours.information[4]) == "k.elf test=1 verbose"
