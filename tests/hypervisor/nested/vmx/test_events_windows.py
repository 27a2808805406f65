"""NMIs, interrupts and their windows while L2 runs, and the states in which it does not run.

SDM 3C "Other Causes of VM Exits", "Interruptibility State", "Activity State".
"""

import pytest
from vmx_lab import CODE, DATA, FREE, IDT, MSR_LIST, VALID, Lab, event

from undervisor.arch.vmx.controls import InterruptionType
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.lab import gate
from undervisor.guest.asm import assemble
from undervisor.hypervisor.vcpu import Activity

IF = {F.GUEST_RFLAGS: 0x202}
STI, MOV_SS, NMI = 1, 2, 8
HLT, SHUTDOWN, WAIT_FOR_SIPI = 1, 2, 3
NMI_INFORMATION = VALID | 2 << 8 | 2
SEND = "mov $0xfee00000, %r8d; movl ${:#x}, 0x300(%r8); "
SEND_NMI, SEND_INIT, SEND_INTERRUPT = (SEND.format(icr) for icr in (0x400, 0x500, 0x40081))
SENT = CODE + len(assemble(SEND_NMI, CODE).bytes)
EOI = "mov $0xfee00000, %r8d; movl $0, 0xb0(%r8); "
HANDLER = CODE + 0x8000


@pytest.fixture(autouse=True)
def _apic(lab):
    """The local APIC is on and empty; L2's handlers count at DATA and return."""
    lapic = lab.vcpu.lapic
    lapic.write(0xF0, 4, 0x1FF)
    lapic.write(0x310, 4, 0)
    before = lab.read(IDT, 4096)
    lab.write(DATA, bytes(64))
    yield
    lab.write(IDT, before)
    lapic.write(0x320, 4, 0x10000)
    for _ in range(4):
        lapic.write(0xB0, 4, 0)
        if lapic.pending() is not None:
            lapic.acknowledge()
    lab.vcpu.nmi_pending, lab.vcpu.nmi_blocked = 0, False


def counting(lab, vector, source="", *, trap=False):
    """L2's handler of `vector` counts at DATA."""
    lab.write(HANDLER, assemble(f"incl {DATA:#x}; {source}; iretq", HANDLER).bytes)
    descriptor = bytearray(gate(HANDLER))
    descriptor[5] |= int(trap)
    lab.write(IDT + 16 * vector, bytes(descriptor))


def controls(lab, *, pin=None, **primary):
    return lab.pin(**(pin or {})) | lab.primary(hlt_exiting=0, **primary)


# -- NMIs ------------------------------------------------------------------------------------------


def test_an_nmi_exits_where_l1_asks_and_is_blocked_behind_it(lab):
    run = lab.run(SEND_NMI + "nop; nop", controls(lab, pin={"nmi_exiting": 1}))
    assert (run.reason, run[F.EXIT_INTERRUPTION_INFORMATION]) == (
        R.EXCEPTION_OR_NMI,
        NMI_INFORMATION,
    )
    assert run.rip == SENT
    assert lab.vcpu.nmi_blocked


def test_an_nmi_that_does_not_exit_goes_to_l2_and_is_blocked_until_iret(lab):
    again = f"cmpl $2, {DATA:#x}; jae 1f; {SEND_NMI} nop; nop; mov {DATA:#x}, %ebx; 1:"
    counting(lab, 2, again)
    run = lab.run(SEND_NMI + "nop; vmcall", controls(lab, pin={"nmi_exiting": 0}))
    assert run.registers["rbx"] == 1  # the second one waited for IRET
    assert (lab.read_u32(DATA), run.reason, run.vector) == (2, R.VMCALL, None)


def test_blocking_by_nmi_is_saved(lab):
    run = lab.run("nop", {F.GUEST_INTERRUPTIBILITY_STATE: NMI})
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == NMI
    assert lab.vcpu.nmi_blocked  # it is the processor's own


def test_injecting_an_nmi_blocks_until_iret(lab):
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(2, InterruptionType.NMI)}
    run = lab.run("nop", injected)
    assert (run.vector, run[F.GUEST_INTERRUPTIBILITY_STATE]) == (2, NMI)
    run = lab.skip(run)
    assert (run.rip, run[F.GUEST_INTERRUPTIBILITY_STATE]) == (CODE + 1, 0)


@pytest.mark.parametrize(
    ("pin", "after"),
    [
        ({"nmi_exiting": 0}, 0),
        ({"nmi_exiting": 1, "virtual_nmis": 0}, NMI),
        ({"nmi_exiting": 1, "virtual_nmis": 1}, 0),
    ],
)
def test_what_iret_unblocks_depends_on_the_controls(lab, pin, after):
    source = "push $0x10; push %rsp; pushfq; push $8; push $1f; iretq; 1: nop"
    fields = controls(lab, pin=pin) | {F.GUEST_INTERRUPTIBILITY_STATE: NMI}
    run = lab.run(source, fields)
    assert (run.vector, run[F.GUEST_INTERRUPTIBILITY_STATE]) == (None, after)


@pytest.mark.parametrize("bitmap", [1 << 13, 0])
def test_an_iret_that_faults_has_unblocked(lab, bitmap):
    """Bit 12 of the interruption information tells L1; in L2 nothing is blocked."""
    source = "push $0x10; push %rsp; pushfq; push $0x7770; push $0; iretq"
    pin = {"nmi_exiting": 1, "virtual_nmis": 1}
    fields = controls(lab, pin=pin) | {F.GUEST_INTERRUPTIBILITY_STATE: NMI}
    run = lab.run(source, fields | {F.EXCEPTION_BITMAP: bitmap})
    if bitmap:
        assert run[F.EXIT_INTERRUPTION_INFORMATION] >> 12 & 1
        assert run[F.EXIT_INTERRUPTION_INFORMATION] & 0xFF == 13
    else:
        assert run.vector == 13
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == 0


def test_an_ept_violation_of_iret_has_unblocked(lab):
    ept = lab.ept(12)
    page = FREE
    lab.write_u64(lab.nested_entry(page), 0)
    pin = lab.pin(nmi_exiting=1, virtual_nmis=1)
    blocked = {F.GUEST_INTERRUPTIBILITY_STATE: NMI, F.GUEST_RSP: page}
    run = lab.run("iretq", ept | pin | blocked)
    assert (run.reason, run.qualification >> 12 & 1) == (R.EPT_VIOLATION, 1)
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == 0


# -- the NMI window --------------------------------------------------------------------------------

VNMI = {"nmi_exiting": 1, "virtual_nmis": 1}


def test_the_nmi_window_opens_at_once(lab):
    run = lab.run("nop", controls(lab, pin=VNMI, nmi_window_exiting=1))
    assert (run.reason, run.rip) == (R.NMI_WINDOW, CODE)


def test_the_nmi_window_opens_behind_a_mov_ss_shadow(lab):
    fields = controls(lab, pin=VNMI, nmi_window_exiting=1)
    run = lab.run("nop; nop", fields | {F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS})
    assert (run.reason, run.rip) == (R.NMI_WINDOW, CODE + 1)


def test_the_nmi_window_opens_behind_an_injected_event(lab):
    fields = controls(lab, pin=VNMI, nmi_window_exiting=1)
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(1, InterruptionType.HARDWARE_EXCEPTION)}
    for state in (0, HLT):
        run = lab.run("nop", fields | injected | {F.GUEST_ACTIVITY_STATE: state})
        assert (run.reason, run.rip) == (R.NMI_WINDOW, lab.stub(1))
        assert run[F.GUEST_ACTIVITY_STATE] == 0


def test_the_nmi_window_opens_behind_iret(lab):
    fields = controls(lab, pin=VNMI, nmi_window_exiting=1)
    source = "push $0x10; push %rsp; pushfq; push $8; push $1f; nop; iretq; nop; 1: nop"
    run = lab.run(source, fields | {F.GUEST_INTERRUPTIBILITY_STATE: NMI})
    assert run.reason is R.NMI_WINDOW
    code = assemble(source, CODE)
    assert run.rip == CODE + len(code.bytes) - 1


@pytest.mark.parametrize("state", [HLT, SHUTDOWN])
def test_the_nmi_window_opens_in_inactive_states(lab, state):
    fields = controls(lab, pin=VNMI, nmi_window_exiting=1)
    run = lab.run("nop", fields | {F.GUEST_ACTIVITY_STATE: state})
    assert (run.reason, run.rip) == (R.NMI_WINDOW, CODE)
    assert run[F.GUEST_ACTIVITY_STATE] == state


# -- interrupts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0x2, 0x202])
@pytest.mark.parametrize("acknowledge", [0, 1])
def test_an_interrupt_exits_whatever_if_is(lab, flags, acknowledge):
    fields = controls(lab, pin={"external_interrupt_exiting": 1})
    fields |= lab.on_exit(acknowledge_interrupt=acknowledge) | {F.GUEST_RFLAGS: flags}
    run = lab.run(SEND_INTERRUPT + "nop; nop", fields)
    assert (run.reason, run.rip) == (R.EXTERNAL_INTERRUPT, SENT)
    information = run[F.EXIT_INTERRUPTION_INFORMATION]
    assert information == (VALID | 0x81 if acknowledge else 0)
    assert (lab.vcpu.lapic.pending() is None) == bool(acknowledge)


def test_an_interrupt_that_does_not_exit_goes_to_l2(lab):
    counting(lab, 0x81, EOI)
    fields = controls(lab, pin={"external_interrupt_exiting": 0}) | IF
    run = lab.run(SEND_INTERRUPT + "nop; nop", fields)
    assert (run.reason, run.vector, lab.read_u32(DATA)) == (R.VMCALL, None, 1)


def test_an_interrupt_wakes_l2_from_hlt(lab):
    counting(lab, 0x81, EOI)
    fields = controls(lab, pin={"external_interrupt_exiting": 0})
    source = SEND_INTERRUPT + "sti; hlt; nop"
    run = lab.run(source, fields)
    assert (run.reason, run.vector, lab.read_u32(DATA)) == (R.VMCALL, None, 1)


def test_an_interrupt_exits_from_hlt(lab):
    """The local APIC's timer wakes it."""
    fields = controls(lab, pin={"external_interrupt_exiting": 1})
    timer = "mov $0xfee00000, %r8d; movl $0xb, 0x3e0(%r8); movl $0x82, 0x320(%r8); "
    timer += "movl $5000, 0x380(%r8); hlt; nop"
    run = lab.run(timer, fields)
    assert (run.reason, run[F.GUEST_ACTIVITY_STATE]) == (R.EXTERNAL_INTERRUPT, HLT)


# -- the interrupt window --------------------------------------------------------------------------


def window(lab):
    return controls(lab, interrupt_window_exiting=1)


def test_the_interrupt_window_opens_at_once_with_if(lab):
    run = lab.run("nop", window(lab) | IF)
    assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, CODE)


@pytest.mark.parametrize("blocking", [STI, MOV_SS])
def test_the_interrupt_window_opens_behind_a_shadow(lab, blocking):
    blocked = {F.GUEST_INTERRUPTIBILITY_STATE: blocking}
    run = lab.run("nop; nop", window(lab) | IF | blocked)
    assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, CODE + 1)
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == 0


def test_only_the_first_sti_has_a_shadow(lab):
    run = lab.run("nop; sti; sti; nop; nop", window(lab))
    assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, CODE + 3)


def test_the_interrupt_window_opens_behind_an_injected_event(lab):
    counting(lab, 1, trap=True)
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(1, InterruptionType.HARDWARE_EXCEPTION)}
    for state in (0, HLT):
        run = lab.run("nop", window(lab) | IF | injected | {F.GUEST_ACTIVITY_STATE: state})
        assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, HANDLER)


def test_an_exception_in_a_shadow_ends_it(lab):
    counting(lab, 6, trap=True)
    run = lab.run("sti; ud2", window(lab))
    assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, HANDLER)


def test_the_interrupt_window_wakes_from_hlt(lab):
    run = lab.run("nop", window(lab) | IF | {F.GUEST_ACTIVITY_STATE: HLT})
    assert (run.reason, run[F.GUEST_ACTIVITY_STATE]) == (R.INTERRUPT_WINDOW, HLT)


@pytest.mark.parametrize(
    ("source", "blocking"), [("sti; cpuid", STI), ("mov %ax, %ss; cpuid", MOV_SS)]
)
def test_a_shadow_is_saved_by_its_cause(lab, source, blocking):
    run = lab.run(source, registers={"rax": 0x10})
    assert (run.reason, run[F.GUEST_INTERRUPTIBILITY_STATE]) == (R.CPUID, blocking)


# -- INIT, SIPI, shutdown --------------------------------------------------------------------------


def test_an_init_exits_and_changes_nothing(lab):
    run = lab.run(SEND_INIT + "nop; nop", controls(lab), {"rbx": 77})
    assert (run.reason, run.rip) == (R.INIT_SIGNAL, SENT)
    assert run.registers["rbx"] == 77
    assert lab.resume({}, run.registers).reason is R.VMCALL


def test_an_init_in_root_operation_exits_at_the_next_entry(lab):
    lab.call(SEND_INIT + "nop; nop")
    assert lab.vcpu.init_pending
    run = lab.run("nop", controls(lab))
    assert (run.reason, run.rip) == (R.INIT_SIGNAL, CODE)
    assert not lab.vcpu.init_pending


def test_an_init_that_was_blocked_is_taken_at_vmxoff():
    lab = Lab()
    lab.call(SEND_INIT + "nop; nop")
    seen = []
    original = lab.vcpu.reset_by_init

    def reset():
        seen.append(lab.vcpu.state.rip)
        original()
        lab.machine.request_stop()
        lab.vcpu.activity = Activity.WAIT_FOR_SIPI

    lab.vcpu.reset_by_init = reset
    with pytest.raises(AssertionError):
        lab.l1.vmxoff()
    assert len(seen) == 1


def test_a_sipi_exits_from_wait_for_sipi_only():
    lab = Lab(cpus=2)
    lapic = lab.vcpu.lapic
    lapic.write(0x310, 4, 0)
    state = {F.GUEST_ACTIVITY_STATE: WAIT_FOR_SIPI}
    vcpu = lab.vcpu

    def later():
        vcpu.sipi(0x42)

    lab.machine.clock.timer(later).arm(lab.machine.now() + 2_000_000)
    run = lab.run("nop", controls(lab) | state)
    assert (run.reason, run.qualification) == (R.STARTUP_IPI, 0x42)
    assert run[F.GUEST_ACTIVITY_STATE] == WAIT_FOR_SIPI
    lab.vcpu.sipi(0x42)
    assert lab.run("nop", controls(lab)).reason is R.VMCALL


def test_a_triple_fault_exits(lab):
    run = lab.run("ud2", {F.GUEST_IDTR_LIMIT: 0})
    assert run.reason is R.TRIPLE_FAULT


# -- priorities ------------------------------------------------------------------------------------


def test_an_nmi_comes_before_the_windows(lab):
    fields = controls(lab, pin=VNMI, interrupt_window_exiting=1, nmi_window_exiting=1) | IF
    first = lab.run("nop", fields)
    assert first.reason is R.NMI_WINDOW
    timer = lab.pin(**VNMI, preemption_timer=1) | {F.PREEMPTION_TIMER_VALUE: 0}
    assert lab.run("nop", fields | timer).reason is R.PREEMPTION_TIMER_EXPIRED


# -- the preemption timer --------------------------------------------------------------------------


def preemption(lab, value, **primary):
    return controls(lab, pin={"preemption_timer": 1}, **primary) | {F.PREEMPTION_TIMER_VALUE: value}


def test_a_timer_of_0_exits_before_any_instruction(lab):
    run = lab.run("nop", preemption(lab, 0))
    assert (run.reason, run.rip) == (R.PREEMPTION_TIMER_EXPIRED, CODE)


def test_a_timer_of_0_exits_behind_an_injected_event(lab):
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(6, InterruptionType.HARDWARE_EXCEPTION)}
    run = lab.run("nop", preemption(lab, 0) | injected)
    assert (run.reason, run.rip) == (R.PREEMPTION_TIMER_EXPIRED, lab.stub(6))


@pytest.mark.parametrize("source", ["1: jmp 1b", "hlt", "1: rdtsc; jmp 1b", "1: pause; jmp 1b"])
def test_the_timer_expires_at_its_rate(lab, source):
    shift = lab.vcpu.model.vmx.misc.preemption_timer_shift
    value = 1_000_000 >> shift
    begin = f"rdtsc; mov %eax, %ebx; mov %edx, %ecx; {source}"
    stored = {F.EXIT_MSR_STORE_ADDRESS: MSR_LIST, F.EXIT_MSR_STORE_COUNT: 1}
    lab.write_u64(MSR_LIST, 0x10)
    run = lab.run(begin, preemption(lab, value) | stored)
    start = run.registers["rbx"] | run.registers["rcx"] << 32
    deadline = (start >> shift) + value << shift
    assert run.reason is R.PREEMPTION_TIMER_EXPIRED
    assert deadline - 3_000 < lab.read_u64(MSR_LIST + 8) < deadline + 3_000


def test_no_time_beyond_the_deadline_is_stored(lab):
    shift = lab.vcpu.model.vmx.misc.preemption_timer_shift
    value = 300_000 >> shift
    source = "rdtsc; mov %eax, %ebx; 1: rdtsc; mov %eax, %ecx; jmp 1b"
    run = lab.run(source, preemption(lab, value))
    deadline = (run.registers["rbx"] >> shift) + value << shift
    assert run.reason is R.PREEMPTION_TIMER_EXPIRED
    assert run.registers["rcx"] < deadline


def test_the_timer_is_saved_on_demand(lab):
    fields = preemption(lab, 100_000)
    run = lab.run("vmcall", fields | lab.on_exit(save_preemption_timer=1))
    assert 99_000 < run[F.PREEMPTION_TIMER_VALUE] < 100_000
    run = lab.run("vmcall", fields | lab.on_exit(save_preemption_timer=0))
    assert run[F.PREEMPTION_TIMER_VALUE] == 100_000
    run = lab.run("1: jmp 1b", preemption(lab, 50) | lab.on_exit(save_preemption_timer=1))
    assert (run.reason, run[F.PREEMPTION_TIMER_VALUE]) == (R.PREEMPTION_TIMER_EXPIRED, 0)


# -- loops of PAUSE --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [("", R.PAUSE), ("mov $100, %ecx; 2: loop 2b;", R.PREEMPTION_TIMER_EXPIRED)],
    ids=["tight", "with work"],
)
def test_only_a_tight_loop_of_pause_exits(lab, between, reason):
    value = 1_000_000 >> lab.vcpu.model.vmx.misc.preemption_timer_shift
    fields = preemption(lab, value, pause_exiting=0) | {F.PLE_GAP: 128, F.PLE_WINDOW: 4096}
    fields = lab.secondary(fields, pause_loop_exiting=1)
    assert lab.run(f"1: pause; {between} jmp 1b", fields).reason is reason
