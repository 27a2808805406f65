"""RDMSR and WRMSR: an MSR that the model does not have raises #GP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from undervisor.arch.x86.events import GP0, Fault, GuestFault
from undervisor.arch.x86.msr import Msr, unlock_svm
from undervisor.arch.x86.registers import legalize_efer
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.layout import Env

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_X2APIC: Final = range(0x800, 0x900)

# MSRs that are state of the silicon, by the attribute that holds them.
_STATE: Final[dict[int, str]] = {
    Msr.EFER: "efer",
    Msr.STAR: "star",
    Msr.LSTAR: "lstar",
    Msr.CSTAR: "cstar",
    Msr.FMASK: "sfmask",
    Msr.KERNEL_GS_BASE: "kernel_gs_base",
    Msr.SYSENTER_CS: "sysenter_cs",
    Msr.SYSENTER_ESP: "sysenter_esp",
    Msr.SYSENTER_EIP: "sysenter_eip",
}
_BASES: Final[dict[int, Env]] = {Msr.FS_BASE: Env.FS, Msr.GS_BASE: Env.GS}


def access(vcpu: Vcpu, exit: Exit) -> Verdict:
    """RDMSR or WRMSR, by EXITINFO1."""
    q = vcpu.state.q
    number = q[1] & 0xFFFF_FFFF
    if exit.info1 & 1:
        value = (q[2] & 0xFFFF_FFFF) << 32 | q[0] & 0xFFFF_FFFF
        fault = write(vcpu, number, value)
        return Inject(fault) if fault else ADVANCE[decode.length(vcpu)]
    result = read(vcpu, number)
    if isinstance(result, Fault):
        return Inject(result)
    q[0], q[2] = result & 0xFFFF_FFFF, result >> 32
    return ADVANCE[decode.length(vcpu)]


def read(vcpu: Vcpu, number: int) -> int | Fault:
    """The value that RDMSR gives, or its fault."""
    if number in _X2APIC:
        return _x2apic(lambda: vcpu.lapic.read_msr(number))
    spec = vcpu.msr_specs.get(number)
    if spec is None or not spec.readable:
        return GP0
    if number in _STATE:
        return int(getattr(vcpu.state, _STATE[number]))
    if number in _BASES:
        return vcpu.state.segment_base(_BASES[number])
    live = _LIVE_READS.get(number)
    return live(vcpu) if live else vcpu.msrs[number]


def write(vcpu: Vcpu, number: int, value: int) -> Fault | None:
    """Carry out WRMSR; its fault where there is one."""
    if number in _X2APIC:
        done = _x2apic(lambda: vcpu.lapic.write_msr(number, value))
        return done if isinstance(done, Fault) else None
    spec = vcpu.msr_specs.get(number)
    if spec is None:
        return GP0
    old = read(vcpu, number) if spec.readable else vcpu.msrs.get(number, 0)
    assert isinstance(old, int), "an MSR that can be read was read"
    legal = spec.legalize(old, value, vcpu.rules, vcpu.all_msrs())
    if isinstance(legal, Fault):
        return legal
    if number == Msr.SVM_LOCK_KEY:
        vcpu.msrs[Msr.VM_CR] = unlock_svm(vcpu.msrs[Msr.VM_CR], old, value)
    return store(vcpu, number, legal)


def store(vcpu: Vcpu, number: int, value: int) -> Fault | None:
    """Put a legal value where the MSR lives."""
    live = _LIVE_WRITES.get(number)
    if live is not None:
        return live(vcpu, value)
    if number in _STATE:
        setattr(vcpu.state, _STATE[number], value)
    elif number in _BASES:
        vcpu.state.set_segment_base(_BASES[number], value)
    else:
        vcpu.msrs[number] = value
    return None


def _x2apic(access: Callable[[], int | None]) -> int | Fault:
    try:
        return access() or 0
    except GuestFault as fault:
        return fault.fault


def _write_efer(vcpu: Vcpu, value: int) -> Fault | None:
    state = vcpu.state
    legal = legalize_efer(
        state.efer, value, supported=vcpu.model.efer_supported(vcpu.msrs), cr0=state.cr0
    )
    if isinstance(legal, Fault):
        return legal
    if legal != state.efer:
        vcpu.set_efer(legal)
    return None


def _write_apic_base(vcpu: Vcpu, value: int) -> Fault | None:
    try:
        vcpu.lapic.write_apic_base(value)
    except GuestFault as fault:
        return fault.fault
    return None


def _write_tsc(vcpu: Vcpu, value: int) -> None:
    """The write moves the offset, and TSC_ADJUST with it. SDM 3B "Time-Stamp Counter"."""
    vcpu.move_tsc(value - vcpu.tsc01())


def _write_tsc_adjust(vcpu: Vcpu, value: int) -> None:
    vcpu.move_tsc(value - vcpu.tsc_adjust)


def _nothing(vcpu: Vcpu, value: int) -> None:
    """A command MSR whose effect does not exist here."""


_LIVE_READS: Final[dict[int, Callable[[Vcpu], int]]] = {
    Msr.TSC: lambda vcpu: vcpu.tsc(),
    Msr.TSC_ADJUST: lambda vcpu: vcpu.tsc_adjust & _MASK64,
    Msr.APIC_BASE: lambda vcpu: vcpu.lapic.apic_base,
    Msr.TSC_DEADLINE: lambda vcpu: vcpu.lapic.timer.tsc_deadline,
    Msr.MPERF: lambda vcpu: vcpu.tsc(),
    Msr.APERF: lambda vcpu: vcpu.tsc(),
}

_LIVE_WRITES: Final[dict[int, Callable[[Vcpu, int], Fault | None]]] = {
    Msr.EFER: _write_efer,
    Msr.APIC_BASE: _write_apic_base,
    Msr.TSC: _write_tsc,
    Msr.TSC_ADJUST: _write_tsc_adjust,
    Msr.TSC_DEADLINE: lambda vcpu, value: vcpu.lapic.timer.write_tsc_deadline(value),
    Msr.PRED_CMD: _nothing,
    Msr.FLUSH_CMD: _nothing,
}
