"""The monitor trap flag, debug exceptions that wait, and NMIs that are unblocked."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import InterruptionType as Type
from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.places import CS64, DS
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.events import NMI, VIRTUAL_NMIS
from undervisor.conformance.vmx.lab import EPT_LEAF, Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, control

MTF: Final = control(PrimaryControls, "monitor_trap_flag")
TRAP: Final = ExitReason.MONITOR_TRAP_FLAG
VALID: Final = 1 << 31
EMULATED: Final = (
    "nop", "mov (%rbx), %rax", "push %rax", "in $0x80, %al", "out %al, $0x80", "rdmsr", "wrmsr",
    "mov %cr0, %rax", "mov %cr4, %rax", "mov %rsi, %cr4", "mov %cr2, %rax", "mov %db0, %rax",
    "rdtsc", "pause", "wbinvd", "invlpg (%rbx)", "clts", "smsw %rax", "sgdt (%rbx)", "sldt %eax",
    "pushfq", "jmp 2f; 2:",
)  # fmt: skip
"""Instructions that do not exit here, many of which an L0 carries out itself."""


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def each_instruction_is_followed_by_an_exit(lab: VmxLab) -> None:
    """With the monitor trap flag an exit is pending behind the first instruction, of any kind."""
    free = lab.primary(
        monitor_trap_flag=1, use_msr_bitmaps=1, use_io_bitmaps=0, unconditional_io_exiting=0,
        rdtsc_exiting=0, pause_exiting=0, invlpg_exiting=0, mov_dr_exiting=0,
    )  # fmt: skip
    lab.fill(lab.places.msr, 0x1000)
    registers = {"rbx": lab.places.data, "rcx": 0x174, "rsi": lab.fields[F.GUEST_CR4]}
    runs = lab.sweep([free] * len(EMULATED), sources=list(EMULATED), registers=registers)
    got = {text: (run.reason, run.rip - run.start, run.qualification)
           for text, run in zip(EMULATED, runs, strict=True)}  # fmt: skip
    each("reason, distance of RIP and qualification behind", dict(got),
         lambda text: (TRAP, len(lab.assemble(text)), 0))  # fmt: skip


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def a_resumed_l2_goes_on_instruction_by_instruction(lab: VmxLab) -> None:
    """Each VMRESUME runs one instruction more, and no time is lost between them."""
    run = lab.run("inc %rbx; inc %rbx; inc %rbx", lab.primary(monitor_trap_flag=1), {"rbx": 0})
    for count in (1, 2, 3):
        run.exits_with(TRAP)
        equal("RBX", run.registers["rbx"], count)
        run = lab.resume(None, run.registers)
    run.exits_with(ExitReason.VMCALL)


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def an_event_that_is_delivered_is_followed_by_the_exit(lab: VmxLab) -> None:
    """Behind an injected event, or a fault, the exit comes before the handler begins."""
    trap = lab.primary(monitor_trap_flag=1)
    injected: Changes = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.HARDWARE_EXCEPTION << 8 | 6}
    run = lab.run("nop; nop", trap | injected)
    run.exits_with(TRAP)
    equal("RIP behind the injection", run.rip, lab.stub(6))
    run = lab.run("ud2", trap)
    run.exits_with(TRAP)
    equal("RIP behind the fault", run.rip, lab.stub(6))


@guest_test("SDM: Monitor Trap Flag", "SDM: EPT Violations", needs=[MTF, EPT])
def the_exit_behind_a_delivery_comes_before_the_handlers_fetch(lab: VmxLab) -> None:
    """Behind an injected event the exit comes before the first fetch of a handler that is absent.

    That fetch is an EPT violation when L2 goes on, and a page fault that exits where L2's own
    tables have no page.
    """
    trap = lab.primary(lab.ept(12), monitor_trap_flag=1) | {F.GUEST_CR3: lab.pages()}
    trap |= {F.EXCEPTION_BITMAP: 1 << 14}
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.HARDWARE_EXCEPTION << 8 | 6}
    handler = lab.stub(6)
    off = lab.primary(trap, monitor_trap_flag=0)[F.PRIMARY_CONTROLS]
    for entry in (lab.nested_entry(handler), lab.pte(handler)):
        there = lab.read_u64(entry)
        lab.write_u64(entry, 0)
        run = lab.run("nop", trap | injected)
        run.exits_with(TRAP)
        equal("RIP behind the injection", run.rip, handler)
        run = lab.resume({F.PRIMARY_CONTROLS: off, F.ENTRY_INTERRUPTION_INFORMATION: 0})
        if entry == lab.pte(handler):
            run.exits_with_exception(14, 0)
        else:
            run.exits_with(ExitReason.EPT_VIOLATION)
        equal("RIP of the fetch", run.rip, handler)
        lab.write_u64(entry, there)


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def a_repeated_string_is_followed_by_the_exit_at_each_iteration(lab: VmxLab) -> None:
    """With REP each iteration is followed by an exit: RCX counts, RIP stays until the last."""
    data = lab.places.data
    registers = {"rcx": 3, "rdi": data, "rax": 0x55}
    run = lab.run("rep stosb; nop", lab.primary(monitor_trap_flag=1), registers)
    for left in (2, 1, 0):
        run.exits_with(TRAP)
        equal("RCX and RIP", (run.registers["rcx"], run.rip - lab.places.code),
              (left, 0 if left else 2))  # fmt: skip
        run = lab.resume(None, run.registers)


@guest_test("SDM: Injection of Pending MTF VM Exits", needs=[MTF])
def an_injected_pending_mtf_exits_before_any_instruction(lab: VmxLab) -> None:
    """Injection of type 7, vector 0 makes an MTF exit pending, whatever the control is."""
    pending: Changes = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.OTHER_EVENT << 8}
    for on in (0, 1):
        run = lab.run("nop; nop", lab.primary(monitor_trap_flag=on) | pending)
        run.exits_with(TRAP)
        equal("RIP", run.rip, lab.places.code)
        equal("the valid bit for the next entry",
              run[F.ENTRY_INTERRUPTION_INFORMATION] & VALID, 0)  # fmt: skip


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def an_instruction_that_exits_does_so_instead(lab: VmxLab) -> None:
    """An instruction that itself exits gives its own exit, and no trap is left behind."""
    run = lab.run("cpuid; nop; nop", lab.primary(monitor_trap_flag=1))
    run.exits_with(ExitReason.CPUID)
    run = lab.skip(run, lab.primary(monitor_trap_flag=0))
    run.exits_with(ExitReason.VMCALL)


# -- debug exceptions that wait --------------------------------------------------------------------

BREAKPOINT: Final = 1 << 12 | 1
"""Pending debug exceptions: a breakpoint that was enabled, number 0."""
LOSE: Final = {
    "an external interrupt": Type.EXTERNAL_INTERRUPT << 8 | 0x55, "an NMI": Type.NMI << 8 | 2,
    "#UD": Type.HARDWARE_EXCEPTION << 8 | 6, "INT 80H": Type.SOFTWARE_INTERRUPT << 8 | 0x80,
}  # fmt: skip


@guest_test("SDM: Delivery of Pending Debug Exceptions after VM Entry", "SDM: Event Injection")
def an_injected_event_takes_the_place_of_pending_debug_exceptions(lab: VmxLab) -> None:
    """Behind an entry that injects an event nothing is pending: its handler runs, and alone."""
    lab.code("nop; nop")
    for name, event in LOSE.items():
        changes: Changes = {
            F.GUEST_PENDING_DEBUG_EXCEPTIONS: BREAKPOINT, F.ENTRY_INSTRUCTION_LENGTH: 2,
            F.ENTRY_INTERRUPTION_INFORMATION: VALID | event, F.GUEST_RFLAGS: 0x202,
        }  # fmt: skip
        run = lab.run(None, changes)
        run.delivers(event & 0xFF)
        pending = run[F.GUEST_PENDING_DEBUG_EXCEPTIONS]
        equal(f"what is pending in the handler of {name}", pending, 0)


@guest_test("SDM: Injection of Pending MTF VM Exits", "SDM: Saving Non-Register State",
            needs=[MTF])  # fmt: skip
def an_injected_trap_exit_keeps_pending_debug_exceptions(lab: VmxLab) -> None:
    """A monitor-trap exit that is injected comes first; the debug exceptions are still pending."""
    lab.code("nop; nop")
    event = VALID | Type.OTHER_EVENT << 8
    pending = {F.GUEST_PENDING_DEBUG_EXCEPTIONS: BREAKPOINT}
    inject = {F.ENTRY_INTERRUPTION_INFORMATION: event}
    run = lab.run(None, inject | pending)
    run.exits_with(TRAP)
    equal("what is pending", run[F.GUEST_PENDING_DEBUG_EXCEPTIONS], BREAKPOINT)
    none = {F.GUEST_PENDING_DEBUG_EXCEPTIONS: 0, F.ENTRY_INTERRUPTION_INFORMATION: 0}
    run = lab.resume(none)
    run.ends()
    equal("what is pending behind an entry without", run[F.GUEST_PENDING_DEBUG_EXCEPTIONS], 0)
    lab.run(None, inject | pending).exits_with(TRAP)
    run = lab.resume(pending | {F.ENTRY_INTERRUPTION_INFORMATION: 0, F.EXCEPTION_BITMAP: 2})
    run.exits_with_exception(1)
    equal("the qualification", run.qualification & 0xF, 1)


# -- NMIs ------------------------------------------------------------------------------------------


@guest_test("SDM: Event Injection", "SDM: Virtual NMIs", needs=[VIRTUAL_NMIS])
def an_injected_nmi_blocks_virtual_nmis_until_iret(lab: VmxLab) -> None:
    """With virtual NMIs, injecting an NMI blocks them in its handler; IRET ends that."""
    virtual = lab.pin(nmi_exiting=1, virtual_nmis=1)
    lab.write(lab.stub(2), lab.assemble("cpuid; iretq"))
    event = VALID | Type.NMI << 8 | 2
    run = lab.run("nop; nop", virtual | {F.ENTRY_INTERRUPTION_INFORMATION: event})
    run.exits_with(ExitReason.CPUID)
    equal("blocking by NMI in the handler", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, NMI)
    run = lab.skip(run)
    run.exits_with(ExitReason.VMCALL)
    equal("blocking by NMI behind IRET", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, 0)


@guest_test("SDM: Information About NMI Unblocking Due to IRET", "SDM: EPT Violations",
            needs=[EPT, VIRTUAL_NMIS])  # fmt: skip
def an_ept_violation_of_iret_tells_that_it_unblocked_nmis(lab: VmxLab) -> None:
    """Bit 12 of the qualification is 1 where IRET had unblocked NMIs when its stack was missing."""
    changes = lab.pin(lab.ept(12), nmi_exiting=1, virtual_nmis=1)
    lab.write_u64(lab.nested_entry(lab.places.data), 0)
    code = "mov $DATA, %esp; iretq"
    for blocked in (0, NMI):
        run = lab.run(code, changes | {F.GUEST_INTERRUPTIBILITY_STATE: blocked})
        run.exits_with(ExitReason.EPT_VIOLATION)
        equal(f"bit 12, blocking {blocked}", run.qualification >> 12 & 1, int(bool(blocked)))
        equal("blocking by NMI afterwards", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, 0)
    run = lab.run("mov DATA, %rax", changes | {F.GUEST_INTERRUPTIBILITY_STATE: NMI})
    run.exits_with(ExitReason.EPT_VIOLATION)
    equal("bit 12 of another instruction", run.qualification >> 12 & 1, 0)


@guest_test("SDM: Information About NMI Unblocking Due to IRET", "SDM: Virtual NMIs",
            needs=[EPT, VIRTUAL_NMIS])  # fmt: skip
def an_iret_that_runs_again_unblocks_nmis(lab: VmxLab) -> None:
    """IRET whose stack was missing runs again, with NMIs blocked by L1, and unblocks them."""
    changes = lab.pin(lab.ept(12), nmi_exiting=1, virtual_nmis=1)
    frame, where = lab.places.data + 0x100, lab.nested_entry(lab.places.data)
    code = f"mov ${frame:#x}, %esp; iretq; 1: nop"
    behind = lab.places.code + len(lab.assemble(code)) - 1
    lab.write_u64(frame, behind, CS64, 2, frame + 0x80, DS)
    lab.write_u64(where, 0)
    run = lab.run(code, changes | {F.GUEST_INTERRUPTIBILITY_STATE: NMI})
    run.exits_with(ExitReason.EPT_VIOLATION)
    lab.write_u64(where, lab.places.data | EPT_LEAF)
    run = lab.resume({F.GUEST_INTERRUPTIBILITY_STATE: NMI})
    run.exits_with(ExitReason.VMCALL)
    true("RIP is behind IRET", run.rip > behind, run.describe())
    equal("blocking by NMI behind IRET", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, 0)


@guest_test("SDM: Information About NMI Unblocking Due to IRET", "SDM: EPT Violations",
            needs=[EPT, VIRTUAL_NMIS])  # fmt: skip
def a_fault_of_what_iret_went_to_is_not_irets(lab: VmxLab) -> None:
    """Where the fetch behind IRET faults, IRET has completed: bit 12 is 0, and NMIs are unblocked.

    So it is for an EPT violation, and for a page fault that exits.
    """
    begin = lab.pin(lab.ept(12), nmi_exiting=1, virtual_nmis=1)
    begin |= {F.GUEST_CR3: lab.pages(), F.GUEST_INTERRUPTIBILITY_STATE: NMI}
    begin |= {F.EXCEPTION_BITMAP: 1 << 14}
    frame, target = lab.places.data + 0x100, lab.places.free
    lab.write_u64(frame, target, CS64, 2, frame + 0x80, DS)
    code = f"mov ${frame:#x}, %esp; iretq"
    lab.write_u64(lab.nested_entry(target), 0)
    run = lab.run(code, begin)
    run.exits_with(ExitReason.EPT_VIOLATION)
    equal("RIP", run.rip, target)
    equal("bit 12 of the qualification", run.qualification >> 12 & 1, 0)
    equal("blocking by NMI", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, 0)
    lab.write_u64(lab.nested_entry(target), target | EPT_LEAF)
    lab.write_u64(lab.pte(target), 0)
    run = lab.run(code, begin)
    run.exits_with_exception(14, 0)
    equal("bit 12 of the information", run[F.EXIT_INTERRUPTION_INFORMATION] >> 12 & 1, 0)
    equal("blocking by NMI", run[F.GUEST_INTERRUPTIBILITY_STATE] & NMI, 0)


# -- what an exit says of an event ---------------------------------------------------------------


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery", needs=[EPT])
def an_exit_outside_of_a_delivery_names_no_event(lab: VmxLab) -> None:
    """Behind an exit that interrupted a delivery, the next has the valid bits of no event."""
    changes = lab.ept(12) | {F.GUEST_RSP: lab.places.data + 0x800}
    where = lab.nested_entry(lab.places.data)
    entry = lab.places.data | 0x37
    lab.write_u64(where, 0)
    event = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.HARDWARE_EXCEPTION << 8 | 6}
    run = lab.run("cpuid", changes | event)
    run.exits_with(ExitReason.EPT_VIOLATION)
    equal("the event that was delivered", run[F.IDT_VECTORING_INFORMATION],
          event[F.ENTRY_INTERRUPTION_INFORMATION])  # fmt: skip
    lab.write_u64(where, entry)
    run = lab.resume({F.ENTRY_INTERRUPTION_INFORMATION: 0})
    run.exits_with(ExitReason.CPUID)
    words = run[F.IDT_VECTORING_INFORMATION], run[F.EXIT_INTERRUPTION_INFORMATION]
    equal("the valid bits behind another exit", [word >> 31 for word in words], [0, 0])
