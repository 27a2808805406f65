"""Small L1s from text: in long mode with flat segments, an IDT that logs, and a way to end."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.arch.x86.registers import Gpr
from undervisor.arch.x86.segments import Gate, Segment, SystemType
from undervisor.guest.asm import assemble
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.models.overrides import named
from undervisor.silicon.layout import Env

PML4, PDPT, GDT, IDT, TSS, LOG, DATA, START, STUBS = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x8000, 0xC000, 0x10000, 0x11000,
)  # fmt: skip
CODE, KERNEL_STACK, USER_STACK, IST_STACK = 0x100000, 0x80000, 0x78000, 0x70000
BODY_ROOM = 0x80000
CODE64, STACK, USER32, USER_DATA, USER64, TASK, CODE32 = 8, 0x10, 0x18, 0x20, 0x28, 0x30, 0x40
CR4_PAE, CR4_FX = 0x20, 0x600
EFER = 0x901
ERROR_CODES = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
NAMES = [gpr.name.lower() for gpr in Gpr]


@dataclass(frozen=True)
class Event:
    """What the IDT's default handler saw."""

    vector: int
    error: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    cr2: int

    @property
    def fault(self):
        return (self.vector, self.error)


class Result:
    """A machine after its run."""

    def __init__(self, machine, outcome, labels, output):
        self.machine, self.outcome, self.labels = machine, outcome, labels
        self.output = b"".join(output)
        self.vcpu = machine.vcpus[0]

    def __getattr__(self, name):
        if name in NAMES:
            return self.register(0, NAMES.index(name))
        raise AttributeError(name)

    def register(self, cpu, number):
        vcpu = self.machine.vcpus[cpu]
        if vcpu is self.machine.current:
            return vcpu.state.q[number]
        return struct.unpack_from("<Q", vcpu.parked, Env.REGS + 8 * number)[0]

    def u64(self, gpa):
        return self.machine.memory.u64(gpa)

    def u32(self, gpa):
        return self.machine.memory.u32(gpa)

    @property
    def events(self):
        """Everything that went through the default handlers."""
        count = self.u64(LOG)
        read = self.machine.memory.read
        return [Event(*struct.unpack("<7Q", read(LOG + 64 * (i + 1), 56))) for i in range(count)]

    @property
    def faults(self):
        """`(vector, error code)` of every logged event."""
        return [event.fault for event in self.events]


_START = f"""
.intel_syntax noprefix
.code32
start:
 mov eax, {PML4:#x}
 mov cr3, eax
 mov eax, {CR4_PAE | CR4_FX:#x}
 mov cr4, eax
 mov ecx, 0xc0000080
 mov eax, {EFER:#x}
 xor edx, edx
 wrmsr
 mov eax, 0x80010033
 mov cr0, eax
 lgdt [gdtr]
 lidt [idtr]
 ljmp {CODE64}, offset long
.code64
long:
 mov eax, {STACK}
 mov ds, eax
 mov es, eax
 mov fs, eax
 mov gs, eax
 mov ss, eax
 mov esp, {KERNEL_STACK:#x}
 mov eax, {TASK}
 ltr ax
 xor eax, eax
 xor ecx, ecx
 xor edx, edx
 mov edi, {CODE:#x}
 jmp rdi
gdtr: .word 0x7f
 .quad {GDT:#x}
idtr: .word 0xfff
 .quad {IDT:#x}
"""

_STUBS = (
    ".intel_syntax noprefix\n"
    + "\n".join(
        f".balign 16\n{'' if vector in ERROR_CODES else 'push 0'}\n push {vector}\n jmp common"
        for vector in range(256)
    )
    + f"""
common:
 push rax
 push rbx
 mov rbx, [{LOG:#x}]
 inc qword ptr [{LOG:#x}]
 and ebx, 127
 shl ebx, 6
 add ebx, {LOG + 64:#x}
 mov rax, [rsp+16]
 mov [rbx], rax
 mov rax, [rsp+24]
 mov [rbx+8], rax
 mov rax, [rsp+32]
 mov [rbx+16], rax
 mov rax, [rsp+40]
 mov [rbx+24], rax
 mov rax, [rsp+48]
 mov [rbx+32], rax
 mov rax, [rsp+56]
 mov [rbx+40], rax
 mov rax, cr2
 mov [rbx+48], rax
 pop rbx
 cmp qword ptr [{DATA - 8:#x}], 0
 je end
 mov rax, [{DATA - 8:#x}]
 mov [rsp+24], rax
 pop rax
 add rsp, 16
 iretq
end:
 pop rax
 out 0xf4, al
 hlt
"""
)
RESUME = DATA - 8
"""Where a default handler goes on; 0: it ends the run."""

_CODE_64, _DATA_64 = 0xA9B, 0xC93
_USER = 0x60


def descriptor(attributes, base=0, limit=0xFFFFFFFF):
    return Segment(0, base, limit, attributes).descriptor()


def tables(machine, stubs):
    """Page tables, GDT, IDT and TSS of the long-mode guests."""
    write = machine.memory.write
    write(PML4, struct.pack("<Q", PDPT | 7))
    write(PDPT, b"".join(struct.pack("<Q", i << 30 | 0x87) for i in range(512)))
    task = Segment(0, TSS, 0x6FF, 0x89)
    gdt = [bytes(8), descriptor(_CODE_64), descriptor(_DATA_64), descriptor(0xCFB)]
    gdt += [descriptor(_DATA_64 | _USER), descriptor(_CODE_64 | _USER), task.system_descriptor()]
    gdt += [descriptor(0xC9B), descriptor(0xC93)]
    write(GDT, b"".join(gdt))
    kind = SystemType.INTERRUPT_GATE
    gates = (Gate(CODE64, stubs + 16 * i, kind, 3, present=True) for i in range(256))
    write(IDT, b"".join(gate.descriptor() for gate in gates))
    stacks = struct.pack("<4xQQQ8xQ", KERNEL_STACK - 0x1000, 0, 0, IST_STACK)
    write(TSS, stacks.ljust(102, b"\0") + struct.pack("<H", 104) + b"\xff" * 0x80)


def set_gate(machine, vector, target, *, ist=0, kind=SystemType.INTERRUPT_GATE, present=True):
    gate = Gate(CODE64, target, kind, 3, present=present, ist=ist)
    machine.memory.write(IDT + 16 * vector, gate.descriptor())


def build(cpu="intel", **options):
    """A machine with 16 MiB whose serial output is kept in `machine.output`."""
    output = []
    options.setdefault("memory_size", 16 << 20)
    machine = Machine(named(cpu), serial=output.append, **options)
    machine.output = output
    return machine


def run(text, cpu="intel", *, vectors=None, prepare=None, timeout=20, machine=None, **options):
    """Run 64-bit code of L1 until it falls off its end, or until an exception that it logs.

    `vectors` maps vectors to labels of the text; `prepare(machine, labels)` may change memory.
    """
    machine = machine or build(cpu, **options)
    boot = assemble(_START, START)
    stubs = assemble(_STUBS, STUBS)
    code = assemble(f".intel_syntax noprefix\n{text}\n out 0xf4, al\n hlt", CODE)
    tables(machine, STUBS)
    for part in (boot, stubs, code):
        machine.memory.write(part.origin, part.bytes)
    machine.memory.write(LOG, bytes(0x1000))
    machine.memory.write(RESUME, bytes(8))
    for vector, label in (vectors or {}).items():
        set_gate(machine, vector, code.labels[label])
    if prepare:
        prepare(machine, code.labels)
    machine.boot(BootState(BootMode.PROTECTED32, START))
    outcome = machine.run(timeout)
    return Result(machine, outcome, code.labels, machine.output)


def run32(text, cpu="intel", *, timeout=20, prepare=None, **options):
    """Run 32-bit code with paging off and no IDT; it ends like `run`'s."""
    machine = build(cpu, **options)
    source = f".intel_syntax noprefix\n.code32\n{text}\n out 0xf4, al\n hlt"
    code = assemble(source, CODE)
    machine.memory.write(CODE, code.bytes)
    if prepare:
        prepare(machine, code.labels)
    machine.boot(BootState(BootMode.PROTECTED32, CODE, esp=KERNEL_STACK))
    outcome = machine.run(timeout)
    return Result(machine, outcome, code.labels, machine.output)


def run16(text, cpu="intel", *, timeout=20, prepare=None, **options):
    """Run real-mode code at 0x7c00 with IP there and CS 0."""
    machine = build(cpu, **options)
    source = f".intel_syntax noprefix\n.code16\n{text}\n out 0xf4, al\n hlt"
    code = assemble(source, 0x7C00)
    machine.memory.write(0x7C00, code.bytes)
    if prepare:
        prepare(machine, code.labels)
    machine.boot(BootState(BootMode.REAL, 0x7C00, cs=0, esp=0x7000))
    outcome = machine.run(timeout)
    return Result(machine, outcome, code.labels, machine.output)


TO_USER = f"""
 push {USER_DATA | 3}
 push 0x78000
 push %s
 push {USER64 | 3}
 mov eax, offset user
 push rax
 iretq
user:
"""


def in_ring_3(text, iopl=0, **options):
    """`run`, with the text in ring 3; without IOPL 3 its end is a #GP of the last OUT."""
    return run(TO_USER % hex(0x2 | iopl << 12) + text, **options)
