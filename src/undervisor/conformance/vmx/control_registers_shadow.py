"""L2's CR4 read shadow while the L0 is interrupted for reasons that neither L1 nor L2 sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import equal
from undervisor.conformance.lab import together
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.guest.probe.client import Batch

ROUNDS: Final = 100_000
FLUSH_TLB: Final = """
1:  mov %cr4, %rax
    mov %rax, %rcx
    cmp %rbx, %rax
    jne 2f
    btc $7, %rax
    mov %rax, %cr4
    mov %rcx, %cr4
    mov %cr3, %rax
    mov %rax, %cr3
    dec %rdi
    jnz 1b
2:
"""
"""How an operating system flushes all translations; RBX is the CR4 that it must see."""


def _hidden_vmxe(lab: VmxLab) -> tuple[Changes, dict[str, int]]:
    """L1 hides CR4.VMXE from L2; L2's registers for `FLUSH_TLB`."""
    changes: Changes = {F.CR4_GUEST_HOST_MASK: Cr4.vmxe, F.CR4_READ_SHADOW: 0}
    changes |= lab.primary(cr3_load_exiting=0, cr3_store_exiting=0)
    return changes, {"rbx": lab.fields[F.GUEST_CR4] & ~Cr4.vmxe, "rdi": ROUNDS}


def _saw_no_other_cr4(registers: Mapping[str, int]) -> None:
    done = ROUNDS - registers["rdi"]
    equal(f"CR4 as L2 read it in round {done}", registers["rax"] if registers["rdi"] else
          registers["rbx"], registers["rbx"])  # fmt: skip
    equal("the rounds that are left", registers["rdi"], 0)


@guest_test("SDM: Guest/Host Masks and Read Shadows for CR0 and CR4", cpus=2, seconds=60)
def the_cr4_read_shadow_holds_while_another_processor_works(lab: VmxLab) -> None:
    """CR4 reads by mask and shadow in 100,000 rounds, whatever makes the L0 leave L2 meanwhile.

    A second processor is busy all the time, so that the L0 has other work to turn to.
    """
    lab.start_others(2)
    changes, registers = _hidden_vmxe(lab)
    lab.code(FLUSH_TLB)
    flag = lab.places.data
    lab.fill(flag, 8)
    lab.flush()
    batch, busy = Batch(), Batch()
    writes = lab.plan_launch(batch, changes)
    run = lab.plan_entry(batch, registers, resume=False)
    batch.poke(flag, 1)
    other = VmxLab(lab.probe, 1)
    busy.call(lab.assemble("1: inc %rax; pause; cmpl $0, (%rbx); je 1b"), {"rbx": flag}, ["rax"])
    together({lab: batch, other: busy})
    writes.check()
    run.ends()
    _saw_no_other_cr4(run.registers)


VECTOR: Final = 0x91
INTERRUPTS: Final = 20
PERIOD: Final = 200_000
"""Bus cycles between two timer interrupts."""
SPURIOUS, LVT_TIMER, INITIAL_COUNT, DIVIDE, EOI = 0xF0, 0x320, 0x380, 0x3E0, 0xB0
PERIODIC, MASKED, DIVIDE_BY_1, ENABLED = 1 << 17, 1 << 16, 0xB, 0x1FF


@guest_test("SDM: Guest/Host Masks and Read Shadows for CR0 and CR4",
            "SDM: Asynchronous Events")  # fmt: skip
def the_cr4_read_shadow_holds_through_timer_interrupts(lab: VmxLab) -> None:
    """CR4 reads by mask and shadow through interrupts of L1's own timer, each of which exits.

    L1 acknowledges the interrupt and resumes L2 where it was.
    """
    changes, registers = _hidden_vmxe(lab)
    changes = lab.pin(changes, external_interrupt_exiting=1)
    changes = lab.on_exit(changes, acknowledge_interrupt=1)
    with lab.batch() as batch:
        batch.apic_write(SPURIOUS, ENABLED)
        batch.apic_write(DIVIDE, DIVIDE_BY_1)
        batch.apic_write(LVT_TIMER, PERIODIC | VECTOR)
        batch.apic_write(INITIAL_COUNT, PERIOD)
    run = lab.run(FLUSH_TLB, changes, registers | {"rdi": 1 << 62})
    for _ in range(INTERRUPTS):
        run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
        equal("the interrupt", run[F.EXIT_INTERRUPTION_INFORMATION], 1 << 31 | VECTOR)
        lab.l1.apic_write(EOI, 0)
        run = lab.resume(None, run.registers)
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    with lab.batch() as batch:
        batch.apic_write(LVT_TIMER, MASKED)
        batch.apic_write(EOI, 0)
        batch.call("window")  # L1 takes what is still pending
    run = lab.resume({F.GUEST_RIP: lab.places.code}, registers | {"rdi": 1000})
    run.ends()
    equal("CR4 as L2 read it, and the rounds that are left",
          (run.registers["rcx"], run.registers["rdi"]), (registers["rbx"], 0))  # fmt: skip
