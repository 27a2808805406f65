"""VM entries that fail: with which error, in which order, and what they leave as it was."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.arch.vmx.controls import EntryControls, PrimaryControls, SecondaryControls
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control
from undervisor.guest.probe.answers import REGISTERS

BAD_CONTROLS: Final[dict[int, int]] = {F.CR3_TARGET_COUNT: 257}
BAD_HOST: Final[dict[int, int]] = {F.HOST_CS_SELECTOR: 0}
BAD_GUEST: Final[dict[int, int]] = {F.GUEST_RFLAGS: 0}
"""Bit 1 of RFLAGS must be 1."""
INVALID: Final = ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE
VALID: Final = 1 << 31
KEPT_MSRS: Final = (Msr.EFER, Msr.PAT, Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP,
                    Msr.FS_BASE, Msr.GS_BASE, Msr.KERNEL_GS_BASE, Msr.STAR, Msr.LSTAR,
                    Msr.FMASK)  # fmt: skip


@guest_test("SDM: VM Entries", "SDM: VM-Entry Failures During or After Loading Guest State")
def controls_and_host_are_checked_before_the_guest(lab: VmxLab) -> None:
    """Bad controls (error 7) and bad host state (error 8) are found before bad guest state.

    Which of the first two is reported where both are bad is the processor's choice.
    """
    controls, host, both, guest = lab.sweep(
        [BAD_CONTROLS | BAD_GUEST, BAD_HOST | BAD_GUEST, BAD_CONTROLS | BAD_HOST, BAD_GUEST]
    )
    controls.fails_valid(Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)
    host.fails_valid(Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)
    true("bad controls and host state are error 7 or 8", both.result.error in (7, 8),
         both.describe())  # fmt: skip
    guest.entry_fails(INVALID, 0)


@guest_test("SDM: VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine", "SDM: Basic VM-Entry Checks")
def the_launch_state_is_checked_before_the_fields(lab: VmxLab) -> None:
    """VMLAUNCH of a launched VMCS fails with 4, VMRESUME of a clear one with 5."""
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    with lab.batch() as batch:
        batch.vmwrite(F.CR3_TARGET_COUNT, 257)
        launched = batch.vmlaunch()
        batch.vmclear(lab.places.control)
        batch.vmptrld(lab.places.control)
        clear = batch.vmresume()
    equal("the error of VMLAUNCH", launched.value.error, Error.VMLAUNCH_WITH_NON_CLEAR_VMCS)
    equal("the error of VMRESUME", clear.value.error, Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)


FAILURES: Final[dict[str, object]] = {
    "controls": BAD_CONTROLS, "host state": BAD_HOST, "guest state": BAD_GUEST,
}  # fmt: skip


@guest_test("SDM: VM Entries", "SDM: VM-Entry Failures During or After Loading Guest State",
            cases=FAILURES)  # fmt: skip
def a_failed_entry_leaves_l1_whole(lab: VmxLab, bad: Changes) -> None:
    """After a failed entry L1 has its general registers, control registers and MSRs."""
    registers = {name: 0x1111 * (n + 1) for n, name in enumerate(REGISTERS) if name != "rsp"}
    numbers = (0, 3, 4)
    with lab.batch() as batch:
        msrs = {msr: batch.rdmsr(msr) for msr in KEPT_MSRS}
        batch.write_cr(2, 0xABC000)
    run = lab.run("cpuid", bad, registers)
    with lab.batch() as batch:
        after = {msr: batch.rdmsr(msr) for msr in KEPT_MSRS}
        crs = {number: batch.read_cr(number) for number in (*numbers, 2)}
    true("L2 did not run", not run.entered or run.failed_entry, run.describe())
    kept = {name: run.registers[name] for name in registers if name != "r10"}
    each("L1's register", dict(kept), lambda name: registers[name])
    l1 = lab.facts.l1
    each("L1's CR", {number: cr.value for number, cr in crs.items()},
         {0: l1.cr0, 3: l1.cr3, 4: l1.cr4, 2: 0xABC000}.get)  # fmt: skip
    each("L1's MSR", {msr: answer.value for msr, answer in after.items()},
         lambda msr: msrs[msr].value)  # fmt: skip


@guest_test("SDM: VM Entries", "SDM: VM-Entry Failures During or After Loading Guest State",
            cases=FAILURES)  # fmt: skip
def a_failed_entry_changes_no_field_and_not_the_launch_state(lab: VmxLab, bad: Changes) -> None:
    """A failed entry writes no guest-state and no control field, and the VMCS stays clear.

    Mended, it is entered by VMLAUNCH.
    """
    lab.run("cpuid", bad | {F.ENTRY_INTERRUPTION_INFORMATION: VALID | 4 << 8 | 0x80,
                            F.ENTRY_INSTRUCTION_LENGTH: 2})  # fmt: skip
    fields = [f for f in {**lab.fields, **bad, F.ENTRY_INTERRUPTION_INFORMATION: 0}
              if F(f) in lab.known and F(f) not in (F.HOST_RIP, F.HOST_RSP)]  # fmt: skip
    with lab.batch() as batch:
        values = batch.vmreads(fields, lab.places.scratch)
        resumed = batch.vmresume()
    want = {**lab.fields, **bad, F.ENTRY_INTERRUPTION_INFORMATION: VALID | 4 << 8 | 0x80}
    each("VMREAD after the failure gives in",
         {F(f): value for f, value in values.value.items()}, lambda f: want[f])  # fmt: skip
    equal("the error of VMRESUME", resumed.value.error, Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)
    good = {field: lab.fields.get(field, 0) for field in bad}
    lab.resume(good | {F.ENTRY_INTERRUPTION_INFORMATION: 0}).exits_with(ExitReason.CPUID)


@guest_test("SDM: VM Entries", "SDM: VM Instruction Error Numbers")
def vmfail_changes_no_exit_information(lab: VmxLab) -> None:
    """An entry that is VMfailValid writes none of the VM-exit information fields but the error."""
    lab.run("mov $5, %eax; cpuid").exits_with(ExitReason.CPUID)
    fields = [f for f in lab.known if f.area is FieldArea.READ_ONLY
              and f is not F.VM_INSTRUCTION_ERROR]  # fmt: skip
    with lab.batch() as batch:
        before = batch.vmreads(fields, lab.places.scratch)
        batch.vmwrite(F.CR3_TARGET_COUNT, 257)
        failed = batch.vmresume()
        after = batch.vmreads(fields, lab.places.scratch + 0x1000)
    equal("the error", failed.value.error, Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)
    each("after the failure", dict(after.value), lambda f: before.value[f])


@guest_test("SDM: VM-Entry Failures During or After Loading Guest State")
def a_failure_with_guest_state_sets_bit_31_and_loads_the_host(lab: VmxLab) -> None:
    """Failure 33 sets bit 31 of the exit reason and loads the host's state as an exit does."""
    host: dict[int, int] = {F.HOST_FS_BASE: 0x123000, F.HOST_SYSENTER_EIP: 0x456000}
    run = lab.run("cpuid", BAD_GUEST | host)
    with lab.batch() as batch:
        base, entry = batch.rdmsr(Msr.FS_BASE), batch.rdmsr(Msr.SYSENTER_EIP)
        dr7 = batch.read_dr(7)
    equal("the exit reason", run[F.EXIT_REASON], VALID | INVALID)
    equal("FS base of L1", base.value, host[F.HOST_FS_BASE])
    equal("SYSENTER_EIP of L1", entry.value, host[F.HOST_SYSENTER_EIP])
    equal("DR7 of L1", dr7.value, 0x400)


@guest_test("SDM: VM-Entry Control Fields: Event Injection")
def a_bad_event_to_inject_is_error_7(lab: VmxLab) -> None:
    """Reserved types and bits, wrong vectors and error codes of an event make error 7."""
    error_code = 1 << 11
    bad = {
        "reserved type 1": VALID | 1 << 8, "an NMI of vector 3": VALID | 2 << 8 | 3,
        "a hardware exception of vector 32": VALID | 3 << 8 | 32,
        "an error code with an interrupt": VALID | error_code | 0x30,
        "an error code with a software interrupt": VALID | 4 << 8 | error_code | 0x30,
        "a reserved bit": VALID | 3 << 8 | 6 | 1 << 14,
    }  # fmt: skip
    if not lab.facts.basic.exceptions_without_error_code:
        bad["#GP without its error code"] = VALID | 3 << 8 | 13
        bad["#UD with an error code"] = VALID | 3 << 8 | error_code | 6
    cases: dict[str, Changes] = {
        what: {F.ENTRY_INTERRUPTION_INFORMATION: value, F.ENTRY_INSTRUCTION_LENGTH: 1,
               F.ENTRY_EXCEPTION_ERROR_CODE: 0}
        for what, value in bad.items()
    }  # fmt: skip
    with_code = VALID | 3 << 8 | error_code | 13
    cases["an error code of 32 bits"] = {
        F.ENTRY_INTERRUPTION_INFORMATION: with_code, F.ENTRY_EXCEPTION_ERROR_CODE: 1 << 16,
    }  # fmt: skip
    cases["an instruction of 16 bytes"] = {
        F.ENTRY_INTERRUPTION_INFORMATION: VALID | 4 << 8 | 0x30, F.ENTRY_INSTRUCTION_LENGTH: 16,
    }  # fmt: skip
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the error of injecting", {case: run.result.error for case, run in runs.items()},
         Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)  # fmt: skip


@guest_test("SDM: VM-Entry Control Fields: Event Injection",
            needs=[control(PrimaryControls, "monitor_trap_flag")])  # fmt: skip
def only_vector_0_is_an_other_event(lab: VmxLab) -> None:
    """An event of type 7 must have vector 0: any other is error 7."""
    other: Changes = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | 7 << 8 | 1}
    lab.run("nop", other).fails_valid(Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)


@guest_test("SDM: VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine",
            "SDM: VM Instruction Error Numbers")  # fmt: skip
def an_entry_behind_mov_ss_is_error_26(lab: VmxLab) -> None:
    """VMLAUNCH and VMRESUME with events blocked by MOV SS fail with error 26."""
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    errors = {}
    for entry in ("vmresume", "vmlaunch"):
        code = f"mov %ss, %eax; mov %eax, %ss; {entry}; mov $0x4400, %eax; vmread %rax, %rax"
        errors[entry] = lab.call(code, {}, ["rax"]).value["rax"]
    each("the error of", dict(errors), Error.ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS)


@guest_test("SDM: VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine")
def the_entry_controls_follow_the_guests_mode(lab: VmxLab) -> None:
    """ "IA-32e mode guest" is stored at each exit, as IA32_VMX_MISC bit 5 says."""
    if not lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value >> 5 & 1:
        true("without bit 5 there is no unrestricted guest",
             not lab.supports(SecondaryControls, "unrestricted_guest"))  # fmt: skip
    run = lab.run("cpuid")
    equal("the VM-entry controls after the exit", run[F.ENTRY_CONTROLS],
          lab.fields[F.ENTRY_CONTROLS])  # fmt: skip
    true("they have IA-32e mode guest", run[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest)
