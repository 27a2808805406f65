"""The SVM example on our L0 prints what it prints on QEMU."""

from importlib import resources
from pathlib import Path

import pytest

from undervisor.arch.x86.boot import MemoryMap
from undervisor.guest.image import Image
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending

MEMORY = 256 << 20
IMAGE = resources.files("undervisor") / "data" / "examples" / "svm.elf"
EXPECTED = Path(__file__).parents[3] / "examples" / "expected"
PASSED = 1


def run(cpus, append):
    printed = []
    machine = Machine(
        models.named("amd"), memory_size=MEMORY, cpus=cpus, serial=lambda data: printed.append(data)
    )
    placed = Image.parse(IMAGE.read_bytes(), "svm.elf").place(MemoryMap.pc(MEMORY), append=append)
    for gpa, size in placed.clear:
        machine.memory.clear(gpa, size)
    for gpa, data in placed.pieces:
        machine.memory.write(gpa, data)
    machine.boot(placed.boot)
    outcome = machine.run(30)
    return b"".join(printed).decode(), outcome


@pytest.mark.parametrize(
    ("cpus", "append", "recorded"),
    [
        (1, "pages=2m", "svm-1-2m"),
        (2, "pages=4k", "svm-2-4k"),
        (4, "pages=2m", "svm-4-2m"),
        (4, "pages=4k", "svm-4-4k"),
        (4, "pages=1g", "svm-4-1g"),
        (8, "pages=2m", "svm-8-2m"),
        (3, "pages=2m apic=trap", "svm-3-2m-trap"),
        (2, "pages=2m init=sx", "svm-2-2m-init"),
    ],
)
def test_the_example_prints_what_was_recorded(cpus, append, recorded):
    text, outcome = run(cpus, append)
    assert text == (EXPECTED / f"{recorded}.txt").read_text()
    assert outcome.ending is Ending.GUEST
    assert outcome.status == PASSED
