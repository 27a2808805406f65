"""Quirks of nested VMX."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.vmx.checks import (
    INSTRUCTION_ERRORS,
    EntryChecker,
    EntryFailure,
    check_vm_entry,
)
from undervisor.arch.vmx.checks.declare import State
from undervisor.arch.vmx.controls import (
    InterruptionType,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.ept import Translation
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4, Efer
from undervisor.hypervisor.nested import INIT_BLOCKED
from undervisor.hypervisor.nested.vmx import (
    controls,
    entry,
    events,
    exit,
    instructions,
    msr_lists,
    paging,
    permissions,
    timers,
    virtual_interrupts,
)
from undervisor.hypervisor.quirks.quirk import Quirk, Step, replace, replace_methods
from undervisor.silicon.world import ExitCode

if TYPE_CHECKING:
    from undervisor.arch.vmx.capabilities import VmxCapabilities
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.models import CpuModel

_SHADOWS: Final = 3  # blocking by STI and by MOV SS
_LINEAR: Final = 0x180  # linear address valid, and whether it is the final access
_PAGE_1G: Final = 30


_POSTED_FLAGS: Final = 32  # behind the requests of a posted-interrupt descriptor
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr")


# -- what the processor says --------------------------------------------------------------------


def _with_vmx(model: CpuModel, vmx: VmxCapabilities) -> CpuModel:
    """A copy of the model with other VMX capabilities; a model without VMX stays as it is."""
    copy = changed(model)
    copy.__dict__["vmx"] = vmx
    return copy


def _without_xsaves_control(model: CpuModel) -> CpuModel:
    if model.vmx is None:
        return model
    words = dict(model.vmx.controls)
    secondary = words[F.SECONDARY_CONTROLS]
    words[F.SECONDARY_CONTROLS] = changed(
        secondary, may_be_one=secondary.may_be_one & ~SecondaryControls.enable_xsaves
    )
    return _with_vmx(model, changed(model.vmx, controls=words))


def _with_width(model: CpuModel, difference: int) -> CpuModel:
    if model.vmx is None:
        return model
    width = model.vmx.processor.physical_address_width + difference
    processor = changed(model.vmx.processor, physical_address_width=width)
    return _with_vmx(model, changed(model.vmx, processor=processor))


# -- entry --------------------------------------------------------------------------------------


def _clear_lme(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def efer(vcpu: Any, nested: Any, fields: Any) -> Any:
            value = original(vcpu, nested, fields)
            chosen = nested.loads_efer or nested.ia32e_mode_guest
            return value if chosen else value & ~Efer.lme

        return efer

    replace(machine, entry, "guest_efer", quirky)


class _Lenient(EntryChecker):
    """The checks of VM entry without the rules whose ids begin so."""

    __slots__ = ("_ignored", "_known")

    def __init__(self, capabilities: VmxCapabilities, ignored: tuple[str, ...]) -> None:
        super().__init__(capabilities)
        self._known, self._ignored = capabilities, ignored

    def check(self, state: State, written: Collection[int]) -> EntryFailure | None:
        """The first broken rule that is not ignored."""
        for violation in check_vm_entry(state, self._known).broken:
            rule = violation.rule
            if rule.id.startswith(self._ignored):
                continue
            error = INSTRUCTION_ERRORS.get(rule.outcome)
            reason = None if error else ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE
            return EntryFailure(violation, error, reason, rule.qualification)
        return None


def _without_rules(machine: Machine, *ignored: str) -> None:
    for vcpu in machine.vcpus:
        store: Any = vcpu.nested.vmx.store  # type: ignore[attr-defined]
        load, capabilities = store.load, machine.model.vmx

        def lenient(gpa: int, load: Step = load, capabilities: Any = capabilities) -> Any:
            vmcs = load(gpa)
            vmcs.checker = _Lenient(capabilities, ignored)
            return vmcs

        store.load = lenient


def _merged(machine: Machine, change: Step) -> None:
    """After the controls of a VMCS were taken over, `change(nested)`."""

    def quirky(original: Step) -> Step:
        def merge(vcpu: Any, nested: Any, vmcs: Any) -> None:
            original(vcpu, nested, vmcs)
            change(nested)

        return merge

    replace(machine, controls, "merge", quirky)


def _lose_monitor_trap(nested: Any) -> None:
    nested.primary &= ~PrimaryControls.monitor_trap_flag


def _lose_tsc_offset(nested: Any) -> None:
    nested.tsc_offset = 0


def _failure_without_bit_31(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def leave(vcpu: Any, nested: Any, reason: int, qualification: int) -> Any:
            return original(vcpu, nested, reason & 0xFFFF, qualification)

        return leave

    replace(machine, exit, "leave_failed_entry", quirky)


def _skip_msr_loads(machine: Machine) -> None:
    replace(machine, msr_lists, "load", lambda original: lambda *arguments: 0)


def _keep_launched(machine: Machine) -> None:
    for vcpu in machine.vcpus:
        vcpu.nested.vmx.store.clear = lambda gpa: None  # type: ignore[attr-defined]


def _check_no_privilege(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def check(vcpu: Any, nested: Any) -> None:
            if not vcpu.state.cpl:
                original(vcpu, nested)

        return check

    replace(machine, instructions, "_check_faults", quirky)


# -- while L2 runs ------------------------------------------------------------------------------


def _stale_cr4_shadow(machine: Machine) -> None:
    """Another processor's turn in the middle of L2 leaves L1's CR4 in the read shadow."""
    switch = machine._switch
    stale: set[int] = set()

    def switching(old: Any, new: Any) -> None:
        if old.in_l2:
            stale.add(old.index)
        switch(old, new)

    machine._switch = switching  # type: ignore[method-assign]

    def quirky(original: Step) -> Step:
        def reflect(vcpu: Any, event: Any) -> Any:
            reads = event.code == ExitCode.CR4_READ and vcpu.index in stale
            fields = vcpu.nested.fields
            shadow = fields[F.CR4_READ_SHADOW]
            if reads:
                fields[F.CR4_READ_SHADOW] = shadow | Cr4.vmxe
            verdict = original(vcpu, event)
            if reads:
                fields[F.CR4_READ_SHADOW] = shadow
            if not vcpu.in_l2:
                stale.discard(vcpu.index)
            return verdict

        return reflect

    replace_methods(machine, "reflect", quirky)


def _first_port_only(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        return lambda memory, primary, fields, port, size: original(
            memory, primary, fields, port, 1
        )

    replace(machine, permissions, "port_exits", quirky)


def _reads_for_writes(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        return lambda memory, primary, fields, number, *, write: original(
            memory, primary, fields, number, write=False
        )

    replace(machine, permissions, "msr_exits", quirky)


def _block_init(machine: Machine) -> None:
    replace_methods(machine, "take_init", lambda original: lambda vcpu: INIT_BLOCKED)


def _never_block_nmis(machine: Machine) -> None:
    replace(machine, events, "block_nmi", lambda original: lambda vcpu, nested: None)


# -- EPT ----------------------------------------------------------------------------------------


def _hang_on_1g(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def fill(vcpu: Any, nested: Any, gpa: int, found: Translation, *, written: bool) -> None:
            if found.page_shift < _PAGE_1G:
                original(vcpu, nested, gpa, found, written=written)

        return fill

    replace(machine, paging, "fill", quirky)


def _set_no_flags(machine: Machine) -> None:
    replace(machine, paging, "_update_flags", lambda original: lambda vcpu, translation: None)


def _ignore_invept(machine: Machine) -> None:
    replace(machine, paging, "invalidate", lambda original: lambda nested, eptp: None)


def _ept_information(machine: Machine, change: Step) -> None:
    def quirky(original: Step) -> Step:
        def leave(vcpu: Any, nested: Any, reason: Any, qualification: int = 0, **more: int) -> Any:
            if reason == ExitReason.EPT_VIOLATION:
                qualification, more["physical"] = change(qualification, more["physical"])
            return original(vcpu, nested, reason, qualification, **more)

        return leave

    replace(machine, exit, "leave", quirky)


# -- exit ---------------------------------------------------------------------------------------


def _lose_vectoring(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def record(vcpu: Any, nested: Any, fields: Any) -> None:
            original(vcpu, nested, fields)
            fields[F.IDT_VECTORING_INFORMATION] = 0

        return record

    replace(machine, exit, "record_vectoring", quirky)


def _lose_privileged_vectoring(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def record(vcpu: Any, nested: Any, fields: Any) -> None:
            original(vcpu, nested, fields)
            kind = fields[F.IDT_VECTORING_INFORMATION] >> 8 & 7
            if kind == InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION:
                fields[F.IDT_VECTORING_INFORMATION] = 0

        return record

    replace(machine, exit, "record_vectoring", quirky)


def _need_outstanding(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def take(vcpu: Any, nested: Any) -> None:
            flags = nested.fields[F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS] + _POSTED_FLAGS
            if vcpu.memory.u32(flags) & 1:
                original(vcpu, nested)

        return take

    replace(machine, virtual_interrupts, "take_posted", quirky)


def _lose_shadow(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def save(vcpu: Any, nested: Any, vmcs: Any) -> None:
            original(vcpu, nested, vmcs)
            vmcs.fields[F.GUEST_INTERRUPTIBILITY_STATE] &= ~_SHADOWS

        return save

    replace(machine, exit, "save_guest_state", quirky)


def _save_no_timer(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def save(vcpu: Any, nested: Any, fields: Any) -> None:
            before = fields[F.PREEMPTION_TIMER_VALUE]
            original(vcpu, nested, fields)
            fields[F.PREEMPTION_TIMER_VALUE] = before

        return save

    replace(machine, timers, "save", quirky)


QUIRKS: Final = (
    Quirk(
        "vmx-xsaves-control-withheld",
        'CPUID shows XSAVES, but no VMCS may set "enable XSAVES/XRSTORS": L2 gets #UD',
        "KVM under QEMU: the secondary controls of L1 lack the XSAVES bit",
        model=_without_xsaves_control,
    ),
    Quirk(
        "vmx-address-width-one-less",
        "addresses in the VMCS may have one bit less than CPUID's physical-address width",
        "KVM: a guest of 40 bits on a host of 39",
        model=lambda model: _with_width(model, -1),
    ),
    Quirk(
        "vmx-address-width-one-more",
        "addresses in the VMCS may have one bit more than CPUID's physical-address width",
        "too small a MAXPHYADDR in L1: entries succeed that hardware refuses",
        model=lambda model: _with_width(model, 1),
    ),
    Quirk(
        "vmx-stale-cr4-read-shadow",
        "after L0 was interrupted in L2, L2 reads L1's CR4.VMXE",
        "KVM with a VMM that writes CR4 back after an exit that carries L2's state",
        _stale_cr4_shadow,
    ),
    Quirk(
        "vmx-guest-cr4-unchecked",
        "VM entry does not check the guest's CR4 against the fixed bits",
        "CVE-2023-30456",
        lambda machine: _without_rules(machine, "vmx.guest.cr4."),
    ),
    Quirk(
        "vmx-host-state-unchecked",
        "VM entry does not check the host-state area",
        "a missing check of a host field ends in a crash of L1 at the next exit",
        lambda machine: _without_rules(machine, "vmx.host."),
    ),
    Quirk(
        "vmx-reserved-rights-unchecked",
        "reserved bits of a segment's access rights do not fail VM entry",
        "KVM of Linux 6.1 drops them at VMWRITE",
        lambda machine: _without_rules(machine, *(f"vmx.guest.{s}.reserved-" for s in _SEGMENTS)),
    ),
    Quirk(
        "vmx-hlt-state-unchecked",
        "VM entry into HLT does not look at SS.DPL, blocking, or the event",
        "KVM of Linux 6.1: L2 halts for ever",
        lambda machine: _without_rules(
            machine, *(f"vmx.guest.activity.{name}" for name in ("hlt-", "blocking"))
        ),
    ),
    Quirk(
        "vmx-link-pointer-current",
        "the VMCS link pointer may be the current-VMCS pointer",
        "KVM of Linux 6.1",
        lambda machine: _without_rules(machine, "vmx.guest.link.current"),
    ),
    Quirk(
        "vmx-lme-cleared",
        "an entry outside IA-32e mode clears EFER.LME without paging too",
        "KVM of Linux 6.1",
        _clear_lme,
    ),
    Quirk(
        "vmx-posted-needs-outstanding",
        "the notification vector is ignored where the outstanding-notification bit is 0",
        "KVM of Linux 6.1",
        _need_outstanding,
    ),
    Quirk(
        "vmx-privilege-unchecked",
        "VMX instructions work at any privilege level",
        "CVE-2018-12904",
        _check_no_privilege,
    ),
    Quirk(
        "vmx-io-bitmap-first-port-only",
        "of an access to several ports only the first is looked up in the I/O bitmaps",
        "CVE-2020-2732: instructions of L2 that reach resources that L1 intercepts",
        _first_port_only,
    ),
    Quirk(
        "vmx-msr-bitmap-reads-for-writes",
        "WRMSR of L2 exits by the bitmap for reads",
        "CVE-2019-3887: an MSR access of L2 that L1 intercepts and that does not exit",
        _reads_for_writes,
    ),
    Quirk(
        "vmx-monitor-trap-flag-lost",
        "the monitor trap flag causes no VM exit",
        "MTF pending across save and restore was lost before KVM_STATE_NESTED_MTF_PENDING",
        lambda machine: _merged(machine, _lose_monitor_trap),
    ),
    Quirk(
        "vmx-tsc-offset-ignored",
        "L2's RDTSC is L1's, whatever the TSC offset",
        "TSC offset and scaling of nested guests, wrong in several releases of KVM",
        lambda machine: _merged(machine, _lose_tsc_offset),
    ),
    Quirk(
        "vmx-entry-failure-without-bit-31",
        "a VM-entry failure looks like an ordinary VM exit",
        "hypervisors that look at the basic reason only",
        _failure_without_bit_31,
    ),
    Quirk(
        "vmx-msr-load-list-skipped",
        "VM entry and VM exit load no MSRs from their lists",
        "MSR lists that L0 forgets when it merges its own",
        _skip_msr_loads,
    ),
    Quirk(
        "vmx-vmclear-keeps-launched",
        "VMCLEAR does not make the launch state clear",
        "a VMCS that cannot be launched again",
        _keep_launched,
    ),
    Quirk(
        "vmx-init-dropped-in-l2",
        "INIT in VMX non-root operation stays pending instead of causing a VM exit",
        "application processors that hang when L1's guest starts them",
        _block_init,
    ),
    Quirk(
        "vmx-nmi-not-blocked",
        "an injected NMI does not block further NMIs",
        "virtual NMIs that arrive in the handler of an NMI",
        _never_block_nmis,
    ),
    Quirk(
        "vmx-ept-1g-hangs",
        "an L2 that touches a page of 1 GiB of L1's EPT never goes on",
        "KVM: identity maps of 1-GiB nested pages hang the guest",
        _hang_on_1g,
    ),
    Quirk(
        "vmx-ept-flags-not-set",
        "accessed and dirty flags of L1's EPT stay clear",
        "dirty logging of L1 that misses L2's writes",
        _set_no_flags,
    ),
    Quirk(
        "vmx-invept-ignored",
        "translations of L2 survive INVEPT",
        "no flush between L1 and L2 after L1 changed its EPT",
        _ignore_invept,
    ),
    Quirk(
        "vmx-ept-linear-address-missing",
        "an EPT violation does not say that its guest-linear address is valid",
        "L1s that walk L2's page tables in vain",
        lambda machine: _ept_information(machine, lambda q, gpa: (q & ~_LINEAR, gpa)),
    ),
    Quirk(
        "vmx-ept-violation-page-address",
        "the guest-physical address of an EPT violation has no offset in its page",
        "device models of L1 that answer for the wrong register",
        lambda machine: _ept_information(machine, lambda q, gpa: (q, gpa & ~0xFFF)),
    ),
    Quirk(
        "vmx-idt-vectoring-lost",
        "a VM exit during the delivery of an event does not say which event",
        "interrupts of L2 that vanish when their delivery faults",
        _lose_vectoring,
    ),
    Quirk(
        "vmx-int1-vectoring-lost",
        "a VM exit during the delivery of INT1 does not say which event",
        "KVM of Linux 6.1 loses INT1 when it interrupts the delivery itself",
        _lose_privileged_vectoring,
    ),
    Quirk(
        "vmx-interrupt-shadow-lost",
        "the interruptibility state saved at an exit has no blocking by STI or MOV SS",
        "CVE-2026-45987, in its VMX form",
        _lose_shadow,
    ),
    Quirk(
        "vmx-preemption-timer-not-saved",
        "the VMX-preemption timer's value is not saved at VM exits that ask for it",
        "timers of L1 that never expire",
        _save_no_timer,
    ),
)
