"""The shipped images, and the machines of other people that run them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from undervisor.arch.x86.boot import MemoryMap
from undervisor.guest.disk import iso_image
from undervisor.guest.image import Image

SOURCES = Path(__file__).parents[2] / "examples"
EXPECTED = Path(__file__).parent / "expected"
MEMORY_MIB = 256
PASSED, FAILED_CHECK, FAILED_SUPPORT, FAILED_OPTION = 1, 3, 5, 15
"""Exit statuses: (value << 1) | 1 of `enum outcome` in machine.h."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run printed, and its exit status where the machine has one."""

    text: str
    status: int | None
    messages: str = ""


def shipped(vendor: str) -> Path:
    """The prebuilt image that the package carries."""
    return Path(str(resources.files("undervisor") / "data" / "examples" / f"{vendor}.elf"))


def expected(vendor: str, cpus: int, pages: str) -> str:
    """What a machine that does everything right prints.

    Recorded on QEMU (SVM) and Bochs (VMX), except `-init`: neither does what the manual says of an
    INIT, so these two follow from the others and the option's one line.
    """
    return (EXPECTED / f"{vendor}-{cpus}-{pages}.txt").read_text()


def run_group(command: list[str], folder: Path, timeout: float) -> tuple[int, str, str]:
    """Runs a program in a process group of its own, which does not outlive the call."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


def on_qemu(
    image: Path, cpus: int, words: str, folder: Path, cpu: str = "EPYC,+svm", machine: str = "pc"
) -> Outcome:
    """QEMU's TCG as the L0.  It has SVM and no VMX."""
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-smp", str(cpus)]
    command += ["-machine", machine, "-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-kernel", str(image), "-append", words]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]
    status, out, err = run_group(command, folder, 60)
    return Outcome(out, status, err)


BOCHS_MODEL = {"vmx": "corei7_skylake_x", "svm": "ryzen"}
BOCHS = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy
memory: host={memory}, guest={memory}
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model={model}, count={cpus}, ips=20000000, reset_on_triple_fault=0, ignore_bad_msrs=1
boot: cdrom
ata0-master: type=cdrom, path=image.iso, status=inserted
com1: enabled=1, mode=file, dev=serial.txt
clock: sync=none
panic: action=fatal
log: log.txt
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1, iodebug=0
"""


def on_bochs(image: Path, vendor: str, cpus: int, words: str, folder: Path) -> Outcome:
    """Bochs as the L0, from a CD.  It has no exit status; the image must have ended the run."""
    placement = Image.parse(image.read_bytes(), image.name).place(
        MemoryMap.pc(MEMORY_MIB << 20), words
    )
    (folder / "image.iso").write_bytes(iso_image(placement))
    (folder / "configuration").write_text(
        BOCHS.format(memory=MEMORY_MIB, model=BOCHS_MODEL[vendor], cpus=cpus)
    )
    (folder / "commands").write_text("c\n")  # the built-in debugger waits for this
    command = [shutil.which("bochs-bin") or "bochs", "-q"]
    run_group([*command, "-rc", "commands", "-f", "configuration"], folder, 120)
    log = (folder / "log.txt").read_text(errors="replace")
    assert "Shutdown port: shutdown requested" in log, log[-2000:]
    return Outcome((folder / "serial.txt").read_text(), None, log)
