"""Small guests for the tests of `run`, and how they call the command line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.placement import Segment

BASE = 0x100000
HEADER = ".code32\n.long 0x1badb002, 3, -(0x1badb002 + 3)\nstart:\n"
LIMIT = 60

EXIT = "mov $0xf4, %dx; mov $21, %eax; out %eax, %dx"
SPIN = "1: jmp 1b"
IDLE = "cli; 1: hlt; jmp 1b"
TRIPLE_FAULT = "mov $0x1234abcd, %ecx; lidt none; ud2; none: .word 0; .long 0"
ECHO = """
1:  mov $0x3fd, %dx
    in %dx, %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in %dx, %al
    cmp $0x2e, %al
    je 2f
    out %al, %dx
    jmp 1b
2:  mov $0xf4, %dx
    xor %eax, %eax
    out %eax, %dx
"""


def example(vendor):
    return resources.files("undervisor") / "data" / "examples" / f"{vendor}.elf"


def image(body, base=BASE, bss=0x100):
    """A Multiboot image that executes `body` in 32-bit mode."""
    code = assemble(HEADER + body, base)
    return write_elf([Segment(base, code.bytes, len(code) + bss)], code.labels["start"])


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def message(self):
        """What undervisor itself had to say: one line, without its hint."""
        lines = [line for line in self.err.splitlines() if line.startswith("undervisor: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("undervisor: ")


def command(*words):
    return [sys.executable, "-m", "undervisor", *map(str, words)]


def undervisor(*words, stdin="", timeout=LIMIT, **environment):
    """Run the command line; a traceback is never what it says."""
    done = subprocess.run(
        command(*words),
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)
