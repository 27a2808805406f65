"""The conformance tests' lab on an in-process machine, which tests of this folder look into.

lab = Lab()
run = lab.run("mov $5, %eax; cpuid", {F.CR3_TARGET_COUNT: 1})
run.reason, run[F.EXIT_INSTRUCTION_LENGTH], run.registers["rax"]
"""

from __future__ import annotations

import itertools
from array import array

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.boot import MemoryMap
from undervisor.conformance.places import MEMORY, Places
from undervisor.conformance.vmx import run as conformance
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Probe
from undervisor.guest.probe.program import program
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending

PLACES = Places()
VMXON, VMCS, VMCS2, SHADOW = PLACES.region, PLACES.control, PLACES.control2, PLACES.shadow
READ_BITMAP, WRITE_BITMAP = PLACES.read_bitmap, PLACES.write_bitmap
EPTP_LIST, PML = PLACES.eptp_list, PLACES.pml
MSR_LIST, MSR_LIST2 = PLACES.msr_list, PLACES.msr_list2
CODE, STACK, GDT, IDT = PLACES.code, PLACES.stack, PLACES.gdt, PLACES.idt
DATA, FREE = PLACES.data, PLACES.free
PML4, PDPT, PD, EPT, EPT2 = PLACES.pml4, PLACES.pdpt, PLACES.pd, PLACES.nested, PLACES.nested2
VALID = 1 << 31
ACCESSED_DIRTY = 1 << 6  # of the EPTP


class Line:
    """The serial line: the machine runs until the probe waits for what nobody has sent."""

    open = False  # nothing comes while the machine waits

    def __init__(self):
        self.inward, self.outward, self.machine = bytearray(), bytearray(), None

    def poll(self):
        data = bytes(self.inward)
        self.inward.clear()
        if not data:
            self.machine.request_stop()
        return data

    def wait(self, seconds=None):
        return b""

    def send(self, data):
        self.inward += data

    def receive(self, timeout):
        if not self.outward:
            outcome = self.machine.run(timeout)
            assert outcome.ending is Ending.STOPPED, outcome.text
        data = bytes(self.outward)
        self.outward.clear()
        return data


class Run(conformance.Run):
    """What happened as values to compare, beside the demands."""

    __slots__ = ()

    @property
    def reason(self):
        return ExitReason(super().reason)

    @property
    def vector(self):
        """The vector that L2's handler was called for, None where no handler was."""
        return self.vector_of(self.rip) if self.reason is ExitReason.VMCALL else None

    @property
    def intercepted(self):
        """The vector of an exception that exited, None where the exit is another."""
        if self.reason is ExitReason.EXCEPTION_OR_NMI:
            return self[F.EXIT_INTERRUPTION_INFORMATION] & 0xFF
        return None


class Lab(VmxLab):
    """L1 on the first processor of a machine; its memory is read and written at once."""

    def __init__(self, cpu="intel", cpus=1, vmx=True):
        line = Line()
        self.machine = line.machine = Machine(
            models.named(cpu),
            memory_size=MEMORY,
            cpus=cpus,
            serial=line.outward.extend,
            source=line,
        )
        self.memory = self.machine.memory
        self.vcpu = self.machine.vcpus[0]
        placement = Image.parse(program().elf, "probe").place(MemoryMap.pc(MEMORY))
        for gpa, size in placement.clear:
            self.fill(gpa, size)
        for gpa, data in placement.pieces:
            self.write(gpa, data)
        self.machine.boot(placement.boot)
        super().__init__(Probe(line, 5))
        self.probe.wait_for_hello()
        if vmx:
            self.on()

    # All that changes memory, so that nothing waits and the order is that of the calls.

    def write(self, gpa, data):
        self.memory.write(gpa, data)

    def fill(self, gpa, size, byte=0):
        self.write(gpa, bytes([byte]) * size)

    def read(self, gpa, size):
        return self.memory.read(gpa, size)

    def table(self, gpa, count, first, step, apart=8):
        words = array("Q", self.read(gpa, apart * count))
        words[:: apart // 8] = array("Q", itertools.islice(itertools.count(first, step), count))
        self.write(gpa, words.tobytes())

    def ept(self, shift=21, root=0, *, accessed_dirty=False):
        fields = super().ept(shift, root)
        fields[F.EPT_POINTER] |= ACCESSED_DIRTY * accessed_dirty
        return fields

    def plan_entry(self, batch, registers, **more):
        run = super().plan_entry(batch, registers, **more)
        return Run(run.answer, run.reads, run.vector_of, run.start)


def event(vector, kind, *, error_code=False):
    """A VM-entry interruption-information field."""
    return VALID | kind << 8 | vector | error_code << 11
