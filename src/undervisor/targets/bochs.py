"""Bochs as a target: an interpreter that has both VMX and SVM.

It starts from a ROM of ours that leads straight into the image, whose bytes it finds in its RAM.
The other way, the ISO image through the BIOS, is for images that need firmware: ACPI tables, INT
services.  It costs a second more for each processor.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from enum import Enum
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Final

from undervisor.errors import BadInput
from undervisor.guest.disk import iso_image
from undervisor.guest.placement import Placement
from undervisor.guest.rom import boot_rom
from undervisor.targets import Abilities, End, How, Job
from undervisor.targets.emulator import EmulatorRunning, Remains
from undervisor.targets.measured import features
from undervisor.targets.process import Program, cause, find

PACKAGES: Final = "bochs bochsbios vgabios"
MODELS: Final = {"intel": "corei7_skylake_x", "amd": "ryzen"}
"""Our names of processors; any other is one of `bochs --help cpu`."""
MOST_CPUS, MOST_MEMORY = 8, 2048 << 20
AT_ONCE: Final = 32
"""The display that nobody looks at takes one of 50 ports of this machine."""
PATIENCE: Final = 5.0
MOST_RAM_FILES: Final = 4
BIOS: Final = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS: Final = Path("/usr/share/bochs/VGABIOS-lgpl-latest")

CONFIGURATION: Final = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy
memory: host={memory}, guest={memory}
cpu: model={model}, count={cpus}, ips=4000000, reset_on_triple_fault=0, ignore_bad_msrs={ignored}
com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}
clock: sync=none, time0=1
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
log: -
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1, iodebug=0
"""
# A byte at 115200 baud takes ips / 11520 instructions: fewer make a quicker line.  The clocks of
# the devices derive from it as well, and a guest's interrupt handlers need room between ticks.


class Firmware(Enum):
    """What leads from the processor's reset to the image."""

    ROM = "a ROM that holds nothing but the way into the image"
    BIOS = "the BIOS of Bochs, which boots the image from a CD"


class BochsTarget:
    """Bochs with a CPU model: "intel", "amd", or one of its own."""

    def __init__(
        self,
        cpu: str = "intel",
        firmware: Firmware = Firmware.ROM,
        *,
        absent_msrs_fault: bool = True,
    ) -> None:
        """BadInput where Bochs or the firmware is not installed, or the name cannot be a model.

        `absent_msrs_fault`: as in a processor.  Bochs lacks MSRs that its CPUID promises, which
        read as zero where this is off.
        """
        self.cpu, self.firmware, self._faults = cpu, firmware, absent_msrs_fault
        self.name = f"bochs ({cpu})"
        self._model = MODELS.get(cpu, cpu)
        if not re.fullmatch(r"[a-z0-9_]+", self._model):
            raise BadInput(f"{cpu!r} is no CPU model", hint="`bochs --help cpu` lists them")
        # Debian's `bochs` is a script around this.
        self._binary = find("bochs-bin" if which("bochs-bin") else "bochs", PACKAGES)
        if firmware is Firmware.BIOS:
            _need_bios()

    @cached_property
    def abilities(self) -> Abilities:
        """What its processors say: a machine is started once to ask them."""
        found = features(self)
        vendors = found & {"vmx", "svm"}
        return Abilities(vendors, MOST_CPUS, found, at_once=AT_ONCE, patience=PATIENCE)

    def start(self, job: Job) -> EmulatorRunning:
        """Start an image."""
        if not 1 <= job.cpus <= MOST_CPUS:
            raise BadInput(f"{job.cpus} processors", hint=f"Bochs gets 1 to {MOST_CPUS} here")
        if job.memory % (1 << 20) or job.memory > MOST_MEMORY:
            raise BadInput(
                f"{job.memory} bytes of memory for Bochs", hint="whole MiB, at most 2048 of them"
            )
        lines, files = _BOOT[self.firmware](job.place())
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        configuration = CONFIGURATION.format(
            memory=job.memory >> 20,
            model=self._model,
            cpus=job.cpus,
            ignored=int(not self._faults),
            port=listener.getsockname()[1],
        )
        files["configuration"] = "\n".join((configuration, *lines, "")).encode()
        files["commands"] = b"c\n"  # the built-in debugger waits for this
        command = [self._binary, "-q", "-rc", "commands", "-f", "configuration"]
        try:
            program = Program(command, files)
        except BaseException:
            listener.close()
            raise
        return EmulatorRunning(program, listener, partial(judge, self._model), listens=True)


def _need_bios() -> None:
    for path in (BIOS, VGA_BIOS):
        if not path.exists():
            raise BadInput(
                f"there is no {path}", hint=f"on Debian and Ubuntu: apt install {PACKAGES}"
            )


# -- the image -----------------------------------------------------------------------------------

Boot = tuple[list[str], dict[str, bytes]]
"""Lines of the configuration and the files that they name."""


def _from_rom(placement: Placement) -> Boot:
    lines, files = ["romimage: file=rom"], {"rom": boot_rom(placement)}
    for number, (gpa, data) in enumerate(gathered(placement.pieces, MOST_RAM_FILES), 1):
        lines.append(f"optramimage{number}: file=ram{number}, address={gpa:#x}")
        files[f"ram{number}"] = data
    return lines, files


def _from_cd(placement: Placement) -> Boot:
    lines = [
        f"romimage: file={BIOS}",
        f"vgaromimage: file={VGA_BIOS}",
        "boot: cdrom",
        "ata0-master: type=cdrom, path=image.iso, status=inserted",
    ]
    return lines, {"image.iso": iso_image(placement)}


_BOOT: Final = {Firmware.ROM: _from_rom, Firmware.BIOS: _from_cd}


def gathered(pieces: Iterable[tuple[int, bytes]], most: int) -> list[tuple[int, bytes]]:
    """The same bytes in at most `most` pieces, joined by zeros over the smallest gaps."""
    left = sorted(pieces)
    while len(left) > most:
        gaps = [
            (after[0] - before[0] - len(before[1]), number)
            for number, (before, after) in enumerate(pairwise(left))
        ]
        gap, at = min(gaps)
        (gpa, data), (_, more) = left[at : at + 2]
        left[at : at + 2] = [(gpa, data + bytes(gap) + more)]
    return left


# -- the end -------------------------------------------------------------------------------------

_PANIC: Final = re.compile(r">>PANIC<< (.*)")
_PANICS: Final = (
    # part of the message, how it ended, what to say
    ("shutdown requested", How.FINISHED, "ended by the guest: shutdown port or reset"),
    ("soft power off", How.FINISHED, "ended by the guest: ACPI power-off"),
    ("exception with no resolution", How.GUEST_DIED, "triple fault"),
    ("VMABORT", How.GUEST_DIED, "VMX abort"),
)
_UNKNOWN_MODEL: Final = "wrong value for parameter 'model'"
_FRAME: Final = ("====", "    ")
"""What lines around messages, and of the banner, begin with."""
_BEGIN: Final = "Next at t=0"
"""What the debugger says before the guest's first instruction."""


def judge(model: str, remains: Remains) -> End:
    """How Bochs ended, from its panic, which is also the way of a regular end."""
    lines = remains.words.rpartition(_BEGIN)[2].splitlines()
    words = "\n".join(line for line in lines if not line.startswith(_FRAME)).strip()
    if _UNKNOWN_MODEL in words:
        text = f"Bochs has no CPU model {model}; `bochs --help cpu` lists them"
        return End(How.TARGET_DIED, text, report=words)
    panics = _PANIC.findall(words)
    if not panics:
        return End(How.TARGET_DIED, f"Bochs {cause(remains.status)}", report=words)
    for part, how, text in _PANICS:
        if part in panics[0]:
            return End(how, text, report="" if how is How.FINISHED else words)
    return End(How.TARGET_DIED, f"Bochs panicked: {panics[0]}", report=words)
