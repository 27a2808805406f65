"""Debug exceptions of L2: pending ones, what L1 sees of DR6, and what MOV SS holds back.

SDM 3C "Delivery of Pending Debug Exceptions after VM Entry" and "Exit Qualification".
"""

import pytest
from vmx_lab import CODE, DATA, IDT, event

from undervisor.arch.vmx.controls import InterruptionType
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.lab import gate
from undervisor.guest.asm import assemble

B0, B1, B3, BD, BS, ENABLED = 1, 2, 8, 1 << 13, 1 << 14, 1 << 12
TF, MOV_SS, HLT, SHUTDOWN = 1 << 8, 2, 1, 2
DR6 = 0xFFFF0FF0
WANT_DB = {F.EXCEPTION_BITMAP: 1 << 1}
STEPPING = {F.GUEST_RFLAGS: 2 | TF}


def dr6(lab, value=None):
    """L1's DR6, which no transition switches."""
    if value is not None:
        lab.call("mov %rax, %db6", {"rax": value})
    return lab.call("mov %db6, %rax", {}, ["rax"]).value["rax"]


def test_a_pending_breakpoint_is_delivered_before_any_instruction(lab):
    dr6(lab, DR6)
    run = lab.run("nop", {F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B1})
    assert (run.vector, run[F.GUEST_PENDING_DEBUG_EXCEPTIONS]) == (1, 0)
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE
    assert dr6(lab) == DR6 | B1


def test_a_pending_breakpoint_that_l1_wants_exits_and_leaves_dr6(lab):
    dr6(lab, DR6 | B3)
    run = lab.run("nop", WANT_DB | {F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B1})
    assert (run.intercepted, run.qualification, run.rip) == (1, B1, CODE)
    assert run[F.GUEST_PENDING_DEBUG_EXCEPTIONS] == 0
    assert dr6(lab) == DR6 | B3


def test_breakpoints_that_are_not_enabled_are_not_delivered(lab):
    run = lab.run("nop", {F.GUEST_PENDING_DEBUG_EXCEPTIONS: B1})
    assert (run.reason, run.vector) == (R.VMCALL, None)


@pytest.mark.parametrize("state", [0, HLT])
def test_a_pending_single_step_is_delivered_in_hlt_too(lab, state):
    pending = {F.GUEST_PENDING_DEBUG_EXCEPTIONS: BS, F.GUEST_ACTIVITY_STATE: state}
    run = lab.run("nop", pending | STEPPING)
    assert (run.vector, run[F.GUEST_ACTIVITY_STATE]) == (1, 0)
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE


def test_an_injected_exception_loses_them(lab):
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(6, InterruptionType.HARDWARE_EXCEPTION)}
    run = lab.run("nop", injected | {F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B1})
    assert (run.vector, run[F.GUEST_PENDING_DEBUG_EXCEPTIONS]) == (6, 0)
    assert run.rip == lab.stub(6)


@pytest.mark.parametrize("source", ["nop", "wbinvd", "rdtsc"])
@pytest.mark.parametrize("stale", [0, BS | B3 | B1 | BD])
def test_a_single_step_qualifies_without_stale_bits_and_leaves_dr6(lab, source, stale):
    dr6(lab, DR6 | stale)
    run = lab.run(f"{source}; nop; nop", WANT_DB | STEPPING)
    assert (run.intercepted, run.qualification) == (1, BS)
    assert run.rip == CODE + {"nop": 1, "wbinvd": 2, "rdtsc": 2}[source]
    assert dr6(lab) == DR6 | stale
    dr6(lab, DR6)


@pytest.mark.parametrize("source", ["nop", "wbinvd"])
def test_mov_ss_holds_them_back_to_join_the_next(lab, source):
    dr6(lab, DR6 | B3)
    held = {
        F.GUEST_PENDING_DEBUG_EXCEPTIONS: BS | ENABLED | B0,
        F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS,
    }
    length = 1 if source == "nop" else 2
    run = lab.run(f"{source}; nop; nop", WANT_DB | STEPPING | held)
    assert (run.intercepted, run.qualification) == (1, BS | B0)
    assert (run.rip, run[F.GUEST_PENDING_DEBUG_EXCEPTIONS]) == (CODE + length, 0)
    assert dr6(lab) == DR6 | B3
    dr6(lab, DR6)  # a delivered single step may clear other bits
    run = lab.run(f"{source}; nop; nop", STEPPING | held)
    assert run.vector == 1
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + length
    assert dr6(lab) == DR6 | BS | B0
    dr6(lab, DR6)


def test_mov_ss_holds_a_breakpoint_back_for_one_instruction(lab):
    held = {
        F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B0,
        F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS,
    }
    run = lab.run("nop; nop", held)
    assert run.vector == 1
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 1


def test_an_access_under_general_detect_exits_with_gd_as_it_was(lab):
    dr6(lab, DR6)
    run = lab.run(
        "mov %db0, %rax",
        WANT_DB
        | {F.GUEST_DR7: 0x400 | 1 << 13}
        | lab.on_entry(load_debug_controls=1)
        | lab.on_exit(save_debug_controls=1),
    )
    assert (run.intercepted, run.qualification, run.rip) == (1, BD, CODE)
    assert run[F.GUEST_DR7] == 0x400 | 1 << 13
    assert dr6(lab) == DR6


def test_the_preemption_timer_waits_for_a_pending_exception(lab):
    timer = lab.pin(preemption_timer=1) | {F.PREEMPTION_TIMER_VALUE: 0}
    pending = {F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B1}
    run = lab.run("nop", timer | pending)
    assert (run.reason, run.rip) == (R.PREEMPTION_TIMER_EXPIRED, lab.stub(1))
    run = lab.run("nop", timer | pending | WANT_DB)
    assert run.intercepted == 1


def test_a_shutdown_state_drops_them(lab):
    window = lab.primary(nmi_window_exiting=1) | lab.pin(nmi_exiting=1, virtual_nmis=1)
    state = {F.GUEST_ACTIVITY_STATE: SHUTDOWN, F.GUEST_PENDING_DEBUG_EXCEPTIONS: ENABLED | B1}
    run = lab.run("nop", window | state)
    assert (run.reason, run[F.GUEST_PENDING_DEBUG_EXCEPTIONS]) == (R.NMI_WINDOW, 0)
    assert run[F.GUEST_ACTIVITY_STATE] == SHUTDOWN


def test_the_preemption_timer_loses_no_single_step(lab):
    """L2 single-steps through two instructions; its handler exits if it sees one twice."""
    handler = CODE + 0x8000
    text = f"mov (%rsp), %rax; cmp %rax, {DATA:#x}; je 1f; mov %rax, {DATA:#x}; iretq; 1: vmcall"
    before = lab.read(IDT + 16, 16)
    lab.write(handler, assemble(text, handler).bytes)
    lab.write(IDT + 16, gate(handler))
    shift = lab.vcpu.model.vmx.misc.preemption_timer_shift
    timer = lab.pin(preemption_timer=1)
    run = lab.run("0: wbinvd; jmp 0b", timer | STEPPING | {F.PREEMPTION_TIMER_VALUE: 1})
    places = set()
    for index in range(200):  # enough for every phase of L2's loop
        assert run.reason is R.PREEMPTION_TIMER_EXPIRED
        places.add(run.rip)
        value = {F.PREEMPTION_TIMER_VALUE: (2000 + 997 * index) >> shift}
        run = lab.resume(value, run.registers)
    assert len(places) > 1  # at a handler's start, where an exit ended, and inside it
    lab.write(IDT + 16, before)
