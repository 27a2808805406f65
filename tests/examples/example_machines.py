"""The shipped images, and the machines of other people that run them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from undervisor.guest.image import Image
from undervisor.targets import How, Job
from undervisor.targets.bochs import BochsTarget, Firmware

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


BOCHS_MODEL = {"vmx": "intel", "svm": "amd"}


def on_bochs(image: Path, vendor: str, cpus: int, words: str) -> str:
    """What the image prints on Bochs, whose BIOS tells it of the processors, until it ends."""
    job = Job(Image.parse(image.read_bytes(), image.name), cpus, MEMORY_MIB << 20, words)
    text, deadline = b"", time.monotonic() + 120
    target = BochsTarget(BOCHS_MODEL[vendor], Firmware.BIOS, absent_msrs_fault=False)
    with target.start(job) as running:
        with contextlib.suppress(EOFError):
            while time.monotonic() < deadline:
                text += running.receive(1)
        end = running.wait(5)
    assert end.how is How.FINISHED, end
    return text.decode()
