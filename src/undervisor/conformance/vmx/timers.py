"""The VMX-preemption timer, TSC offsetting and TSC scaling."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.controls import ExitControls, PinBasedControls, SecondaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control, misc

TIMER: Final = control(PinBasedControls, "preemption_timer")
SAVED: Final = control(ExitControls, "save_preemption_timer")
SCALING: Final = control(SecondaryControls, "use_tsc_scaling")
EXPIRED: Final = ExitReason.PREEMPTION_TIMER_EXPIRED
VALID: Final = 1 << 31
OFFSET: Final = 1 << 50
"""More than any TSC here."""
MASK64: Final = (1 << 64) - 1


def _timer(lab: VmxLab, value: int) -> Changes:
    changes = lab.primary(lab.pin(preemption_timer=1), hlt_exiting=0)
    return changes | {F.PREEMPTION_TIMER_VALUE: value}


@guest_test("SDM: VMX-Preemption Timer", needs=[TIMER])
def a_timer_of_0_exits_before_any_instruction(lab: VmxLab) -> None:
    """A timer value of 0 exits before L2's first instruction, but behind an injected event."""
    run = lab.run("nop", _timer(lab, 0))
    run.exits_with(EXPIRED, qualification=0)
    equal("RIP", run.rip, lab.places.code)
    run = lab.run("nop", _timer(lab, 0) | {F.ENTRY_INTERRUPTION_INFORMATION: VALID | 3 << 8 | 6})
    run.exits_with(EXPIRED)
    equal("RIP behind the injected event", run.rip, lab.stub(6))


@guest_test("SDM: VMX-Preemption Timer", "SDM: Miscellaneous Data", needs=[TIMER])
def the_timer_ends_a_loop_at_its_rate(lab: VmxLab) -> None:
    """The timer counts down by 1 each time that bit N of the TSC changes, and ends any loop.

    It does not expire before its time; how much later is the processor's own matter.
    """
    shift = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value).preemption_timer_shift
    value = 400_000 >> shift
    begin = "rdtsc; mov %eax, %ebx; mov %edx, %ecx;"
    for loop in ("1: jmp 1b", "1: pause; jmp 1b", "1: inc %r9; mov %r9, (%r10); jmp 1b"):
        run = lab.run(f"{begin} {loop}", _timer(lab, value), {"r10": lab.places.data})
        after = lab.l1.rdtsc().value
        run.exits_with(EXPIRED)
        start = run.registers["rbx"] & 0xFFFFFFFF | run.registers["rcx"] << 32
        # The first tick may come at once, and entry begins before RDTSC.
        least = (value - 2 << shift) - 40_000
        true("the timer did not expire early", after - start >= least, after - start)


@guest_test("SDM: VMX-Preemption Timer", "SDM: Activity State", needs=[TIMER])
def the_timer_wakes_from_hlt(lab: VmxLab) -> None:
    """The timer counts in the activity state HLT, which it leaves saved."""
    run = lab.run("hlt; nop", _timer(lab, 2000))
    run.exits_with(EXPIRED)
    equal("activity state and RIP", (run[F.GUEST_ACTIVITY_STATE], run.rip),
          (1, lab.places.code + 1))  # fmt: skip
    run = lab.run("nop", _timer(lab, 2000) | {F.GUEST_ACTIVITY_STATE: 1})
    run.exits_with(EXPIRED)
    equal("activity state and RIP of an entry to HLT", (run[F.GUEST_ACTIVITY_STATE], run.rip),
          (1, lab.places.code))  # fmt: skip


@guest_test("SDM: Saving Non-Register State", needs=[TIMER, SAVED])
def the_timers_value_is_saved_on_demand(lab: VmxLab) -> None:
    """ "Save VMX-preemption timer value" stores what is left; without it the field stays."""
    value = 0x8000_0000
    # Work that takes longer than one tick of the slowest timer.
    source = "mov $0x40000, %ecx; 1: loop 1b"
    run = lab.run(source, lab.on_exit(_timer(lab, value), save_preemption_timer=1))
    run.ends()
    left = run[F.PREEMPTION_TIMER_VALUE]
    true("less is left, but not nothing", 0 < left < value, left)
    run = lab.run(source, lab.on_exit(_timer(lab, value), save_preemption_timer=0))
    equal("the field without the control", run[F.PREEMPTION_TIMER_VALUE], value)
    run = lab.run("1: jmp 1b", lab.on_exit(_timer(lab, 50), save_preemption_timer=1))
    run.exits_with(EXPIRED)
    equal("the value when it expired", run[F.PREEMPTION_TIMER_VALUE], 0)


@guest_test("SDM: VMX-Preemption Timer", needs=[TIMER])
def without_its_control_the_timer_does_nothing(lab: VmxLab) -> None:
    """With "activate VMX-preemption timer" 0 the value does not matter."""
    stopped = lab.pin(preemption_timer=0) | {F.PREEMPTION_TIMER_VALUE: 0}
    run = lab.run("mov $1000, %ecx; 1: loop 1b", stopped)
    run.ends()
    equal("the timer's value", run[F.PREEMPTION_TIMER_VALUE], 0)


# -- the TSC ---------------------------------------------------------------------------------------

READS: Final = {
    "RDTSC": "rdtsc", "RDTSCP": "rdtscp", "RDMSR": f"mov ${int(Msr.TSC):#x}, %ecx; rdmsr",
}  # fmt: skip


def _reads(lab: VmxLab) -> dict[str, str]:
    """The ways to read the TSC that the processor has."""
    scp = lab.supports(SecondaryControls, "enable_rdtscp")
    return {name: text for name, text in READS.items() if scp or name != "RDTSCP"}


def _free(lab: VmxLab, base: Changes | None = None, **primary: int) -> Changes:
    """No exit for any read of the TSC."""
    more = {"enable_rdtscp": 1} if lab.supports(SecondaryControls, "enable_rdtscp") else {}
    changes = lab.secondary(base, **more) if more else dict(base or {})
    return lab.primary(changes, rdtsc_exiting=0, use_msr_bitmaps=1, **primary)


def _tsc(lab: VmxLab, source: str, changes: Changes) -> tuple[int, int, int]:
    """L1's TSC before, L2's as `source` reads it, and L1's after."""
    before = lab.l1.rdtsc().value
    run = lab.run(source, changes)
    run.ends()
    after = lab.l1.rdtsc().value
    return before, run.registers["rdx"] << 32 | run.registers["rax"] & 0xFFFFFFFF, after


@guest_test("SDM: Time-Stamp Counter Offset and Multiplier", "SDM: Changes to Instruction Behavior"
            " in VMX Non-Root Operation")  # fmt: skip
def the_offset_is_added_to_every_read_of_the_tsc(lab: VmxLab) -> None:
    """With "use TSC offsetting" RDTSC, RDTSCP and RDMSR give the TSC plus the offset, modulo 2^64.

    L1's own TSC is not changed.
    """
    for offset in (OFFSET, MASK64 - OFFSET + 1):
        changes = _free(lab, use_tsc_offsetting=1) | {F.TSC_OFFSET: offset}
        for name, source in _reads(lab).items():
            before, guest, after = _tsc(lab, source, changes)
            value = guest - offset & MASK64
            true(f"{name} less the offset is between L1's", before < value < after,
                 before, value, after)  # fmt: skip


@guest_test("SDM: Time-Stamp Counter Offset and Multiplier")
def without_offsetting_the_offset_does_nothing(lab: VmxLab) -> None:
    """With "use TSC offsetting" 0 L2 reads L1's TSC."""
    changes = _free(lab, use_tsc_offsetting=0) | {F.TSC_OFFSET: OFFSET}
    for name, source in _reads(lab).items():
        before, guest, after = _tsc(lab, source, changes)
        true(f"{name} is between L1's", before < guest < after, before, guest, after)


@guest_test("SDM: Time-Stamp Counter Offset and Multiplier", needs=[SCALING])
def the_multiplier_scales_before_the_offset(lab: VmxLab) -> None:
    """With "use TSC scaling" L2 reads the TSC times the multiplier / 2^48, plus the offset."""
    for multiplier, offset in ((1 << 49, 0), (1 << 47, OFFSET), (3 << 48, OFFSET), (1 << 48, 0)):
        base = lab.secondary(use_tsc_scaling=1)
        changes = _free(lab, base, use_tsc_offsetting=1)
        changes |= {F.TSC_OFFSET: offset, F.TSC_MULTIPLIER: multiplier}
        for name, source in _reads(lab).items():
            before, guest, after = _tsc(lab, source, changes)
            low, high = (tsc * multiplier >> 48 for tsc in (before, after))
            true(f"{name} with multiplier {multiplier:#x}", low < guest - offset < high,
                 low, guest - offset, high)  # fmt: skip


@guest_test("SDM: RDTSCP—Read Time-Stamp Counter and Processor ID",
            needs=[control(SecondaryControls, "enable_rdtscp")])  # fmt: skip
def rdtscp_gives_the_processors_tsc_aux(lab: VmxLab) -> None:
    """RDTSCP of L2 loads ECX with IA32_TSC_AUX, which L1 and L2 share."""
    lab.l1.wrmsr(Msr.TSC_AUX, 0x5A5A1234)
    run = lab.run("rdtscp", _free(lab))
    run.ends()
    equal("RCX", run.registers["rcx"], 0x5A5A1234)


@guest_test("SDM: VMX-Preemption Timer", needs=[TIMER, misc("activity_hlt")])
def the_timer_starts_anew_at_each_entry(lab: VmxLab) -> None:
    """Each VM entry loads the timer from its field: a resumed L2 has the whole value again."""
    run = lab.run("1: jmp 1b", _timer(lab, 500))
    for _ in range(3):
        run.exits_with(EXPIRED)
        run = lab.resume(None, run.registers)
    run.exits_with(EXPIRED)
    run = lab.resume({F.PREEMPTION_TIMER_VALUE: 0}, run.registers)
    run.exits_with(EXPIRED)


@guest_test("SDM: VMX-Preemption Timer", needs=[TIMER])
def the_timer_of_one_entry_is_not_that_of_the_next(lab: VmxLab) -> None:
    """A timer that counted when L2 exited does not end an L2 that is entered without one."""
    shift = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value).preemption_timer_shift
    soon = {F.PREEMPTION_TIMER_VALUE: (200_000 >> shift) + 1}
    lab.run("", lab.pin(preemption_timer=1) | soon)
    lab.run("mov $3000000, %ecx; 1: loop 1b; nop").ends()
