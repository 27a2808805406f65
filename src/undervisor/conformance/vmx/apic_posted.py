"""Posted interrupts: requests that another agent puts into a descriptor, and their notification."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import ActivityState, PinBasedControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import equal
from undervisor.conformance.lab import together
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.apic import ACCESSES, DELIVERY, EOI, ICR, SHADOW, TPR, Apic
from undervisor.conformance.vmx.apic_interrupts import delivering
from undervisor.conformance.vmx.events import SPURIOUS
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control, misc
from undervisor.conformance.vmx.processors import others, wait_for
from undervisor.conformance.vmx.run import Run
from undervisor.guest.probe.client import Batch

POSTED: Final = control(PinBasedControls, "process_posted_interrupts")
NEEDS: Final = (SHADOW, ACCESSES, DELIVERY, POSTED)
NOTIFICATION, OTHER = 0x81, 0x72
"""OTHER has the lower priority: L1's APIC delivers it behind the notification."""
FIXED: Final = 0x4000
TO_SELF: Final = 0x40000 | FIXED
VIRR, VISR = 0x200, 0x100
REQUESTS: Final = (0x22, 0x85, 0x86)
OUTSTANDING: Final = 0x20
"""Where in the descriptor, behind 256 requests, the outstanding notification is."""
DESCRIPTOR_SIZE: Final = 64
IF: Final = 0x202


def _word(vector: int) -> int:
    """Where in VIRR or VISR the 32 vectors begin that `vector` is one of."""
    return vector >> 5 << 4


def _bits(offset: int, vectors: tuple[int, ...]) -> int:
    """The word at `offset` of VIRR or VISR when these vectors are set."""
    return sum(1 << (vector & 31) for vector in vectors if _word(vector) == offset)


def _posted(lab: VmxLab, apic: Apic, vectors: tuple[int, ...] = REQUESTS) -> Changes:
    """The fields of posted interrupts, with a descriptor at DATA that requests `vectors`."""
    descriptor = lab.places.data
    requests = sum(1 << vector for vector in vectors).to_bytes(32, "little")
    lab.write(descriptor, (requests + b"\1").ljust(DESCRIPTOR_SIZE, b"\0"))
    lab.l1.apic_write(SPURIOUS, 0x1FF)
    fields = lab.on_exit(apic.fields, acknowledge_interrupt=1)
    return lab.pin(fields, external_interrupt_exiting=1, process_posted_interrupts=1) | {
        F.POSTED_INTERRUPT_NOTIFICATION_VECTOR: NOTIFICATION,
        F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: descriptor,
        F.GUEST_RFLAGS: IF,
    }


def _arrives(
    lab: VmxLab, fields: Changes, *vectors: int, source: str = "nop; nop", rflags: int = IF
) -> Run:
    """L2 runs while interrupts arrive that L1 sent itself before, its own IF being 0."""
    for vector in vectors:
        lab.l1.apic_write(ICR, TO_SELF | vector)
    return lab.run(source, fields | {F.GUEST_RFLAGS: rflags}, reads=[F.GUEST_INTERRUPT_STATUS])


def _in_service(lab: VmxLab) -> list[int]:
    """The vectors that L1's own APIC has in service."""
    words = [lab.l1.apic_read(VISR + 16 * n).value for n in range(8)]
    return [vector for vector in range(256) if words[vector >> 5] >> (vector & 31) & 1]


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def a_notification_delivers_what_is_posted(lab: VmxLab) -> None:
    """The notification vector does not exit: requests move to VIRR, the highest is delivered.

    The outstanding notification and the requests are clear, and L1's APIC is free for the next.
    """
    apic = delivering(lab)
    apic[VIRR + _word(0x23)] = _bits(_word(0x23), (0x23,))
    run = _arrives(lab, _posted(lab, apic), NOTIFICATION)
    run.delivers(0x86)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0x8685)
    low, high = _word(0x22), _word(0x85)
    equal("VIRR, its words 1 and 4", (apic[VIRR + low], apic[VIRR + high]),
          (_bits(low, (0x22, 0x23)), _bits(high, (0x85,))))  # fmt: skip
    equal("VISR, its word 4", apic[VISR + high], _bits(high, (0x86,)))
    equal("the descriptor", lab.read(lab.places.data, DESCRIPTOR_SIZE), bytes(DESCRIPTOR_SIZE))
    equal("what L1's APIC has in service", _in_service(lab), [])


@guest_test("SDM: Posted-Interrupt Processing", "SDM: External-Interrupt Exiting", needs=NEEDS)
def another_vector_than_the_notification_exits(lab: VmxLab) -> None:
    """With posted interrupts every other external interrupt exits, acknowledged; none is posted."""
    run = _arrives(lab, _posted(lab, delivering(lab)), OTHER)
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    equal("the interruption information", run[F.EXIT_INTERRUPTION_INFORMATION], 1 << 31 | OTHER)
    equal("the outstanding notification", lab.read_u32(lab.places.data + OUTSTANDING), 1)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0)
    equal("what L1's APIC has in service", _in_service(lab), [OTHER])
    lab.l1.apic_write(EOI, 0)


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def a_notification_is_processed_whatever_if_is(lab: VmxLab) -> None:
    """With RFLAGS.IF = 0 requests move to VIRR all the same; STI lets the highest be delivered."""
    fields = _posted(lab, delivering(lab))
    run = _arrives(lab, fields, NOTIFICATION, rflags=2)
    run.ends()
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0x86)
    equal("the descriptor", lab.read(lab.places.data, DESCRIPTOR_SIZE), bytes(DESCRIPTOR_SIZE))
    run = _arrives(lab, _posted(lab, delivering(lab)), NOTIFICATION,
                   source="nop; sti; nop; nop", rflags=2)  # fmt: skip
    run.delivers(0x86)
    equal("the RIP that was pushed, behind the shadow of STI",
          lab.read_u64(run[F.GUEST_RSP]), lab.places.code + 3)  # fmt: skip


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def a_higher_request_that_waits_already_stays_the_highest(lab: VmxLab) -> None:
    """RVI becomes the highest request only if that is above it: 95H waits before 86H is posted."""
    apic = delivering(lab, 0x95)
    apic[VIRR + _word(0x95)] = _bits(_word(0x95), (0x95,))
    run = _arrives(lab, _posted(lab, apic), NOTIFICATION, rflags=2)
    run.ends()
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0x95)
    equal("VIRR, its word 4", apic[VIRR + _word(0x95)], _bits(_word(0x95), (0x85, 0x86, 0x95)))


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def requests_are_taken_though_no_notification_is_outstanding(lab: VmxLab) -> None:
    """The notification vector counts, not the bit: it is written as 0 and never looked at."""
    fields = _posted(lab, delivering(lab))
    lab.write(lab.places.data + OUTSTANDING, b"\0")
    run = _arrives(lab, fields, NOTIFICATION)
    run.delivers(0x86)
    equal("the requests", lab.read(lab.places.data, OUTSTANDING), bytes(OUTSTANDING))


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def only_the_notification_bit_of_its_word_changes(lab: VmxLab) -> None:
    """Bits 511:257 of the descriptor are software's: processing leaves them as they are."""
    fields = _posted(lab, delivering(lab))
    theirs = bytes(range(0x81, 0x81 + DESCRIPTOR_SIZE - OUTSTANDING))
    lab.write(lab.places.data + OUTSTANDING, theirs)
    _arrives(lab, fields, NOTIFICATION).delivers(0x86)
    equal("the descriptor behind its requests",
          lab.read(lab.places.data + OUTSTANDING, len(theirs)),
          bytes([theirs[0] & ~1]) + theirs[1:])  # fmt: skip


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def a_notification_without_requests_changes_nothing(lab: VmxLab) -> None:
    """With no request L2 goes on as if no interrupt had come, its interrupt status as before."""
    run = _arrives(lab, _posted(lab, delivering(lab), ()), NOTIFICATION)
    run.ends()
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0)
    equal("the outstanding notification", lab.read_u32(lab.places.data + OUTSTANDING), 0)
    equal("what L1's APIC has in service", _in_service(lab), [])


@guest_test("SDM: Posted-Interrupt Processing", "SDM: Activity State",
            needs=(*NEEDS, misc("activity_hlt")), seconds=5)  # fmt: skip
def a_posted_interrupt_ends_hlt(lab: VmxLab) -> None:
    """In HLT a notification whose request can be delivered wakes L2."""
    fields = lab.primary(_posted(lab, delivering(lab)), hlt_exiting=0)
    run = _arrives(lab, fields | {F.GUEST_ACTIVITY_STATE: ActivityState.HLT}, NOTIFICATION)
    run.delivers(0x86)
    equal("the activity state", run[F.GUEST_ACTIVITY_STATE], ActivityState.ACTIVE)


@guest_test("SDM: Posted-Interrupt Processing", "SDM: Activity State",
            needs=(*NEEDS, misc("activity_hlt")), seconds=5)  # fmt: skip
def what_cannot_be_delivered_leaves_l2_in_hlt(lab: VmxLab) -> None:
    """In HLT a notification whose requests VTPR holds back is processed, and L2 stays in HLT.

    Another interrupt, which exits, finds it there.
    """
    apic = delivering(lab)
    fields = lab.primary(_posted(lab, apic), hlt_exiting=0)
    apic[TPR] = 0xF0
    run = _arrives(lab, fields | {F.GUEST_ACTIVITY_STATE: ActivityState.HLT}, OTHER, NOTIFICATION)
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    equal("the interruption information", run[F.EXIT_INTERRUPTION_INFORMATION], 1 << 31 | OTHER)
    equal("activity state, RIP, interrupt status",
          (run[F.GUEST_ACTIVITY_STATE], run.rip, run[F.GUEST_INTERRUPT_STATUS]),
          (ActivityState.HLT, lab.places.code, 0x86))  # fmt: skip
    lab.l1.apic_write(EOI, 0)


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS)
def in_root_operation_the_notification_is_an_interrupt_like_others(lab: VmxLab) -> None:
    """The notification vector that reaches L1 is delivered to L1, and nothing is processed."""
    fields = _posted(lab, delivering(lab))
    lab.run("nop", fields).ends()
    before = lab.count(NOTIFICATION)
    lab.l1.apic_write(ICR, TO_SELF | NOTIFICATION)
    lab.call("sti; nop; nop; cli")
    equal("how often L1 got it", lab.count(NOTIFICATION) - before, 1)
    equal("the outstanding notification", lab.read_u32(lab.places.data + OUTSTANDING), 1)


@guest_test("SDM: Posted-Interrupt Processing", needs=NEEDS, cpus=2)
def another_processor_posts_to_an_l2_that_runs(lab: VmxLab) -> None:
    """A processor sets a request and the notification bit, and sends the vector: L2 gets it.

    L1 on the first processor has no part in it: there is no exit until L2 has what it waits for.
    """
    (other,) = others(lab, 2)
    fields = _posted(lab, delivering(lab), ())
    descriptor, flag = lab.places.data, lab.places.data + 0x100
    lab.fill(flag, 16)
    lab.write(lab.stub(0x86), lab.assemble("incl 8(%rbx); iretq"))
    lab.code("movl $1, (%rbx); 1: pause; cmpl $0, 8(%rbx); jne 2f; dec %rdx; jnz 1b; 2:")
    ours, theirs = Batch(), Batch()
    writes = lab.plan_launch(ours, fields)
    run = lab.plan_entry(ours, {"rbx": flag, "rdx": 10_000_000}, resume=False)
    wait_for(other, theirs, flag)
    theirs.call(lab.assemble("lock bts %rax, (%rbx); lock bts %rcx, (%rbx)"),
                {"rbx": descriptor, "rax": 0x86, "rcx": 8 * OUTSTANDING}, [])  # fmt: skip
    theirs.send_ipi(0, FIXED | NOTIFICATION)
    together({lab: ours, other: theirs})
    writes.check()
    run.ends()
    equal("how often L2 got the interrupt", lab.read_u32(flag + 8), 1)
    equal("the descriptor", lab.read(descriptor, DESCRIPTOR_SIZE), bytes(DESCRIPTOR_SIZE))
