"""The virtual machine monitor that a level runs the next one with: QEMU, as the host has it.

Debian's `qemu-system-x86_64-microvm` is a quarter of the whole one and knows only KVM, so that a
level cannot run emulated by mistake.  Its libraries and firmware go with it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from undervisor.errors import BadInput
from undervisor.guest.newc import Archive

QEMU: Final = "qemu-system-x86_64"
SMALL_QEMU: Final = "qemu-system-x86_64-microvm"
FIRMWARE: Final = ("bios-microvm.bin", "linuxboot_dma.bin", "kvmvapic.bin")
"""What a microvm with a kernel and ACPI loads; the first is the BIOS itself."""
_INSTALL: Final = "on Debian and Ubuntu: apt install qemu-system-x86"
_LIBRARY: Final = re.compile(r"(/\S+\.so\S*)")


def host_qemu() -> Path:
    """The QEMU that runs L1; BadInput where there is none."""
    return _program(QEMU)


def inner_qemu() -> Path:
    """The QEMU that goes into the levels."""
    found = shutil.which(SMALL_QEMU)
    return Path(found) if found else _program(QEMU)


def libraries(program: Path) -> list[Path]:
    """The shared libraries of a program, its loader among them, in the order of their names."""
    said = _output(["ldd", str(program)])
    return sorted({Path(path) for path in _LIBRARY.findall(said)})


def firmware(qemu: Path) -> dict[str, Path]:
    """The firmware files from where this QEMU looks for them."""
    folders = [Path(line) for line in _output([str(qemu), "-L", "help"]).splitlines()]
    found = {}
    for name in FIRMWARE:
        place = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if place is None:
            raise BadInput(f"QEMU's firmware {name} is not installed", hint=_INSTALL)
        found[name] = place.resolve()
    return found


def add_program(archive: Archive, program: Path, path: str = "") -> None:
    """A program with its libraries, each where its loader looks for it."""
    archive.file(path or str(program), program.read_bytes(), program=True)
    for library in libraries(program):
        if str(library) not in archive:
            archive.file(str(library), library.read_bytes(), program=True)


def add_vmm(archive: Archive) -> None:
    """QEMU, under the name that people look for, with its firmware in `/lab/firmware`."""
    program = inner_qemu()
    add_program(archive, program, f"usr/bin/{QEMU}")
    for name, path in firmware(program).items():
        archive.file(f"lab/firmware/{name}", path.read_bytes())


def inputs() -> list[Path]:
    """Every file that `add_vmm` reads."""
    program = inner_qemu()
    return [program, *libraries(program), *firmware(program).values()]


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise BadInput(f"{name} is not installed, or is not in PATH", hint=_INSTALL)
    return Path(found)


def _output(command: list[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"`{' '.join(command)}` failed: {error}") from None
    return ran.stdout
