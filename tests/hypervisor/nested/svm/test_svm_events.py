"""Events while L2 runs: who gets them, when, and what L1 injects."""

import pytest
from svm_world import CS64, IDT, L2_CODE, LAPIC, World, gate

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor.vcpu import Activity

VECTOR = 0x55
APIC = f"mov ${LAPIC:#x}, %edi; movl $0x1ff, 0xf0(%rdi);"
SELF = f"movl ${0x40000 | VECTOR:#x}, 0x300(%rdi);"
SELF_NMI = "movl $0x40400, 0x300(%rdi);"
VALID = 1 << 31


def l1(before="", after="stgi; nop"):
    """An L1 that prepares something, enters once and lets come what was held off."""
    return f"""
        {APIC}
        clgi
        {before}
        mov $VMCB12, %rax
        vmload %rax
        vmrun %rax
        movzbl SEEN + {VECTOR}, %ebx
        mov %rbx, DATA + 0x80
        {after}
        out %eax, $0xf4
    """


# -- physical interrupts -----------------------------------------------------------------------


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("host_if", [False, True])
@pytest.mark.parametrize("guest_if", [False, True])
def test_the_flag_that_masking_names_decides_about_an_interrupt(masking, host_if, guest_if):
    world = World("nop; nop", wants=[Intercept.INTR], l1=l1(SELF + ("sti" if host_if else "cli")))
    world.vmcb.v_intr_control = VirtualInterrupt.v_intr_masking if masking else 0
    world.vmcb.rflags = 0x202 if guest_if else 2
    world.run()
    exits = host_if if masking else guest_if
    assert world.vmcb.exitcode == (ExitCode.INTR if exits else ExitCode.VMMCALL)
    assert world.data(0x10) == 0, "GIF is clear after #VMEXIT"
    assert world.seen(VECTOR) == host_if, "L1 takes it when it sets GIF"
    if exits:
        assert world.vmcb.rip == L2_CODE


def test_an_interrupt_that_nobody_intercepts_is_l2s():
    world = World("sti; nop; cli", l1=l1(SELF))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.seen(VECTOR) == 1
    assert world.data(0x10) == 1


def test_setting_if_in_l2_opens_the_window_to_l1():
    world = World("nop; sti; nop; at: nop", wants=[Intercept.INTR], l1=l1(SELF))
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR
    assert world.vmcb.rflags & 0x200
    assert L2_CODE + 2 <= world.vmcb.rip <= world.l2.labels["at"]


def test_an_interrupt_arrives_while_l2_computes():
    timer = (
        f"movl $0x{VECTOR:x}, 0x320(%rdi); movl $0xb, 0x3e0(%rdi); movl $20000, 0x380(%rdi); sti"
    )
    world = World("1: jmp 1b", wants=[Intercept.INTR], l1=l1(timer))
    world.vmcb.v_intr_control = VirtualInterrupt.v_intr_masking
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR
    assert world.seen(VECTOR) == 1


def test_an_interrupt_ends_l2s_halt():
    timer = (
        f"movl $0x{VECTOR:x}, 0x320(%rdi); movl $0xb, 0x3e0(%rdi); movl $20000, 0x380(%rdi); sti"
    )
    world = World("hlt; at: nop", wants=[Intercept.INTR], l1=l1(timer))
    world.vmcb.v_intr_control = VirtualInterrupt.v_intr_masking
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.vcpu.activity is Activity.ACTIVE


def test_clgi_in_l2_holds_interrupts_off_until_stgi():
    l2 = f"clgi; {APIC} {SELF} sti; nop; movb SEEN + {VECTOR}, %al; mov %al, DATA; stgi; at: nop"
    world = World(l2, wants=[Intercept.INTR], l1=l1())
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.data() & 0xFF == 0


@pytest.mark.parametrize("wanted", [False, True])
def test_an_nmi_is_an_exit_or_l2s(wanted):
    world = World(f"{APIC} {SELF_NMI} at: nop", wants=[Intercept.NMI] if wanted else [], l1=l1())
    world.run()
    assert world.vmcb.exitcode == (ExitCode.NMI if wanted else ExitCode.VMMCALL)
    assert world.seen(Vector.NMI) == 1, "in L1 after STGI, or in L2"
    if wanted:
        assert world.vmcb.rip == world.l2.labels["at"]


def test_an_nmi_waits_for_gif():
    before = f"{SELF_NMI} movb SEEN + 2, %al; mov %al, DATA;"
    world = World("nop", wants=[Intercept.NMI], l1=l1(before))
    world.run()
    assert world.data() & 0xFF == 0
    assert world.vmcb.exitcode == ExitCode.NMI
    assert world.vmcb.rip == L2_CODE
    assert world.seen(Vector.NMI) == 1


def test_an_smi_is_an_exit_where_l1_wants_it_and_nothing_else():
    smi = "movl $0x40200, 0x300(%rdi);"
    for wants, code in (([Intercept.SMI], ExitCode.SMI), ([], ExitCode.VMMCALL)):
        world = World(f"clgi; {APIC} {smi} stgi; nop", wants=wants, l1=l1())
        world.run()
        assert world.vmcb.exitcode == code


# -- virtual interrupts ------------------------------------------------------------------------


def virtual(priority, tpr=0, *, ignore=False, masking=True, extra=0):
    flags = VirtualInterrupt.v_irq | priority << 16 | tpr | extra
    flags |= VirtualInterrupt.v_ign_tpr if ignore else 0
    return flags | (VirtualInterrupt.v_intr_masking if masking else 0)


@pytest.mark.parametrize(
    ("control", "taken"),
    [
        (virtual(8), True),
        (virtual(8, 7), True),
        (virtual(8, 8), False),
        (virtual(8, 10), False),
        (virtual(0, 15, ignore=True), True),
        (virtual(8, masking=False), True),
        (virtual(8, extra=VirtualInterrupt.v_gif_enable), False),
        (virtual(8, extra=VirtualInterrupt.v_gif_enable | VirtualInterrupt.v_gif), True),
    ],
)
def test_a_virtual_interrupt_needs_priority_and_gif(control, taken):
    world = World("nop; sti; nop; nop; cli")
    world.vmcb.v_intr_control, world.vmcb.v_intr_vector = control, VECTOR
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.seen(VECTOR) == taken
    assert bool(world.vmcb.v_intr_control & VirtualInterrupt.v_irq) != taken


def test_a_virtual_interrupt_that_l1_wants_exits_first_and_stays():
    world = World("nop; sti; nop; at: nop", wants=[Intercept.VINTR])
    world.vmcb.v_intr_control, world.vmcb.v_intr_vector = virtual(8), VECTOR
    world.run()
    assert world.vmcb.exitcode == ExitCode.VINTR
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.vmcb.v_intr_control & VirtualInterrupt.v_irq
    assert world.seen(VECTOR) == 0


def test_a_virtual_interrupt_waits_for_the_shadow_to_end():
    world = World("nop; at: nop")
    world.vmcb.v_intr_control, world.vmcb.v_intr_vector = virtual(8), VECTOR
    world.vmcb.interrupt_shadow, world.vmcb.rflags = 1, 0x202
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.memory.u64(0x28100) == world.l2.labels["at"]
    assert world.vmcb.interrupt_shadow == 0


def test_l2_lowers_its_tpr_and_gets_the_interrupt():
    world = World("sti; mov %cr8, %rax; mov %rax, DATA; xor %eax, %eax; mov %rax, %cr8; at: nop")
    world.vmcb.v_intr_control, world.vmcb.v_intr_vector = virtual(8, 10), VECTOR
    world.run()
    assert world.data() == 10
    assert world.seen(VECTOR) == 1
    assert world.memory.u64(0x28100) == world.l2.labels["at"]
    assert world.vcpu.lapic.cr8 == 0


def test_with_masking_l2s_cr8_is_not_the_processors():
    world = World("mov $9, %eax; mov %rax, %cr8; mov %cr8, %rbx; mov %rbx, DATA")
    world.vmcb.v_intr_control = VirtualInterrupt.v_intr_masking
    world.run()
    assert world.data() == 9
    assert world.vmcb.v_intr_control & 0xFF == 9
    assert world.vcpu.lapic.cr8 == 0


def test_without_masking_cr8_is_the_processors():
    world = World("mov $9, %eax; mov %rax, %cr8; mov %cr8, %rbx; mov %rbx, DATA")
    world.run()
    assert world.data() == 9
    assert world.vcpu.lapic.cr8 == 9


@pytest.mark.parametrize("instruction", ["stgi", "clgi"])
def test_virtual_gif_is_in_the_vmcb(instruction):
    world = World(instruction)
    start = VirtualInterrupt.v_gif if instruction == "clgi" else 0
    world.vmcb.v_intr_control = VirtualInterrupt.v_gif_enable | start
    world.run()
    assert bool(world.vmcb.v_intr_control & VirtualInterrupt.v_gif) == (instruction == "stgi")


def test_virtual_gif_does_not_hold_off_physical_interrupts():
    world = World(f"clgi; {APIC} {SELF} sti; nop", wants=[Intercept.INTR], l1=l1("sti"))
    world.vmcb.v_intr_control = (
        VirtualInterrupt.v_gif_enable | VirtualInterrupt.v_gif | VirtualInterrupt.v_intr_masking
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR


# -- injection ---------------------------------------------------------------------------------


def inject(vector, kind, error=None):
    event = vector | kind << 8 | VALID
    return event if error is None else event | 1 << 11 | error << 32


@pytest.mark.parametrize(
    ("event", "vector"),
    [
        (inject(VECTOR, EventType.EXTERNAL_INTERRUPT), VECTOR),
        (inject(2, EventType.NMI), Vector.NMI),
        (inject(0, EventType.EXCEPTION), Vector.DE),
        (inject(14, EventType.EXCEPTION, 6), Vector.PF),
        (inject(0x80, EventType.SOFTWARE_INTERRUPT), 0x80),
        (inject(3, EventType.EXCEPTION), Vector.BP),
    ],
)
def test_an_injected_event_goes_through_l2s_idt_before_its_first_instruction(event, vector):
    handler = 0x210000
    world = World("nop", wants=[Intercept.INTR, Intercept.EXCP_PF, Intercept.EXCP_BP])
    world.memory.write(handler, b"\x0f\x01\xd9")
    world.memory.write(IDT + 16 * vector, gate(handler))
    world.vmcb.eventinj, world.vmcb.cr2 = event, 0xABC000
    world.run()
    vmcb = world.vmcb
    assert vmcb.exitcode == ExitCode.VMMCALL
    assert vmcb.rip == handler
    assert (vmcb.eventinj, vmcb.exitintinfo) == (0, 0)
    assert vmcb.cr2 == 0xABC000
    frame = vmcb.rsp
    if event >> 11 & 1:
        assert world.memory.u64(frame) == event >> 32
        frame += 8
    assert world.memory.u64(frame) == L2_CODE
    assert world.memory.u64(frame + 8) == CS64


def test_a_software_interrupt_returns_behind_the_instruction_that_nrip_names():
    world = World("int $0x80; next: nop", wants=[Intercept.VMMCALL])
    world.vmcb.eventinj = inject(0x80, EventType.SOFTWARE_INTERRUPT)
    world.vmcb.nrip = world.l2.labels["next"]
    world.run()
    assert world.seen(0x80) == 1
    assert world.vmcb.exitcode == ExitCode.VMMCALL


def test_a_fault_while_an_injected_event_is_delivered_is_in_exitintinfo():
    world = World("nop", wants=[Intercept.EXCP_GP])
    world.memory.write(IDT + 16 * VECTOR, bytes(16))
    world.vmcb.eventinj = inject(VECTOR, EventType.EXTERNAL_INTERRUPT)
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_GP
    assert world.vmcb.exitintinfo == inject(VECTOR, EventType.EXTERNAL_INTERRUPT)
    assert world.vmcb.rip == L2_CODE


def test_an_interrupt_that_waits_comes_before_the_injected_events_handler():
    world = World("nop", wants=[Intercept.INTR], l1=l1(SELF + "sti"))
    handler = 0x210000
    world.memory.write(handler, b"\x0f\x01\xd9")
    world.memory.write(IDT + 16 * 0x80, gate(handler))
    world.vmcb.v_intr_control = VirtualInterrupt.v_intr_masking
    world.vmcb.eventinj = inject(0x80, EventType.EXTERNAL_INTERRUPT)
    world.run()
    assert world.vmcb.exitcode == ExitCode.INTR
    assert world.vmcb.rip == handler
    assert world.vmcb.exitintinfo == 0


# -- INIT --------------------------------------------------------------------------------------

SELF_INIT = "movl $0, 0x310(%rdi); movl $0x4500, 0x300(%rdi);"


def test_an_intercepted_init_is_an_exit_and_stays_pending():
    world = World(f"{APIC} {SELF_INIT} 1: jmp 1b", wants=[Intercept.INIT], l1=l1(after=""))
    world.run()
    assert world.vmcb.exitcode == ExitCode.INIT
    assert world.vcpu.init_pending


def test_a_redirected_init_is_a_security_exception_of_l2():
    world = World(f"{APIC} {SELF_INIT} 1: jmp 1b", wants=[Intercept.EXCP_SX], l1=l1())
    world.vcpu.msrs[Msr.VM_CR] = 2
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_SX
    assert world.vmcb.exitinfo1 == 1
    assert not world.vcpu.init_pending


def test_a_redirected_init_that_nobody_wants_is_delivered():
    world = World(f"{APIC} {SELF_INIT} nop")
    world.vcpu.msrs[Msr.VM_CR] = 2
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.seen(Vector.SX) == 1


def test_a_redirected_init_reaches_l1_as_well():
    world = World("nop", l1=f"{APIC} {SELF_INIT} nop; out %eax, $0xf4")
    world.vcpu.msrs[Msr.VM_CR] = 2
    world.run()
    assert world.seen(Vector.SX) == 1


def test_an_init_waits_for_gif():
    world = World("nop", l1=f"{APIC} clgi; {SELF_INIT} nop; out %eax, $0xf4")
    world.run()
    assert world.vcpu.init_pending
    assert world.vcpu.activity is Activity.ACTIVE


def test_an_init_that_nobody_wants_resets_the_processor_out_of_l2():
    world = World(f"{APIC} {SELF_INIT} 1: jmp 1b", cpus=1)
    reset = []
    world.machine.vcpus[0].reset_by_init = lambda: (
        reset.append(world.vcpu.in_l2) or (world.machine.request_stop())
    )
    world.machine.run(5)
    assert reset == [True]


# -- what the host's own flags do --------------------------------------------------------------


def test_the_hosts_trap_flag_traps_after_the_exit():
    tf = "pushfq; orl $0x100, (%rsp); popfq; at: vmrun %rax; next: nop; out %eax, $0xf4"
    world = World("nop", l1=f"mov $VMCB12, %rax; vmload %rax; {tf}")
    handler = 0x210000
    world.memory.write(handler, b"\xe7\xf4")
    world.memory.write(IDT + 16, gate(handler))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.memory.u64(world.vcpu.state.q[4]) == world.l1.labels["next"]


def test_a_breakpoint_on_vmrun_stops_before_it():
    code = "mov $at, %rbx; mov %rbx, %dr0; mov $0x403, %ebx; mov %rbx, %dr7; at: vmrun %rax"
    world = World("nop", l1=f"mov $VMCB12, %rax; {code}; out %eax, $0xf4")
    handler = 0x210000
    world.memory.write(handler, b"\xe7\xf4")
    world.memory.write(IDT + 16, gate(handler))
    world.run()
    assert world.memory.u64(world.vcpu.state.q[4]) == world.l1.labels["at"]
    assert world.vcpu.state.dr6 & 1


def test_l2s_trap_flag_traps_after_its_first_instruction():
    world = World("nop; at: nop")
    world.vmcb.rflags = 0x102
    world.want(Intercept.EXCP_DB)
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_DB
    assert world.vmcb.rip == world.l2.labels["at"]


def test_the_timestamp_has_both_offsets():
    world = World("rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, DATA", l1=l1())
    world.vmcb.tsc_offset = 1 << 60
    world.run()
    assert world.data() >> 60 == 1
    assert world.vcpu.tsc() >> 60 == 0
