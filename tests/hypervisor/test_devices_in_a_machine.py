"""A guest hears the devices: timer interrupts wake it, and it starts the other processors."""

import pytest

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.guest.asm import assemble
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.models.overrides import named

ORIGIN = 0x100000
CPUS = 4
TICKS, TICK_NS = 20, 1_000_000

# It prints A after 20 ticks of the 8254 through the 8259, B after 20 of the local APIC's timer,
# C when every other processor has started from a trampoline in low memory.
PROGRAM = """
.intel_syntax noprefix
.code32
start:
 cli
 mov esp, 0x80000
 lgdt [gdtr]
 ljmp 8, offset next
next:
 mov ax, 16
 mov ds, ax
 mov es, ax
 mov ss, ax
 # idt entry for 0x20, 0x30
 mov eax, offset tick
 mov word ptr [0x70000+0x20*8], ax
 mov word ptr [0x70000+0x20*8+2], 8
 mov word ptr [0x70000+0x20*8+4], 0x8e00
 shr eax, 16
 mov word ptr [0x70000+0x20*8+6], ax
 mov eax, offset ltick
 mov word ptr [0x70000+0x30*8], ax
 mov word ptr [0x70000+0x30*8+2], 8
 mov word ptr [0x70000+0x30*8+4], 0x8e00
 shr eax, 16
 mov word ptr [0x70000+0x30*8+6], ax
 lidt [idtr]
 mov al, 0x11
 out 0x20, al
 mov al, 0x20
 out 0x21, al
 mov al, 4
 out 0x21, al
 mov al, 1
 out 0x21, al
 mov al, 0xfe
 out 0x21, al
 mov al, 0x34
 out 0x43, al
 mov al, 0xa9
 out 0x40, al
 mov al, 0x04
 out 0x40, al
 xor ebx, ebx
 xor esi, esi
 sti
1: hlt
 cmp ebx, 20
 jb 1b
 mov al, 0xff
 out 0x21, al
 mov al, 'A'
 mov dx, 0x3f8
 out dx, al
 mov dword ptr [0xfee000f0], 0x1ff
 mov dword ptr [0xfee00320], 0x20030
 mov dword ptr [0xfee003e0], 0xb
 mov dword ptr [0xfee00380], 1000000
2: hlt
 cmp esi, 20
 jb 2b
 mov al, 'B'
 mov dx, 0x3f8
 out dx, al
 cli
 # AP trampoline at 0x8000
 mov esi, offset ap
 mov edi, 0x8000
 mov ecx, 64
 rep movsb
 mov dword ptr [0x9000], 0
 mov dword ptr [0xfee00300], 0xc4500
 mov dword ptr [0xfee00300], 0xc4608
 mov dword ptr [0xfee00300], 0xc4608
3: pause
 cmp dword ptr [0x9000], 3
 jne 3b
 mov al, 'C'
 mov dx, 0x3f8
 out dx, al
 cli
 hlt
 9: jmp 9b
tick:
 inc ebx
 mov al, 0x20
 out 0x20, al
 iretd
ltick:
 inc esi
 mov dword ptr [0xfee000b0], 0
 iretd
.code16
ap:
 cli
 xor ax, ax
 mov ds, ax
 lock inc dword ptr [0x9000]
 hlt
 jmp ap
.code32
.align 8
gdt: .quad 0
 .quad 0x00cf9a000000ffff
 .quad 0x00cf92000000ffff
gdtr: .word 23
 .long gdt
idtr: .word 0x7ff
 .long 0x70000
"""


def run(cpu):
    machine_output = []
    machine = Machine(named(cpu), cpus=CPUS, serial=machine_output.append)
    machine.memory.write(ORIGIN, assemble(PROGRAM, ORIGIN).bytes)
    machine.boot(BootState(BootMode.PROTECTED32, ORIGIN))
    outcome = machine.run(timeout=30)
    return machine, b"".join(machine_output), outcome


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_timers_interrupt_and_processors_start(cpu):
    machine, output, _ = run(cpu)
    assert output == b"ABC"
    # Twenty milliseconds by each timer, and little else.
    assert 2 * TICKS * TICK_NS <= machine.now() < 2 * (TICKS + 2) * TICK_NS


def test_a_guest_that_halts_for_ever_is_told_from_one_that_waits():
    _, _, outcome = run("intel")
    assert "cannot come" in outcome.text
