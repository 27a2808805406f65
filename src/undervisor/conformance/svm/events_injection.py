"""Events that L1 injects, and events whose delivery does not finish."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import EventInfo
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import NPT, feature

INTR, NMI, EXCEPTION, SOFTWARE = (
    EventType.EXTERNAL_INTERRUPT, EventType.NMI, EventType.EXCEPTION, EventType.SOFTWARE_INTERRUPT,
)  # fmt: skip
IDT_GATE: Final = 2
"""The bit of an error code that says: the selector's index is one of the IDT."""


def inject(vector: int, kind: int, error: int | None = None) -> int:
    """EVENTINJ."""
    event = vector | kind << 8 | int(EventInfo.v)
    return event if error is None else event | int(EventInfo.ev) | error << 32


# Name: vector, type, error code.
EVENTS: Final = {
    "interrupt 55H": (0x55, INTR, None), "interrupt FFH": (0xFF, INTR, None),
    "interrupt 20H": (0x20, INTR, None), "NMI": (2, NMI, None), "#DE": (0, EXCEPTION, None),
    "#DB": (1, EXCEPTION, None), "#UD": (6, EXCEPTION, None), "#NM": (7, EXCEPTION, None),
    "#DF": (8, EXCEPTION, 0), "#TS": (10, EXCEPTION, 0x30), "#NP": (11, EXCEPTION, 0x38),
    "#SS": (12, EXCEPTION, 0x40), "#GP": (13, EXCEPTION, 0x1234), "#PF": (14, EXCEPTION, 7),
    "#MF": (16, EXCEPTION, None), "#AC": (17, EXCEPTION, 0), "#MC": (18, EXCEPTION, None),
    "#XF": (19, EXCEPTION, None), "INT 80H": (0x80, SOFTWARE, None),
    "INT 21H": (0x21, SOFTWARE, None),
}  # fmt: skip


@guest_test("APM: Event Injection", cases={name: name for name in EVENTS})
def an_injected_event_is_delivered_first(lab: SvmLab, name: str) -> None:
    """An injected event enters its handler before L2's first instruction, IF being 0 or not.

    Its frame is right, and no intercept of its vector makes it exit.
    """
    vector, kind, error = EVENTS[name]
    lab.write_u32(lab.places.data, 0)
    wants = [Intercept.INTR, Intercept.NMI, Intercept.VINTR, Intercept.INTN]
    if vector < 32 and vector != 2:
        wants.append(Intercept(Intercept.EXCP_DE + vector))
    changes = {F.EVENTINJ: inject(vector, kind, error), F.RFLAGS: 0x46}
    run = lab.run("movl $1, DATA", changes, wants=wants)
    run.delivers(vector)
    equal("what L2's first instruction would have written", lab.read_u32(lab.places.data), 0)
    equal("EVENTINJ.V and EXITINTINFO.V", (run[F.EVENTINJ] >> 31 & 1, run[F.EXITINTINFO] >> 31 & 1),
          (0, 0))  # fmt: skip
    frame = [lab.read_u64(run[F.RSP] + 8 * n) for n in range(6)]
    if error is not None:
        equal("the error code on the stack", frame.pop(0), error)
    if kind != SOFTWARE:  # which RIP a software interrupt pushes depends on nRIP
        equal("the RIP on the stack", frame[0], lab.places.code)
    equal("CS and RSP on the stack", (frame[1], frame[3]), (lab.vmcb.cs_selector, lab.vmcb.rsp))
    equal("RFLAGS on the stack", frame[2] & ~0x10000, 0x46)


@guest_test("APM: Event Injection", "APM: #PF (Page Fault)")
def an_injected_page_fault_brings_the_cr2_of_the_vmcb(lab: SvmLab) -> None:
    """Injecting #PF does not set CR2: L2's handler finds what L1 wrote into the VMCB."""
    lab.write(lab.stub(Vector.PF), lab.assemble("mov %cr2, %rbx; vmmcall"))
    run = lab.run("nop", {F.EVENTINJ: inject(14, EXCEPTION, 2), F.CR2: 0xABC000})
    run.exits_with(ExitCode.VMMCALL)
    equal("CR2 as the handler reads it", run.registers["rbx"], 0xABC000)
    equal("CR2 in the VMCB", run[F.CR2], 0xABC000)


@guest_test("APM: Event Injection", "APM: State Saved on Exit", needs=[feature("nrips")])
def a_software_interrupt_returns_to_nrip(lab: SvmLab) -> None:
    """Where nRIP is offered, an injected software interrupt pushes it as the return address."""
    begin = {F.EVENTINJ: inject(0x80, SOFTWARE), F.NRIP: lab.places.code + 2}
    run = lab.run("int $0x80", begin)
    run.delivers(0x80)
    equal("the RIP on the stack", lab.read_u64(run[F.RSP]), lab.places.code + 2)


@guest_test("APM: Event Injection")
def an_injected_event_changes_the_privilege_level(lab: SvmLab) -> None:
    """From CPL 3 an injected interrupt takes its stack from L2's TSS; an INT n needs no DPL."""
    begin = modes.user(lab)
    for kind in (INTR, SOFTWARE):
        run = lab.run("nop", begin | {F.EVENTINJ: inject(0x55, kind)})
        run.delivers(0x55)
        equal("CPL in the handler", run[F.CPL], 0)
        equal("RSP in the handler", run[F.RSP], lab.places.stack - 40)
        saved = [lab.read_u64(run[F.RSP] + 8 * n) for n in (1, 3, 4)]
        equal("CS, RSP and SS on the stack", saved,
              [begin[F.CS_SELECTOR], lab.places.user_stack, begin[F.SS_SELECTOR]])  # fmt: skip


@guest_test("APM: Event Injection")
def an_error_code_is_pushed_as_ev_says(lab: SvmLab) -> None:
    """EV decides whether an injected exception pushes an error code."""
    got = {}
    for name, event in (
        ("EV set", inject(13, EXCEPTION, 0x1234)),
        ("EV clear", inject(6, EXCEPTION)),
    ):
        run = lab.run("nop", {F.EVENTINJ: event})
        got[name] = lab.vmcb.rsp - run[F.RSP]
    each("bytes on the stack", got, lambda name: 48 if name == "EV set" else 40)


# -- a delivery that does not finish -----------------------------------------------------------

DELIVERED: Final = {
    "interrupt": (0x55, INTR, None), "NMI": (2, NMI, None), "#GP": (13, EXCEPTION, 0x1234),
    "#UD": (6, EXCEPTION, None), "INT n": (0x80, SOFTWARE, None), "#BP": (3, EXCEPTION, None),
    "interrupt 3": (3, INTR, None),
}  # fmt: skip


@guest_test("APM: EXITINTINFO", "APM: Event Injection", cases={name: name for name in DELIVERED})
def a_fault_in_the_delivery_names_the_injected_event(lab: SvmLab, name: str) -> None:
    """An intercepted fault in the delivery of an injected event leaves it in EXITINTINFO."""
    vector, kind, error = DELIVERED[name]
    # A gate that is not present.
    lab.write(lab.places.idt + 16 * vector + 5, b"\x0e")
    changes = {F.EVENTINJ: inject(vector, kind, error)}
    run = lab.run("nop", changes, wants=[Intercept.EXCP_NP])
    run.exits_with(ExitCode.EXCP_NP)
    run.interrupted(vector, kind, error)
    equal("the error code's gate", run.info1 & ~1, vector << 3 | IDT_GATE)
    equal("RIP", run.rip, lab.places.code)
    equal("RSP", run[F.RSP], lab.vmcb.rsp)
    equal("EVENTINJ.V", run[F.EVENTINJ] >> 31 & 1, 0)


@guest_test("APM: EXITINTINFO", "APM: Nested Paging", needs=[NPT])
def a_nested_page_fault_in_the_delivery_names_the_event(lab: SvmLab) -> None:
    """A nested page fault on L2's stack or IDT in a delivery leaves the event in EXITINTINFO."""
    places, changes = lab.places, lab.npt(12) | {F.TLB_CONTROL: 1}
    for name, page in (("the stack", places.stack - 0x1000), ("the IDT", places.idt)):
        for event, (vector, kind, error) in DELIVERED.items():
            where = lab.nested_entry(page)
            lab.write_u64(where, 0)
            run = lab.run("nop", changes | {F.EVENTINJ: inject(vector, kind, error)})
            lab.write_u64(where, page | 7)
            run.exits_with(ExitCode.NPF)
            equal(f"the page of {event}, {name}", run.info2 & ~0xFFF, page)
            run.interrupted(vector, kind, error)
            run = lab.resume({F.EVENTINJ: run[F.EXITINTINFO], F.RSP: lab.vmcb.rsp})
            run.delivers(vector)


@guest_test("APM: EXITINTINFO", "APM: Nested Paging", needs=[NPT])
def l2s_own_events_are_named_when_their_delivery_exits(lab: SvmLab) -> None:
    """INT n, INT3 and an exception of L2 whose delivery meets a nested page fault are named.

    So they are where L1 intercepts an exception that does not happen.
    """
    places, changes = lab.places, lab.npt(12) | {F.TLB_CONTROL: 1}
    page = places.stack - 0x1000
    events = (
        ("int $0x80", 0x80, SOFTWARE, None), ("int3", 3, EXCEPTION, None),
        ("ud2", 6, EXCEPTION, None), ("mov $0x1238, %eax; mov %eax, %ds", 13, EXCEPTION, 0x1238),
    )  # fmt: skip
    for wants, (text, vector, kind, error) in product(((), (Intercept.EXCP_OF,)), events):
        lab.write_u64(lab.nested_entry(page), 0)
        run = lab.run(text, changes, wants=wants)
        run.exits_with(ExitCode.NPF)
        run.interrupted(vector, kind, error)
        at = len(lab.assemble(text.split(";")[0])) if ";" in text else 0
        equal(f"RIP at {text}", run.rip, places.code + at)


@guest_test("APM: EXITINTINFO", "APM: Double Fault")
def the_second_exception_exits_before_it_becomes_a_double_fault(lab: SvmLab) -> None:
    """The intercept of a second, contributory exception comes before the double fault."""
    lab.write(lab.places.idt + 16 * Vector.GP + 5, b"\x0e")
    run = lab.run("mov $0x1238, %eax; mov %eax, %ds", wants=[Intercept.EXCP_NP, Intercept.EXCP_DF])
    run.exits_with(ExitCode.EXCP_NP)
    run.interrupted(Vector.GP, EXCEPTION, 0x1238)


@guest_test("APM: Double Fault", "APM: Exception Intercepts")
def two_contributory_exceptions_are_a_double_fault(lab: SvmLab) -> None:
    """#NP while #GP is delivered is #DF, with its intercept and without."""
    lab.write(lab.places.idt + 16 * Vector.GP + 5, b"\x0e")
    code = "mov $0x1238, %eax; mov %eax, %ds"
    lab.run(code, wants=[Intercept.EXCP_DF]).exits_with(ExitCode.EXCP_DF)
    run = lab.run(code)
    run.delivers(Vector.DF)
    equal("the error code on the stack", lab.read_u64(run[F.RSP]), 0)


@guest_test("APM: Double Fault", "APM: Event Injection")
def an_injected_exception_counts_for_the_double_fault(lab: SvmLab) -> None:
    """A fault in the delivery of an injected #GP is #DF; in that of an interrupt it is not."""
    for vector in (Vector.GP, 0x55):
        lab.write(lab.places.idt + 16 * vector + 5, b"\x0e")
    lab.run("nop", {F.EVENTINJ: inject(13, EXCEPTION, 0)}).delivers(Vector.DF)
    lab.run("nop", {F.EVENTINJ: inject(0x55, INTR)}).delivers(Vector.NP)


@guest_test("APM: Shutdown Intercept", "APM: Event Injection")
def a_fault_while_a_double_fault_is_delivered_is_a_shutdown(lab: SvmLab) -> None:
    """A contributory fault in the delivery of an injected #DF is a shutdown, which L1 sees."""
    lab.write(lab.places.idt + 16 * Vector.DF + 5, b"\x0e")
    changes = {F.EVENTINJ: inject(8, EXCEPTION, 0)}
    lab.run("nop", changes, wants=[Intercept.SHUTDOWN]).exits_with(ExitCode.SHUTDOWN)
    lab.run("nop").ends()
