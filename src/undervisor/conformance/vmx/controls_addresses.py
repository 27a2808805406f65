"""Physical addresses in a VMCS and in the pointers of VMX instructions: width and alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import EPTP, VmxLab
from undervisor.conformance.vmx.needs import offered
from undervisor.guest.probe.answers import VmxOutcome

BAD_GUEST: Final[dict[int, int]] = {F.GUEST_RFLAGS: 0}
CHECKS: Final = "SDM: VMX Controls and Host-State Area Checks: VM-Execution Control Fields"
BAD_HOST: Final[dict[int, int]] = {F.HOST_CS_SELECTOR: 0}
"""A host state that fails with error 8: entry got past the controls, and nothing was run."""


def _width(lab: VmxLab) -> int:
    """The width of addresses in VMX structures: MAXPHYADDR, or 32 with IA32_VMX_BASIC bit 48."""
    if lab.facts.basic.addresses_32_bit:
        return 32
    return lab.l1.cpuid(0x80000008).value["rax"] & 0xFF


def _address_fields(lab: VmxLab) -> dict[F, dict[int, int]]:
    """Each field with an address that error 7 checks, and what makes it count."""
    places = lab.places

    def ept(**more: int) -> dict[int, int]:
        base: dict[int, int] = {F.EPT_POINTER: places.nested | EPTP}
        return lab.secondary(lab.secondary(base, enable_ept=1), **more)

    def shadowing() -> dict[int, int]:
        read = {F.VMREAD_BITMAP_ADDRESS: places.read_bitmap}
        write = {F.VMWRITE_BITMAP_ADDRESS: places.write_bitmap}
        return lab.secondary(vmcs_shadowing=1) | read | write

    def shadow() -> dict[int, int]:
        page = {F.VIRTUAL_APIC_ADDRESS: places.apic_page, F.TPR_THRESHOLD: 0}
        return lab.primary(use_tpr_shadow=1) | page

    ways: dict[F, Callable[[], dict[int, int]]] = {
        F.IO_BITMAP_A_ADDRESS: lambda: lab.primary(use_io_bitmaps=1),
        F.IO_BITMAP_B_ADDRESS: lambda: lab.primary(use_io_bitmaps=1),
        F.MSR_BITMAP_ADDRESS: lambda: lab.primary(use_msr_bitmaps=1),
        F.VIRTUAL_APIC_ADDRESS: shadow,
        F.APIC_ACCESS_ADDRESS: lambda: lab.secondary(virtualize_apic_accesses=1),
        F.EPT_POINTER: ept,
        F.PML_ADDRESS: lambda: ept(enable_pml=1),
        F.VMREAD_BITMAP_ADDRESS: shadowing,
        F.VMWRITE_BITMAP_ADDRESS: shadowing,
        F.EPTP_LIST_ADDRESS: lambda: ept(enable_vm_functions=1) | {F.VM_FUNCTION_CONTROLS: 1},
        F.ENTRY_MSR_LOAD_ADDRESS: lambda: {F.ENTRY_MSR_LOAD_COUNT: 1},
        F.EXIT_MSR_LOAD_ADDRESS: lambda: {F.EXIT_MSR_LOAD_COUNT: 1},
        F.EXIT_MSR_STORE_ADDRESS: lambda: {F.EXIT_MSR_STORE_COUNT: 1},
    }
    return offered(ways)


def _errors(
    lab: VmxLab,
    address: Callable[[F], int],
    more: dict[int, int],
    wanted: Callable[[F], bool] = lambda field: True,
) -> dict[F, int]:
    """The error of an entry with an address in each field alone, by field."""
    fields = {f: base for f, base in _address_fields(lab).items() if wanted(f)}
    cases = [
        base | more | {field: address(field) | (EPTP if field is F.EPT_POINTER else 0)}
        for field, base in fields.items()
    ]
    return {f: run.result.error for f, run in zip(fields, lab.sweep(cases), strict=True)}


@guest_test(CHECKS, "SDM: Basic VMX Information")
def an_address_just_past_the_width_is_refused(lab: VmxLab) -> None:
    """No physical address in a VMCS may set a bit beyond the physical-address width: error 7."""
    past = 1 << _width(lab)
    # The guest state is bad as well, which is found later: whoever takes the address goes no
    # further.  Only the list that an exit loads would be used in any case; so it comes last.
    for fields in (lambda f: f is not F.EXIT_MSR_LOAD_ADDRESS, lambda f: True):
        errors = _errors(lab, lambda field: past, BAD_GUEST, fields)
        each("the error of an address past the width in", errors,
             Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)  # fmt: skip


@guest_test(CHECKS, "SDM: Basic VMX Information")
def an_address_just_below_the_width_is_accepted(lab: VmxLab) -> None:
    """Every physical address within the physical-address width is a valid one.

    The host state is bad, so that no entry comes to use what is at the address.
    """
    last = (1 << _width(lab)) - 0x1000
    each("the error of bad host state with the last address in",
         _errors(lab, lambda field: last, BAD_HOST),
         Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)  # fmt: skip


@guest_test(CHECKS)
def an_address_that_is_not_aligned_is_refused(lab: VmxLab) -> None:
    """Bits 11:0 of the addresses of pages must be 0, bits 3:0 of those of MSR areas: error 7."""

    def unaligned(field: F) -> int:
        area = field.name.endswith(("MSR_LOAD_ADDRESS", "MSR_STORE_ADDRESS"))
        return lab.places.free | (1 << 3 if area else 1 << 11)

    errors = _errors(lab, unaligned, {})
    errors.pop(F.EPT_POINTER, None)  # bit 11 is one of its reserved bits, not of an address
    each("the error of an unaligned address in", errors, Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)


@guest_test("SDM: Checks on Guest Control Registers, Debug Registers, and MSRs",
            "SDM: Checks on Host Control Registers, MSRs, and SSP")  # fmt: skip
def cr3_just_past_the_width_is_refused(lab: VmxLab) -> None:
    """CR3 of the guest and of the host may not set bits beyond the physical-address width."""
    width = lab.l1.cpuid(0x80000008).value["rax"] & 0xFF
    guest, last = lab.sweep([{F.GUEST_CR3: 1 << width}, {F.GUEST_CR3: (1 << width) - 0x1000}])
    guest.entry_fails(ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE, 0)
    true("an entry with the last CR3 is no failed one", not last.failed_entry, last.describe())
    # An L0 that takes it loses L1 at the exit; so it comes last.
    (host,) = lab.sweep([{F.HOST_CR3: 1 << width}])
    host.fails_valid(Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)


@guest_test("SDM: Checks on Guest Non-Register State")
def a_link_pointer_just_past_the_width_is_refused(lab: VmxLab) -> None:
    """The VMCS link pointer may not set bits beyond the width: failure with qualification 4."""
    (run,) = lab.sweep([{F.VMCS_LINK_POINTER: 1 << _width(lab)}])
    run.entry_fails(ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE, 4)


@guest_test("SDM: VMPTRLD—Load Pointer to Virtual-Machine Control Structure",
            "SDM: VMCLEAR—Clear Virtual-Machine Control Structure")  # fmt: skip
def pointers_of_vmx_instructions_keep_the_width(lab: VmxLab) -> None:
    """VMCLEAR and VMPTRLD fail with errors 2 and 9 past the width, and not just below it."""
    width = _width(lab)
    past, last = 1 << width, (1 << width) - 0x1000
    with lab.batch() as batch:
        clear, load = batch.vmclear(past), batch.vmptrld(past)
        clear_last, load_last = batch.vmclear(last), batch.vmptrld(last)
    equal("the error of VMCLEAR past the width", clear.value.error,
          Error.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS)  # fmt: skip
    equal("the error of VMPTRLD past the width", load.value.error,
          Error.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS)  # fmt: skip
    true("VMCLEAR takes the last address",
         clear_last.value.error != Error.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS)  # fmt: skip
    true("VMPTRLD takes the last address",
         load_last.value.error != Error.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS)  # fmt: skip


@guest_test("SDM: VMXON—Enter VMX Operation")
def vmxon_just_past_the_width_fails(lab: VmxLab) -> None:
    """VMXON with a pointer beyond the physical-address width is VMfailInvalid."""
    width = _width(lab)
    with lab.batch() as batch:
        batch.vmxoff()
        result = batch.vmxon(1 << width)
        good = batch.vmxon(lab.places.region)
    equal("the outcome of VMXON", result.value.outcome, VmxOutcome.FAIL_INVALID)
    equal("the outcome of VMXON within the width", good.value.outcome, VmxOutcome.SUCCEED)
