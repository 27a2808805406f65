import struct

import pytest

from undervisor.arch.x86.boot import BootMode, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest.image import Image, Module, Protocol

RAM = MemoryMap.pc(64 << 20)
KERNEL = b"\xf4" * 5000


def bzimage(version=0x20F, loadflags=1, setup_sects=2, body=KERNEL, **fields):
    """A file with a setup header as a current kernel's, and no code."""
    setup = bytearray((setup_sects + 1) * 512)
    values = {
        (0x1F1, "B"): setup_sects,
        (0x1FE, "H"): 0xAA55,
        (0x201, "B"): 0x6C,
        (0x202, "4s"): b"HdrS",
        (0x206, "H"): version,
        (0x211, "B"): loadflags,
        (0x22C, "I"): fields.get("initrd_addr_max", 0x7FFFFFFF),
        (0x230, "I"): 0x200000,
        (0x238, "I"): fields.get("cmdline_size", 2047),
        (0x258, "Q"): fields.get("pref_address", 0x1000000),
        (0x260, "I"): fields.get("init_size", 0x1000000),
    }
    for (at, form), value in values.items():
        struct.pack_into("<" + form, setup, at, value)
    return bytes(setup) + body


def placed(image=None, memory=RAM, append="", modules=(), rsdp=0):
    placement = Image.parse(image or bzimage(), "vmlinuz").place(memory, append, modules, rsdp)
    return placement, dict(placement.pieces)


def test_the_setup_header_makes_it_linux():
    assert Image.parse(bzimage(), "vmlinuz").protocol is Protocol.LINUX


def test_linux_goes_before_multiboot():
    header = struct.pack("<3I", 0x1BADB002, 1 << 16, -(0x1BADB002 + (1 << 16)) % 2**32)
    assert Image.parse(bzimage(body=header * 100), "k").protocol is Protocol.LINUX


def test_the_kernel_starts_at_1_mib_with_the_segments_of_the_protocol():
    placement, pieces = placed()
    boot = placement.boot
    assert pieces[0x100000] == KERNEL
    assert (boot.mode, boot.eip, boot.cs, boot.data) == (
        BootMode.PROTECTED32,
        0x100000,
        0x10,
        0x18,
    )
    assert (boot.ebx, boot.ebp, boot.edi) == (0, 0, 0)
    base, limit = boot.gdt
    table = struct.unpack("<4Q", pieces[base])
    assert limit == 31
    assert table[2:] == (0x00CF9B000000FFFF, 0x00CF93000000FFFF)


def test_the_zero_page_holds_the_header_the_command_line_and_the_memory_map():
    placement, pieces = placed(append="console=ttyS0 quiet", rsdp=0xE1234)
    page = pieces[placement.boot.esi]
    assert len(page) == 4096
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x1F1] == 2
    assert page[0x210] == 0xFF
    (line,) = struct.unpack_from("<I", page, 0x228)
    assert pieces[line] == b"console=ttyS0 quiet\0"
    assert struct.unpack_from("<Q", page, 0x70) == (0xE1234,)
    rows = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert rows == [(r.start, r.size, r.kind) for r in RAM.ranges]


def test_a_setup_sects_of_zero_means_four():
    data = bytearray(bzimage(setup_sects=4))
    data[0x1F1] = 0
    assert placed(bytes(data))[1][0x100000] == KERNEL


def test_modules_become_one_initial_ram_disk_at_the_top():
    modules = [Module("one.cpio", b"1" * 4097), Module("two.cpio", b"22")]
    placement, pieces = placed(modules=modules)
    page = pieces[placement.boot.esi]
    at, size = struct.unpack_from("<2I", page, 0x218)
    assert at % 4096 == 0
    assert at + size > (64 << 20) - 4096
    assert pieces[at] == b"1" * 4097 + b"\0\0\0" + b"22\0\0"
    assert size == len(pieces[at])


def test_the_ram_disk_stays_below_the_kernels_limit():
    image = bzimage(initrd_addr_max=0x37FFFFFF)
    placement, pieces = placed(image, MemoryMap.pc(2 << 30), modules=[Module("i", bytes(8192))])
    at, size = struct.unpack_from("<2I", pieces[placement.boot.esi], 0x218)
    assert at + size == 0x38000000


REFUSED = {
    "an old protocol": (bzimage(version=0x203), {}, "boot protocol 2.03"),
    "a kernel loaded low": (bzimage(loadflags=0), {}, "loaded low"),
    "no kernel after the setup": (bzimage(body=b""), {}, "the file ends at 0x600"),
    "a header cut off": (bzimage()[:0x206], {}, "boot protocol 0.00"),
    "too little memory": (bzimage(init_size=0x8000000), {}, "unpacks itself up to 0x9000000"),
    "a command line too long": (bzimage(), {"append": "x" * 2048}, "the kernel takes 2047"),
    "a module with words": (
        bzimage(),
        {"modules": [Module("m", b"m", "words")]},
        "no command line, m has one",
    ),
    "a ram disk without room": (
        bzimage(),
        {"modules": [Module("m", bytes(40 << 20))]},
        "does not fit above 0x2000000",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_start_is_refused_in_one_line(case):
    image, arguments, why = REFUSED[case]
    with pytest.raises(BadInput, match=why) as refusal:
        placed(image, **arguments)
    assert "\n" not in str(refusal.value)


def test_no_header_byte_makes_the_loader_stumble():
    image = bzimage()
    for at in range(0x1F1, 0x264):
        for value in (0, 0x7F, 0xFF):
            data = image[:at] + bytes([value]) + image[at + 1 :]
            try:
                placed(data, append="x", modules=[Module("m", b"m")])
            except BadInput as refusal:
                assert refusal.message.startswith("vmlinuz: ")  # noqa: PT017
