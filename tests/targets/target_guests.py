"""Small guests for targets, and what stands in for an emulator."""

from __future__ import annotations

import stat
import sys
import textwrap
import time
from pathlib import Path

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.image import Image
from undervisor.guest.placement import Segment
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import FREE, program
from undervisor.guest.probe.svm_setup import l2_vmcb, svm_on
from undervisor.guest.probe.vmx_setup import l2_fields, vmx_on
from undervisor.targets import Job

BASE = 0x100000
MEMORY = 32 << 20
HEADER = ".code32\n.long 0x1badb002, 3, -(0x1badb002 + 3)\nstart:\n"
TRIPLE_FAULT = "lidt none; ud2; none: .word 0; .long 0"
RESET = "mov $0xfe, %al; out %al, $0x64; 1: jmp 1b"
DEBUG_EXIT = "mov $0xf4, %dx; mov $4, %al; out %al, %dx"
SHUTDOWN = 'mov $word, %esi; mov $8, %ecx; mov $0x8900, %dx; rep outsb; word: .ascii "Shutdown"'
PRINT = """
    mov $0x3fb, %dx; mov $3, %al; out %al, %dx
    mov $0x3f8, %dx; mov $65, %al; out %al, %dx; mov $10, %al; out %al, %dx
1:  mov $0x3fd, %dx; in %dx, %al; test $0x40, %al; jz 1b
"""
"""Sends "A" and a newline, and waits until they are on the line."""


def job(body, bits=32, **more):
    """A Multiboot image of this text; registers as the specification has them."""
    code = assemble(HEADER + body, BASE)
    segment = Segment(BASE, code.bytes, len(code) + 0x1001)
    elf = write_elf([segment], code.labels["start"], bits=bits)
    return Job(Image.parse(elf, "a test"), memory=MEMORY, **more)


def probe_job(cpus=1):
    return Job(Image.parse(program().elf, "the probe"), cpus, MEMORY)


def probe_on(running, answer_time=20):
    probe = Probe(running, answer_time)
    probe.wait_for_hello()
    return probe


def read_all(running, timeout=20):
    """Everything that the guest sends until its end."""
    data, deadline = b"", time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            data += running.receive(1)
        except EOFError:
            return data
    raise AssertionError(f"still running, after {data[-200:]!r}")


def svm_l2(probe, processor=0):
    """Runs an L2 and gives its exit code and what it computed."""
    page = FREE + 0x20000 + processor * 0x4000
    l1 = svm_on(probe.on(processor), page)
    probe.load(page + 0x1000, bytes(l2_vmcb(l1, page + 0x2000, page + 0x4000)))
    probe.load(page + 0x2000, assemble("lea 1(%rbx), %rcx; vmmcall").bytes)
    batch = Batch()
    run = batch.svm_run(page + 0x1000, {"rbx": 41})
    code = batch.peek(page + 0x1070)
    probe.on(processor).run(batch)
    return code.value, run.value.registers["rcx"]


def vmx_l2(probe, processor=0):
    """Runs an L2 and gives its exit reason and what it computed."""
    page = FREE + 0x20000 + processor * 0x5000
    facts = vmx_on(probe.on(processor), page, page + 0x1000)
    batch = Batch()
    batch.write(page + 0x2000, assemble("lea 1(%rbx), %rcx; vmcall").bytes)
    batch.vmwrites(l2_fields(facts, page + 0x2000, page + 0x3000), page + 0x4000)
    run = batch.vmx_run({"rbx": 41})
    reason = batch.vmread(0x4402)
    probe.on(processor).run(batch)
    assert run.value.result.succeeded, run.value.result
    return reason.value.value, run.value.registers["rcx"]


LINE = """
    import os, socket, sys, time
    words = dict(part.split("=", 1) for a in sys.argv if "," in a for part in a.split(",")
                 if "=" in part and a.startswith("socket,id=line"))
    line = socket.socket(fileno=int(words["fd"]))
"""
"""How a stand-in for QEMU finds its serial line."""


def stand_in(folder: Path, body: str) -> str:
    """A program that is started like QEMU and does what `body` says."""
    path = folder / "qemu-stand-in"
    text = textwrap.dedent(LINE) + textwrap.dedent(body)
    path.write_text(f"#!{sys.executable} -S\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def becomes(claim, timeout=20):
    """Whether `claim()` becomes true; what is killed takes a moment to be gone."""
    deadline = time.monotonic() + timeout
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()
