"""Quirks of nested SVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.rules import Verdict as RulesVerdict
from undervisor.arch.svm.checks import SvmVerdict, check_vmrun
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VirtualInterrupt, VmcbField
from undervisor.arch.x86.msr import Msr, VmCr
from undervisor.hypervisor import decode
from undervisor.hypervisor.nested.svm import (
    entry,
    events,
    exit,
    instructions,
    paging,
    permissions,
    reflect,
    state,
)
from undervisor.hypervisor.quirks.quirk import (
    Quirk,
    Step,
    replace,
    replace_l1_exit,
    replace_methods,
)
from undervisor.hypervisor.verdict import ADVANCE, RESUME, Yield

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine

_PAGE_1G: Final = 30
_FINAL_OR_TABLE: Final = 3 << 32


# -- entry --------------------------------------------------------------------------------------


class _Lenient:
    """The checks of VMRUN without the rules whose ids begin so."""

    def __init__(self, capabilities: Any, ignored: tuple[str, ...]) -> None:
        self._known, self._ignored = capabilities, ignored

    def check(self, vmcb: Any) -> SvmVerdict | None:
        """None where only ignored rules are broken."""
        found = check_vmrun(vmcb, self._known)
        broken = [v for v in found.broken if not v.rule.id.startswith(self._ignored)]
        return RulesVerdict(broken, found.unchecked) if broken else None


def _without_rules(machine: Machine, *ignored: str) -> None:
    for vcpu in machine.vcpus:
        svm: Any = vcpu.nested.state  # type: ignore[attr-defined]
        svm.checker = lambda vcpu: _Lenient(state.capabilities(vcpu), ignored)


def _read_twice(machine: Machine) -> None:
    """Another processor has its turn between the checks of a VMCB and its use."""
    checked: set[int] = set()

    def quirky(original: Step) -> Step:
        def vmrun(vcpu: Any, event: Any) -> Any:
            svm = vcpu.nested.state
            gpa, length = instructions.physical_operand(vcpu)
            if vcpu.index in checked:
                checked.discard(vcpu.index)
                return entry.enter(vcpu, svm, svm.at(gpa), length)
            if svm.checker(vcpu).check(svm.at(gpa)) is not None:
                return original(vcpu, event)
            checked.add(vcpu.index)
            return Yield(0)

        return vmrun

    replace_l1_exit(machine, ExitCode.VMRUN, quirky)


def _controls(machine: Machine, change: Step) -> None:
    """After the controls of a VMCB were taken over, `change(vcpu, svm, vmcb12)`."""

    def quirky(original: Step) -> Step:
        def load(vcpu: Any, svm: Any, vmcb12: Any) -> None:
            original(vcpu, svm, vmcb12)
            change(vcpu, svm, vmcb12)

        return load

    replace(machine, entry, "_load_controls", quirky)


def _mask_nothing(vcpu: Any, svm: Any, vmcb12: Any) -> None:
    svm.virtual &= ~VirtualInterrupt.v_intr_masking


def _lose_tsc_offset(vcpu: Any, svm: Any, vmcb12: Any) -> None:
    vcpu.l2_tsc_offset = 0


def _select(machine: Machine, change: Step) -> None:
    """The shadow for an entry is chosen by `change(n_cr3, asid, tlb_control)`."""
    for vcpu in machine.vcpus:
        shadows: Any = vcpu.nested.state.shadows  # type: ignore[attr-defined]
        original = shadows.select

        def select(
            vcpu: Any, *asked: int, original: Step = original, shadows: Any = shadows
        ) -> Any:
            return original(vcpu, *change(shadows, *asked))

        shadows.select = select


def _low_bits_of_ncr3(shadows: Any, n_cr3: int, asid: int, control: int) -> tuple[int, ...]:
    return n_cr3 + (0x20 if n_cr3 & 0x1F else 0), asid, control


def _never_flush(shadows: Any, n_cr3: int, asid: int, control: int) -> tuple[int, ...]:
    shadows.stale = False
    if shadows.current is not None:
        asid = shadows.current.asid
    return n_cr3, asid, 0


def _hang_on_1g(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def fault(vcpu: Any, svm: Any, event: Any) -> Any:
            shadow = svm.shadows.current
            if svm.nested_paging and shadow is not None:
                found = shadow.walk(event.info2, 0)
                if getattr(found, "page_shift", 0) == _PAGE_1G:
                    return RESUME
            return original(vcpu, svm, event)

        return fault

    replace(machine, paging, "fault", quirky)


# -- what L1 gets to see ------------------------------------------------------------------------


def _reflect(machine: Machine, code: int, quirky: Step) -> None:
    """For one exit of L2, `quirky(original, vcpu, exit)` in place of L1's intercepts."""

    def replaced(original: Step) -> Step:
        def reflecting(vcpu: Any, event: Any) -> Any:
            if event.code == code:
                return quirky(original, vcpu, event)
            return original(vcpu, event)

        return reflecting

    replace_methods(machine, "reflect", replaced)


def _not_intercepted(machine: Machine, *codes: int) -> None:
    for code in codes:
        _reflect(machine, code, lambda original, vcpu, event: None)


def _answer_hypercalls(machine: Machine) -> None:
    def quirky(original: Step, vcpu: Any, event: Any) -> Any:
        if vcpu.nested.state.wanted >> ExitCode.VMMCALL & 1:
            return original(vcpu, event)
        return ADVANCE[decode.length(vcpu)]

    _reflect(machine, ExitCode.VMMCALL, quirky)


def _first_port_only(machine: Machine) -> None:
    replace(
        machine,
        permissions,
        "wants_port",
        lambda original: lambda vcpu, svm, port, size: original(vcpu, svm, port, 1),
    )


def _reads_for_writes(machine: Machine) -> None:
    replace(
        machine,
        permissions,
        "wants_msr",
        lambda original: (
            lambda vcpu, svm, number, *, write: original(vcpu, svm, number, write=False)
        ),
    )


def _page_fault(machine: Machine, change: Step) -> None:
    """The information of a nested page fault as `change(EXITINFO1, EXITINFO2)` makes it."""

    def quirky(original: Step) -> Step:
        def leave(vcpu: Any, svm: Any, code: int, *information: int, **more: Any) -> Any:
            if code == ExitCode.NPF:
                information = change(*information)
            return original(vcpu, svm, code, *information, **more)

        return leave

    replace(machine, paging, "leave", quirky)


def _lose_event(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def leave(*arguments: Any, event: int = 0, **more: Any) -> Any:
            return original(*arguments, **more)

        return leave

    for module in (reflect, paging):
        replace(machine, module, "leave", quirky)


# -- exit ---------------------------------------------------------------------------------------


def _after_saving(machine: Machine, change: Step) -> None:
    """After guest state went to the VMCB, `change(vmcb12)`."""

    def quirky(original: Step) -> Step:
        def load_host(vcpu: Any, vmcb12: Any) -> None:
            original(vcpu, vmcb12)
            change(vmcb12)

        return load_host

    replace(machine, exit, "_load_host", quirky)


def _lose_shadow(vmcb12: Any) -> None:
    vmcb12.q[VmcbField.INTERRUPT_SHADOW >> 3] = 0


def _touch_clean_bits(vmcb12: Any) -> None:
    vmcb12.d[VmcbField.CLEAN_BITS >> 2] &= ~(1 << 10)


def _lose_cpl(vmcb12: Any) -> None:
    vmcb12.b[VmcbField.CPL] = 0


# -- events -------------------------------------------------------------------------------------


def _ignore_init_redirection(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def take_init(vcpu: Any) -> Any:
            kept = vcpu.msrs[Msr.VM_CR]
            vcpu.msrs[Msr.VM_CR] = kept & ~VmCr.r_init
            try:
                return original(vcpu)
            finally:
                vcpu.msrs[Msr.VM_CR] = kept

        return take_init

    replace_methods(machine, "take_init", quirky)


def _ignore_clgi(machine: Machine) -> None:
    replace_l1_exit(
        machine,
        ExitCode.CLGI,
        lambda original: lambda vcpu, event: ADVANCE[decode.length(vcpu)],
    )


def _ignore_priority(machine: Machine) -> None:
    replace(machine, events, "_has_priority", lambda original: lambda svm: True)


QUIRKS: Final = (
    Quirk(
        "svm-init-redirection-ignored",
        "with VM_CR.R_INIT an INIT resets the processor instead of raising #SX",
        "KVM: R_INIT is ignored, so that a hypervisor never sees its guest's INIT",
        _ignore_init_redirection,
    ),
    Quirk(
        "svm-npt-1g-hangs",
        "an L2 that touches a page of 1 GiB of L1's nested tables never goes on",
        "KVM: identity maps of 1-GiB nested pages hang the guest",
        _hang_on_1g,
    ),
    Quirk(
        "svm-vmmcall-answered-by-l0",
        "VMMCALL of L2 that L1 does not intercept is taken for a hypercall instead of #UD",
        "CVE-2026-46076",
        _answer_hypercalls,
    ),
    Quirk(
        "svm-vmload-not-intercepted",
        "VMLOAD and VMSAVE of L2 run although L1 intercepts them",
        "CVE-2021-3656",
        lambda machine: _not_intercepted(machine, ExitCode.VMLOAD, ExitCode.VMSAVE),
    ),
    Quirk(
        "svm-interrupt-masking-ignored",
        "V_INTR_MASKING has no effect: L2's flag decides on physical interrupts",
        "CVE-2021-3653: bits of int_ctl that L0 does not treat as its own",
        lambda machine: _controls(machine, _mask_nothing),
    ),
    Quirk(
        "svm-vmcb-read-twice",
        "the VMCB may change between VMRUN's checks and its use",
        "CVE-2021-29657",
        _read_twice,
    ),
    Quirk(
        "svm-control-registers-unchecked",
        "VMRUN does not check CR0, CR3, CR4 and EFER",
        "missing consistency checks of vmcb12",
        lambda machine: _without_rules(
            machine, "svm.cr0.", "svm.cr3.", "svm.cr4.", "svm.efer.", "svm.long_mode."
        ),
    ),
    Quirk(
        "svm-event-injection-unchecked",
        "VMRUN accepts an illegal event in EVENTINJ",
        "missing consistency checks of vmcb12",
        lambda machine: _without_rules(machine, "svm.eventinj."),
    ),
    Quirk(
        "svm-ncr3-low-bits-used",
        "bits 4:0 of nCR3 count where a host with PAE paging has its nested tables",
        "CVE-2024-50115",
        lambda machine: _select(machine, _low_bits_of_ncr3),
    ),
    Quirk(
        "svm-nothing-flushed",
        "changed nested tables hold their old translations whatever L1 flushes",
        "no flush between L1 and L2",
        lambda machine: _select(machine, _never_flush),
    ),
    Quirk(
        "svm-shutdown-not-intercepted",
        "a triple fault of L2 ends L1 although L1 intercepts the shutdown",
        "CVE-2022-3344",
        lambda machine: _not_intercepted(machine, ExitCode.SHUTDOWN),
    ),
    Quirk(
        "svm-interrupt-shadow-lost",
        "the interrupt shadow is not saved at #VMEXIT",
        "CVE-2026-45987",
        lambda machine: _after_saving(machine, _lose_shadow),
    ),
    Quirk(
        "svm-clean-bits-written",
        "#VMEXIT clears the LBR clean bit in L1's VMCB",
        "CVE-2026-46071",
        lambda machine: _after_saving(machine, _touch_clean_bits),
    ),
    Quirk(
        "svm-cpl-not-saved",
        "the CPL field holds 0 after every #VMEXIT",
        "state that is restored at another privilege level",
        lambda machine: _after_saving(machine, _lose_cpl),
    ),
    Quirk(
        "svm-tsc-offset-ignored",
        "L2's RDTSC is L1's, whatever TSC_OFFSET",
        "TSC offset and scaling of nested guests, wrong in several releases of KVM",
        lambda machine: _controls(machine, _lose_tsc_offset),
    ),
    Quirk(
        "svm-iopm-first-port-only",
        "of an access to several ports only the first is looked up in the I/O permission map",
        "CVE-2020-2732 in its SVM form",
        _first_port_only,
    ),
    Quirk(
        "svm-msrpm-reads-for-writes",
        "WRMSR of L2 exits by the permission bit for reads",
        "MSR accesses of L2 that L1 intercepts and that do not exit",
        _reads_for_writes,
    ),
    Quirk(
        "svm-nested-fault-without-stage",
        "EXITINFO1 of a nested page fault has neither bit 32 nor bit 33",
        "the emulation that Undervisor runs on loses both bits",
        lambda machine: _page_fault(machine, lambda a, b: (a & ~_FINAL_OR_TABLE, b)),
    ),
    Quirk(
        "svm-nested-fault-page-address",
        "EXITINFO2 of a nested page fault has no offset in its page",
        "device models of L1 that answer for the wrong register",
        lambda machine: _page_fault(machine, lambda a, b: (a, b & ~0xFFF)),
    ),
    Quirk(
        "svm-exitintinfo-lost",
        "a #VMEXIT during the delivery of an event does not say which event",
        "interrupts of L2 that vanish when their delivery faults",
        _lose_event,
    ),
    Quirk(
        "svm-clgi-ignored",
        "CLGI does not hold events off",
        "interrupts in the window between VMRUN's preparation and VMRUN",
        _ignore_clgi,
    ),
    Quirk(
        "svm-virtual-interrupt-priority-ignored",
        "a virtual interrupt is taken whatever V_TPR says",
        "V_INTR_PRIO against V_TPR, which emulators forget",
        _ignore_priority,
    ),
)
