"""Several processors: their start, their own VMX operation, INIT and startup IPIs within it."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import ActivityState
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.lab import Lab, together
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab, Writes
from undervisor.conformance.vmx.needs import misc
from undervisor.conformance.vmx.run import Run
from undervisor.guest.probe.client import Batch
from undervisor.guest.probe.program import Block
from undervisor.guest.probe.vmx_setup import NO_VMCS, host_fields

COUNTS: Final[dict[str, object]] = {f"{n} processors": n for n in (1, 2, 3, 4, 8)}
INIT, STARTUP = 0x4500, 0x4600
VECTOR: Final = 0x42
LOOKS: Final = 200_000
"""How often a processor looks for another's sign before it gives up."""
DELAY: Final = "mov $1000, %ecx; 9: pause; in $0x80, %al; loop 9b; "


def others(lab: VmxLab, total: int) -> list[VmxLab]:
    """The labs of processors 1 to `total - 1`, started and in VMX operation."""
    lab.start_others(total)
    labs = [VmxLab(lab.probe, number) for number in range(1, total)]
    for other in labs:
        other.on(lab)
    return labs


def wait_for(lab: VmxLab, batch: Batch, flag: int) -> None:
    """Add to `batch`: wait until the flag is set, or for long."""
    batch.call(lab.assemble("1: pause; cmpl $0, (%rbx); loope 1b"),
               {"rbx": flag, "rcx": LOOKS}, [])  # fmt: skip


@guest_test("SDM: MP Initialization Protocol Algorithm for MP Systems", "SDM: VM Entries",
            cases=COUNTS, cpus=lambda total: total)  # fmt: skip
def each_processor_runs_its_own_l2_at_once(lab: VmxLab, total: int) -> None:
    """Every processor starts by INIT-SIPI-SIPI and runs an L2 of its own, all at the same time.

    Each L2 waits for all others to be in theirs, and then works with its own memory and registers.
    """
    meeting = lab.places.data
    labs = [lab, *others(lab, total)]
    lab.fill(meeting, 8)
    lab.flush()
    source = f"""
        lock incl {meeting:#x}
    1:  pause
        cmpl ${total}, {meeting:#x}
        jb 1b
        mov $1000, %ecx
    2:  add %rcx, (%rbx)
        loop 2b
        mov (%rbx), %rax
    """
    runs: dict[int, tuple[Writes, Run]] = {}
    batches: dict[Lab, Batch] = {}
    for number, one in enumerate(labs):
        one.code(source)
        one.write_u64(one.places.data + 0x100, number << 32)
        batch = Batch()
        writes = one.plan_launch(batch, one.ept() if one.ept_capability().page_2m else None)
        registers = {"rbx": one.places.data + 0x100, "r15": number}
        runs[number] = writes, one.plan_entry(batch, registers, resume=False)
        batches[one] = batch
    together(batches)
    got = {}
    for number, (writes, run) in runs.items():
        writes.check()
        run.ends()
        got[number] = run.registers["rax"], run.registers["r15"]
    each("what the L2 of a processor has", dict(got), lambda n: (n << 32 | 500500, n))


@guest_test("SDM: VMX Operation", "SDM: Software Use of Virtual-Machine Control Structures", cpus=2)
def vmx_operation_and_the_current_vmcs_are_each_processors_own(lab: VmxLab) -> None:
    """VMXON, VMXOFF and VMPTRLD concern one processor: another stays outside, or keeps its own."""
    lab.start_others(2)
    other = VmxLab(lab.probe, 1)
    outside = other.l1.vmptrst()
    equal("the exception outside VMX operation", outside.fault and outside.fault.vector, 6)
    other.on(lab)
    pointers = other.l1.vmptrst().value.value, lab.l1.vmptrst().value.value
    equal("the current VMCSs", pointers, (other.places.control, lab.places.control))
    other.l1.vmclear(other.places.control)
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    other.l1.vmxoff()
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    equal("the other's pointer before it left", pointers[0] == NO_VMCS, False)


@guest_test("SDM: Software Use of Virtual-Machine Control Structures", cpus=2)
def a_vmcs_migrates_by_vmclear(lab: VmxLab) -> None:
    """A VMCS that one processor has cleared is launched by another, with all its data."""
    (other,) = others(lab, 2)
    run = lab.run("inc %rbx; cpuid", None, {"rbx": 1})
    run.exits_with(ExitReason.CPUID)
    lab.l1.vmclear(lab.places.control)
    fields = [f for f in lab.fields if F(f) in lab.known and "HOST" not in F(f).name]
    with other.batch() as batch:
        loaded = batch.vmptrld(lab.places.control)
        values = batch.vmreads(fields, other.places.scratch)
        theirs: Changes = {**host_fields(other.facts.l1, Block(1)), F.GUEST_RIP: lab.places.code}
        batch.vmwrites(theirs, other.places.scratch)
        entered = batch.vmx_run({"rbx": run.registers["rbx"]})
        reason = batch.vmread(F.EXIT_REASON)
    true("VMPTRLD succeeds", loaded.value.succeeded)
    want = {**lab.fields, F.GUEST_RIP: run.rip}
    each("the field on the other processor", dict(values.value), lambda f: want[f])
    equal("the outcome, reason and RBX there",
          (entered.value.result.succeeded, reason.value.value, entered.value.registers["rbx"]),
          (True, ExitReason.CPUID, 3))  # fmt: skip


# -- INIT and startup IPIs -------------------------------------------------------------------------


@guest_test("SDM: Other Causes of VM Exits", "SDM: Multiple-Processor Initialization", cpus=2)
def init_exits_from_l2_and_changes_nothing(lab: VmxLab) -> None:
    """An INIT signal that reaches a processor in L2 is a VM exit, reason 3.

    The processor is not reset, and L2 goes on when it is resumed.
    """
    (other,) = others(lab, 2)
    flag = lab.places.data
    lab.fill(flag, 8)
    lab.flush()
    other.code(f"mov $7, %ebx; movl $1, {flag:#x}; 1: pause; cmpl $2, {flag:#x}; jne 1b")
    theirs, ours = Batch(), Batch()
    writes = other.plan_launch(theirs, None)
    run = other.plan_entry(theirs, None, resume=False)
    wait_for(lab, ours, flag)
    ours.send_ipi(1, INIT)
    together({lab: ours, other: theirs})
    writes.check()
    run.exits_with(ExitReason.INIT_SIGNAL, qualification=0)
    equal("RBX at the exit", run.registers["rbx"], 7)
    lab.write_u32(flag, 2)
    lab.flush()
    with other.batch() as batch:
        again = other.plan_entry(batch, run.registers, resume=True)
    again.ends()
    equal("RBX at the end", again.registers["rbx"], 7)


@guest_test("SDM: VMX Operation", "SDM: Other Causes of VM Exits", cpus=2)
def init_is_blocked_in_root_operation_until_l2_runs(lab: VmxLab) -> None:
    """In VMX root operation INIT is blocked: the processor goes on, and exits at its next entry.

    A startup IPI meanwhile is ignored.
    """
    (other,) = others(lab, 2)
    with lab.batch() as batch:
        batch.send_ipi(1, INIT)
        batch.send_ipi(1, STARTUP | 8)
    equal("the current VMCS of the other", other.l1.vmptrst().value.value, other.places.control)
    run = other.run("nop; nop")
    run.exits_with(ExitReason.INIT_SIGNAL)
    equal("RIP", run.rip, other.places.code)
    other.resume().ends()


@guest_test("SDM: VMX Operation", "SDM: VMXOFF—Leave VMX Operation", cpus=2)
def a_blocked_init_is_taken_at_vmxoff(lab: VmxLab) -> None:
    """An INIT that was blocked resets the processor when it leaves VMX operation.

    It then waits for a startup IPI, which starts it anew.
    """
    (other,) = others(lab, 2)
    flag = lab.places.data
    lab.fill(flag, 16)
    lab.flush()
    theirs = Batch()
    theirs.poke(flag, 1)
    theirs.vmxoff()
    theirs.poke(flag + 8, 1)
    lab.l1.send_ipi(1, INIT)
    equal("the current VMCS of the other", other.l1.vmptrst().value.value, other.places.control)
    with lab.batch() as batch:
        batch.post(1, theirs)
        wait_for(lab, batch, flag)
        batch.call(lab.assemble(DELAY), {}, [])
        before, behind = batch.peek(flag), batch.peek(flag + 8)
    equal("the signs before and behind VMXOFF", (before.value, behind.value), (1, 0))
    # The probe numbers processors as they arrive: the same one comes as another.
    equal("the processors that have arrived", lab.l1.start_ap(1).value, 3)


@guest_test("SDM: Other Causes of VM Exits", "SDM: Exit Qualification for Start-Up IPIs", cpus=2,
            needs=[misc("activity_wait_for_sipi")])  # fmt: skip
def a_startup_ipi_exits_from_wait_for_sipi(lab: VmxLab) -> None:
    """In the activity state wait-for-SIPI a startup IPI exits, reason 4, with its vector."""
    (other,) = others(lab, 2)
    flag = lab.places.data
    lab.fill(flag, 8)
    lab.flush()
    theirs, ours = Batch(), Batch()
    waiting: Changes = {F.GUEST_ACTIVITY_STATE: ActivityState.WAIT_FOR_SIPI}
    writes = other.plan_launch(theirs, waiting)
    run = other.plan_entry(theirs, None, resume=False)
    theirs.poke(flag, 1)
    # Those that come before the entry are ignored: again until one was taken.
    ours.call(lab.assemble(f"""
        mov $0xfee00000, %r8d; movl $1 << 24, 0x310(%r8)
    1:  movl ${STARTUP | VECTOR}, 0x300(%r8)
        mov $100, %ecx
    2:  pause; loop 2b
        cmpl $0, (%rbx); jne 3f
        dec %rdx; jnz 1b
    3:"""), {"rbx": flag, "rdx": LOOKS}, [])  # fmt: skip
    together({lab: ours, other: theirs})
    writes.check()
    run.exits_with(ExitReason.STARTUP_IPI, qualification=VECTOR)
    equal("activity state and RIP", (run[F.GUEST_ACTIVITY_STATE], run.rip),
          (ActivityState.WAIT_FOR_SIPI, other.places.code))  # fmt: skip


@guest_test("SDM: Other Causes of VM Exits", cpus=2)
def a_startup_ipi_is_ignored_by_an_l2_that_runs(lab: VmxLab) -> None:
    """A startup IPI that reaches an active L2 has no effect, then or later."""
    (other,) = others(lab, 2)
    flag = lab.places.data
    lab.fill(flag, 8)
    lab.flush()
    other.code(f"movl $1, {flag:#x}; 1: pause; cmpl $2, {flag:#x}; jne 1b")
    theirs, ours = Batch(), Batch()
    other.plan_launch(theirs, None)
    run = other.plan_entry(theirs, None, resume=False)
    wait_for(lab, ours, flag)
    ours.send_ipi(1, STARTUP | VECTOR)
    ours.poke(flag, 2)
    together({lab: ours, other: theirs})
    run.ends()


SENDERS: Final[dict[str, object]] = {"from L1": False, "from L2": True}


@guest_test("SDM: MP Initialization Protocol Algorithm for MP Systems", "SDM: Issuing"
            " Interprocessor Interrupts", cases=SENDERS, cpus=2)  # fmt: skip
def a_processor_starts_where_the_startup_ipi_says(lab: VmxLab, nested: bool) -> None:
    """A startup IPI of vector V starts in real mode at V00H:0, whoever sends it.

    L1, or an L2 whose local APIC is L1's own.
    """
    signs = {}
    for vector in (0x09, 0x0A, 0x21):
        page = vector << 12
        start = "mov %cs, %ax; mov %ax, %cs:0x100; mov %sp, %cs:0x102; hlt; jmp ."
        lab.write(page, lab.assemble(f".code16; {start}"))
        lab.write_u32(page + 0x100, 0xEEEEEEEE)
        send = "mov $0xfee00000, %r8d; movl $1 << 24, 0x310(%r8); "
        send += f"movl ${INIT}, 0x300(%r8); {DELAY}"
        send += f"movl ${STARTUP | vector}, 0x300(%r8); {DELAY}" * 2
        if nested:
            run = lab.run(send, lab.primary(unconditional_io_exiting=0, use_io_bitmaps=0))
            run.ends()
        else:
            _ = lab.call(send).value
        signs[vector] = lab.read_u32(page + 0x100) & 0xFFFF
    each("CS of the processor that was started by vector", dict(signs), lambda v: v << 8)
