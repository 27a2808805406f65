"""Images: recognise a file by its boot protocol and say what goes where and how it starts.

    image = Image.parse(path.read_bytes(), path.name)
    placement = image.place(MemoryMap.pc(64 << 20), append="verbose", modules=[...])

The protocols are tried in the order of `qemu-system-x86_64 -kernel`: a Linux kernel by its setup
header, then Multiboot, then PVH.  A flat binary says nothing about itself: `Image.raw`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from undervisor.arch.x86.boot import BootMode, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest import elf, linux, multiboot, pvh, raw
from undervisor.guest.placement import Kernel, Machine, Module, Placement

__all__ = ["Image", "Module", "Placement", "Protocol"]

Recognise = Callable[[bytes, str], Kernel | None]
Place = Callable[[Kernel, Machine], Placement]


class Protocol(Enum):
    """How an image expects to be started."""

    LINUX = "Linux, 32-bit entry"
    MULTIBOOT = "Multiboot 1"
    PVH = "PVH"
    RAW16 = "raw, real-address mode"
    RAW32 = "raw, 32-bit"


RECOGNISE: dict[Protocol, Recognise] = {
    # In the order of preference.
    Protocol.LINUX: linux.recognise,
    Protocol.MULTIBOOT: multiboot.recognise,
    Protocol.PVH: pvh.recognise,
}
PLACE: dict[Protocol, Place] = {
    Protocol.LINUX: linux.place,
    Protocol.MULTIBOOT: multiboot.place,
    Protocol.PVH: pvh.place,
    Protocol.RAW16: raw.place_real,
    Protocol.RAW32: raw.place_protected,
}
RAW = {BootMode.REAL: Protocol.RAW16, BootMode.PROTECTED32: Protocol.RAW32}


@dataclass(frozen=True, slots=True)
class Image:
    """A file that was recognised and checked by itself, for no machine in particular yet."""

    protocol: Protocol
    kernel: Kernel
    file: bytes = b""
    """The file itself, for machines that load it by themselves; none of a flat binary."""

    @property
    def name(self) -> str:
        """The file's name as the user gave it."""
        return self.kernel.name

    @classmethod
    def parse(cls, data: bytes, name: str) -> Image:
        """The image in `data`; BadInput where no protocol starts it or its headers are wrong."""
        for protocol, recognise in RECOGNISE.items():
            if kernel := recognise(data, name):
                return cls(protocol, _with_entry_inside(kernel), data)
        if elf.is_elf(data):
            raise BadInput(
                f"{name}: an ELF file with neither a Multiboot header nor a PVH entry note",
                hint="an L1 image needs one of them; user programs do not run here",
            )
        raise BadInput(
            f"{name}: neither Linux, Multiboot nor PVH" if data else f"{name}: the file is empty",
            hint="a flat binary needs to be told its address",
        )

    @classmethod
    def raw(
        cls, data: bytes, name: str, address: int, mode: BootMode, entry: int | None = None
    ) -> Image:
        """The flat binary `data` for `address`, started at `entry` or its first byte."""
        return cls(RAW[mode], _with_entry_inside(raw.kernel(data, name, address, entry)))

    def place(
        self,
        memory: MemoryMap,
        append: str = "",
        modules: Sequence[Module] = (),
        rsdp: int = 0,
    ) -> Placement:
        """The image in a machine with `memory`; BadInput where it does not fit there.

        `append` is the command line, `rsdp` the address of the ACPI root pointer or 0.
        """
        return PLACE[self.protocol](self.kernel, Machine(memory, append, modules, rsdp))


def _with_entry_inside(kernel: Kernel) -> Kernel:
    if not any(segment.gpa <= kernel.entry < segment.end for segment in kernel.segments):
        first = min(segment.gpa for segment in kernel.segments)
        raise BadInput(
            f"{kernel.name}: the entry point {kernel.entry:#x} is in no segment",
            hint=f"the image occupies {first:#x}-{kernel.end:#x}",
        )
    return kernel
