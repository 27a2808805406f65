"""Events that VM entry injects: how each is delivered, and what is told where delivery fails."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from undervisor.arch.vmx.controls import InterruptionType as Type
from undervisor.arch.vmx.exits import EptViolationQualification, ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Rflags
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.places import CS64, DS
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT
from undervisor.conformance.vmx.run import Run

VALID: Final = 1 << 31
WITH_CODE: Final = 1 << 11
FLAGS: Final = 0x2 | Rflags.if_ | Rflags.of_ | Rflags.cf
EXT, IDT = 1, 2
"""Bits of the error code of a fault in delivery: external to the program, IDT entry."""


@dataclass(frozen=True, slots=True)
class Event:
    """An event to inject; `length` where it is a software one."""

    vector: int
    type: Type
    code: int | None = None
    length: int = 0

    @property
    def information(self) -> int:
        """As the VM-entry field holds it, and the IDT-vectoring field of a failed delivery."""
        with_code = WITH_CODE if self.code is not None else 0
        return VALID | with_code | self.type << 8 | self.vector

    @property
    def fields(self) -> Changes:
        """The VM-entry fields."""
        return {
            F.ENTRY_INTERRUPTION_INFORMATION: self.information,
            F.ENTRY_EXCEPTION_ERROR_CODE: self.code or 0,
            F.ENTRY_INSTRUCTION_LENGTH: self.length,
            F.GUEST_RFLAGS: FLAGS,
        }


EVENTS: Final[Mapping[str, Event]] = {
    "external interrupt": Event(0x30, Type.EXTERNAL_INTERRUPT),
    "NMI": Event(2, Type.NMI),
    "exception": Event(6, Type.HARDWARE_EXCEPTION),
    "exception with error code": Event(13, Type.HARDWARE_EXCEPTION, 0x1230),
    "page fault": Event(14, Type.HARDWARE_EXCEPTION, 0x2),
    "software interrupt": Event(0x80, Type.SOFTWARE_INTERRUPT, None, 2),
    "INT1": Event(1, Type.PRIVILEGED_SOFTWARE_EXCEPTION, None, 1),
    "INT3": Event(3, Type.SOFTWARE_EXCEPTION, None, 1),
    "INTO": Event(4, Type.SOFTWARE_EXCEPTION, None, 1),
}


def _frame(lab: VmxLab, run: Run, event: Event) -> tuple[int | None, ...]:
    """What a delivery pushed: error code, RIP, CS, RFLAGS, RSP, SS."""
    has_code = event.code is not None
    words = struct.unpack("<6Q", lab.read(run[F.GUEST_RSP], 48))
    return words if has_code else (None, *words[:5])


@guest_test("SDM: Event Injection", "SDM: Details of Vectored-Event Injection", cases=EVENTS)
def an_event_is_delivered_through_l2s_idt(lab: VmxLab, event: Event) -> None:
    """The entry delivers the event before L2's first instruction, and pushes what is due.

    RIP is the first instruction's, or behind it by the length of a software event.  The exception
    bitmap does not matter.  The handler of an interrupt gate begins with IF = 0.
    """
    changes = event.fields | {F.EXCEPTION_BITMAP: 0xFFFF_FFFF}
    run = lab.run("nop", changes)
    run.delivers(event.vector)
    places = lab.places
    equal("error code, RIP, CS, RFLAGS, RSP and SS that were pushed", _frame(lab, run, event),
          (event.code, places.code + event.length, CS64, FLAGS, places.stack, DS))  # fmt: skip
    equal("RFLAGS in the handler", run[F.GUEST_RFLAGS], FLAGS & ~Rflags.if_)


@guest_test("SDM: VM-Entry Controls for Event Injection", "SDM: VM Exits")
def an_event_is_injected_once(lab: VmxLab) -> None:
    """The exit after a delivery clears the valid bit of the VM-entry interruption information.

    And the IDT-vectoring information is not valid, because the delivery succeeded.
    """
    lab.code("nop; nop")
    for name, event in EVENTS.items():
        run = lab.run(None, event.fields)
        run.delivers(event.vector)
        equal(f"{name}: the valid bits for the next entry and of IDT-vectoring",
              ((run[F.ENTRY_INTERRUPTION_INFORMATION] | run[F.IDT_VECTORING_INFORMATION]) & VALID),
              0)  # fmt: skip
        if event.code is None:
            lab.skip(run).ends()


@guest_test("SDM: Details of Vectored-Event Injection")
def only_software_events_obey_the_gates_dpl(lab: VmxLab) -> None:
    """Into CPL 3 through a gate of DPL 0: software events are #GP, all others are delivered."""
    user: Changes = {
        F.GUEST_CR3: lab.pages(), F.GUEST_CS_SELECTOR: 0x33, F.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
        F.GUEST_SS_SELECTOR: 0x3B, F.GUEST_SS_ACCESS_RIGHTS: 0xC0F3,
        F.GUEST_RSP: lab.places.user_stack,
    }  # fmt: skip
    for event in EVENTS.values():
        lab.write(lab.places.idt + 16 * event.vector + 5, b"\x8e")  # DPL 0
    vectors: dict[str, object] = {}
    for name, event in EVENTS.items():
        if name == "INT1":
            continue  # exempt, which not every processor can be: docs/silicon.md
        run = lab.run("nop", user | event.fields)
        vectors[name] = run.reason == ExitReason.VMCALL and run.vector_of(run.rip)
    obeys = {Type.SOFTWARE_INTERRUPT, Type.SOFTWARE_EXCEPTION}
    each("the vector that is delivered for", vectors,
         lambda name: 13 if EVENTS[name].type in obeys else EVENTS[name].vector)  # fmt: skip


# -- a fault in the delivery -----------------------------------------------------------------------


def _vectoring(name: str, run: Run, event: Event) -> None:
    """The exit tells the event whose delivery it interrupted."""
    equal(f"{name}: the IDT-vectoring information",
          run[F.IDT_VECTORING_INFORMATION] & ~(1 << 12), event.information)  # fmt: skip
    if event.code is not None:
        equal(f"{name}: the IDT-vectoring error code", run[F.IDT_VECTORING_ERROR_CODE], event.code)
    if event.length:
        equal(f"{name}: the instruction length", run.length, event.length)


# The manual combines a fault in the delivery of a contributory exception, or of a page fault, to a
# double fault; these are the events that are neither.
BENIGN: Final = {name: event for name, event in EVENTS.items() if event.code is None}


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery", "SDM: Error Code")
def a_gp_of_the_delivery_exits_with_the_event(lab: VmxLab) -> None:
    """An IDT entry beyond the limit is #GP with the vector in its code; the exit tells the event.

    EXT in the code is 1 but for INT n, INT3 and INTO.
    """
    bad: Changes = {F.GUEST_IDTR_LIMIT: 7, F.EXCEPTION_BITMAP: 1 << 13}
    for name, event in BENIGN.items():
        run = lab.run("nop", event.fields | bad)
        software = event.type in (Type.SOFTWARE_INTERRUPT, Type.SOFTWARE_EXCEPTION)
        run.exits_with_exception(13, event.vector << 3 | IDT | (0 if software else EXT))
        _vectoring(name, run, event)
        equal(f"{name}: RIP", run.rip, lab.places.code)


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery")
def a_page_fault_of_the_delivery_exits_with_the_event(lab: VmxLab) -> None:
    """A stack that is not mapped is a page fault of the delivery; the exit tells the event."""
    pages: Changes = {F.GUEST_CR3: lab.pages(), F.EXCEPTION_BITMAP: 1 << 14}
    hole = lab.places.free + 0x4000
    lab.write_u64(lab.pte(hole - 0x1000), 0)
    for name, event in BENIGN.items():
        run = lab.run("nop", pages | event.fields | {F.GUEST_RSP: hole})
        run.exits_with_exception(14, 2)
        true(f"{name}: the address is on the stack", hole - 0x1000 <= run.qualification < hole,
             run.qualification)  # fmt: skip
        _vectoring(name, run, event)
        equal(f"{name}: RSP", run[F.GUEST_RSP], hole)


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery",
            "SDM: EPT Violations", needs=[EPT])  # fmt: skip
def an_ept_violation_of_the_delivery_exits_with_the_event(lab: VmxLab) -> None:
    """A stack that EPT does not let L2 write is an EPT violation; the exit tells the event.

    Mended, the event is injected again as the exit tells it.
    """
    ept, hole = lab.ept(12), lab.places.free + 0x4000
    bits = EptViolationQualification
    wanted = bits.write | bits.readable | bits.linear_address_valid | bits.translation
    for name, event in EVENTS.items():
        lab.write_u64(lab.nested_entry(hole - 0x1000), hole - 0x1000 | 0x31)
        lab.l1.invept(1, ept[F.EPT_POINTER])
        run = lab.run("nop", ept | event.fields | {F.GUEST_RSP: hole})
        run.exits_with(ExitReason.EPT_VIOLATION)
        equal(f"{name}: the qualification", run.qualification & 0x1AF, wanted)
        _vectoring(name, run, event)
        lab.write_u64(lab.nested_entry(hole - 0x1000), hole - 0x1000 | 0x37)
        lab.l1.invept(1, ept[F.EPT_POINTER])
        again: Changes = {
            F.ENTRY_INTERRUPTION_INFORMATION: run[F.IDT_VECTORING_INFORMATION] & ~(1 << 12),
            F.ENTRY_EXCEPTION_ERROR_CODE: run[F.IDT_VECTORING_ERROR_CODE] if event.code else 0,
            F.ENTRY_INSTRUCTION_LENGTH: event.length,
        }
        lab.resume(again).delivers(event.vector)


OWN: Final = {
    "ud2": Event(6, Type.HARDWARE_EXCEPTION),
    "int $0x80": Event(0x80, Type.SOFTWARE_INTERRUPT, None, 2),
    "int3": Event(3, Type.SOFTWARE_EXCEPTION, None, 1),
    ".byte 0xf1": Event(1, Type.PRIVILEGED_SOFTWARE_EXCEPTION, None, 1),
}  # fmt: skip


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery")
def l2s_own_event_is_told_where_its_delivery_exits(lab: VmxLab) -> None:
    """The same holds for the events that L2's own instructions cause."""
    pages: Changes = {F.GUEST_CR3: lab.pages(), F.EXCEPTION_BITMAP: 1 << 14}
    hole = lab.places.free + 0x4000
    lab.write_u64(lab.pte(hole - 0x1000), 0)
    for source, event in OWN.items():
        run = lab.run(source, pages | {F.GUEST_RSP: hole})
        run.exits_with_exception(14, 2)
        _vectoring(source, run, event)
        equal(f"RIP of {source}", run.rip, lab.places.code)


@guest_test("SDM: Information for VM Exits That Occur During Event Delivery", "SDM: Interrupt 8")
def a_contributory_fault_in_delivery_becomes_a_double_fault(lab: VmxLab) -> None:
    """#GP in the delivery of #GP is a double fault, whose own exit tells no event."""
    event = EVENTS["exception with error code"]
    run = lab.run("nop", event.fields | {F.GUEST_IDTR_LIMIT: 7, F.EXCEPTION_BITMAP: 1 << 8})
    run.exits_with_exception(8, 0)
    equal("the IDT-vectoring valid bit", run[F.IDT_VECTORING_INFORMATION] & VALID, 0)
    run = lab.run("nop", event.fields | {F.GUEST_IDTR_LIMIT: 7})
    run.exits_with(ExitReason.TRIPLE_FAULT)


@guest_test("SDM: Vectored-Event Injection", "SDM: Activity State")
def an_injected_event_ends_hlt(lab: VmxLab) -> None:
    """With activity state HLT an injected event is delivered, and L2 is active in its handler."""
    halted: Changes = {F.GUEST_ACTIVITY_STATE: 1}
    for name in ("external interrupt", "NMI"):
        run = lab.run("nop", halted | EVENTS[name].fields)
        run.delivers(EVENTS[name].vector)
        equal("the activity state", run[F.GUEST_ACTIVITY_STATE], 0)


@guest_test("SDM: Vectored-Event Injection", "SDM: Guest Non-Register State")
def an_injected_nmi_blocks_nmis(lab: VmxLab) -> None:
    """After the injection of an NMI, blocking by NMI is 1 until IRET."""
    run = lab.run("nop", EVENTS["NMI"].fields)
    run.delivers(2)
    equal("the interruptibility state in the handler", run[F.GUEST_INTERRUPTIBILITY_STATE], 8)
    run = lab.skip(run)
    run.ends()
    equal("the interruptibility state behind IRET", run[F.GUEST_INTERRUPTIBILITY_STATE], 0)
