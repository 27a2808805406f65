"""The shipped images are what the sources give."""

import os
import shutil
import struct
import subprocess

import pytest
from elftools.elf.elffile import ELFFile
from example_machines import SOURCES, shipped

VENDORS = ("svm", "vmx")
MULTIBOOT_MAGIC = 0x1BADB002
needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, ("gcc", "make", "objcopy"))), reason="no gcc, make or objcopy"
)


def build(folder):
    subprocess.run(
        ["make", "-C", str(SOURCES), "-s", f"BUILD={folder}"],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )
    return {vendor: (folder / f"{vendor}.elf").read_bytes() for vendor in VENDORS}


def toolchain():
    result = subprocess.run(
        ["make", "-C", str(SOURCES), "-s", "toolchain"], check=True, capture_output=True, text=True
    )
    return result.stdout


@needs_compiler
def test_building_again_gives_the_shipped_bytes(tmp_path):
    images = build(tmp_path / "build")
    if toolchain() != (SOURCES / "toolchain.txt").read_text():
        pytest.skip("built, but not compared: the compiler or the linker is another one")
    for vendor in VENDORS:
        assert images[vendor] == shipped(vendor).read_bytes(), f"{vendor}: make install"


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_multiboot_loader_finds_a_sound_header(vendor):
    image = shipped(vendor).read_bytes()
    places = [at for at in range(0, 8192, 4) if image[at : at + 4] == b"\x02\xb0\xad\x1b"]
    assert len(places) == 1
    magic, flags, checksum = struct.unpack_from("<3I", image, places[0])
    assert magic == MULTIBOOT_MAGIC
    assert (magic + flags + checksum) & 0xFFFFFFFF == 0
    assert not flags & 1 << 16, "the ELF header says where to load, not the Multiboot header"


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_image_is_small_stripped_and_loads_at_one_mib(vendor):
    path = shipped(vendor)
    assert path.stat().st_size < 64 << 10
    with path.open("rb") as file:
        elf = ELFFile(file)
        (segment,) = elf.iter_segments("PT_LOAD")
        assert elf.elfclass == 32
        assert elf["e_machine"] == "EM_386"
        assert segment["p_paddr"] == segment["p_vaddr"] == 1 << 20
        assert segment["p_memsz"] > segment["p_filesz"]
        assert segment["p_paddr"] <= elf["e_entry"] < segment["p_paddr"] + segment["p_filesz"]
        assert elf.get_section_by_name(".symtab") is None
        assert elf.get_section_by_name(".note.gnu.build-id") is None


def test_both_vendors_have_the_same_files():
    names = [{path.name for path in (SOURCES / vendor).iterdir()} for vendor in VENDORS]
    assert names[0] == names[1]
