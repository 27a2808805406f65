"""The SVM instructions themselves: where they are undefined, and how each faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, VMLOAD_RANGES, LbrControl, Vmcb
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.arch.x86.segments import Segment
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import NPT, feature
from undervisor.conformance.svm.run import Run
from undervisor.guest.probe.answers import Answer
from undervisor.guest.probe.program import USER, USER_CODE64, USER_DATA

NEED_SVME: Final = ("vmrun %rax", "vmload %rax", "vmsave %rax", "clgi", "invlpga %rax, %ecx")
"""STGI and SKINIT are defined without EFER.SVME where the processor has SKINIT."""
PRIVILEGED: Final = (*NEED_SVME, "stgi")
TAKE_VMCB: Final = ("vmrun", "vmload", "vmsave")
INTERCEPTED: Final = {
    "vmload %rax": Intercept.VMLOAD, "vmsave %rax": Intercept.VMSAVE, "stgi": Intercept.STGI,
    "clgi": Intercept.CLGI, "invlpga %rax, %ecx": Intercept.INVLPGA, "skinit": Intercept.SKINIT,
    "vmmcall": Intercept.VMMCALL, "vmrun %rax": Intercept.VMRUN,
}  # fmt: skip
SKINIT_BIT: Final = 12
HANG: Final = 3.0
"""Seconds for a test that an L0 is known to hang in."""


def vector_of(answer: Answer[Any]) -> int | None:
    """The exception of an answer; None where there was none."""
    return answer.fault.vector if answer.fault else None


def vectors(answers: Mapping[str, Answer[Any]]) -> dict[str, int | None]:
    """The exception of each answer; None where there was none."""
    return {text: vector_of(answer) for text, answer in answers.items()}


def in_l1(lab: SvmLab, texts: Iterable[str], rax: int) -> dict[str, int | None]:
    """Run each instruction in L1 with RAX given; its exception."""
    with lab.batch() as batch:
        answers = {text: batch.call(lab.assemble(text), {"rax": rax}) for text in texts}
    return vectors(answers)


@guest_test("APM: Enabling SVM", "APM: VMRUN", "APM: VMLOAD", "APM: CLGI", "APM: INVLPGA")
def instructions_are_undefined_without_efer_svme(lab: SvmLab) -> None:
    """While EFER.SVME is 0, each SVM instruction causes #UD."""
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer & ~Efer.svme)
    faults = in_l1(lab, NEED_SVME, lab.places.control)
    each("the exception without EFER.SVME", faults, Vector.UD)


@guest_test("APM: STGI", "APM: Enabling SVM")
def stgi_without_efer_svme_needs_skinit(lab: SvmLab) -> None:
    """While EFER.SVME is 0, STGI causes #UD, except on a processor that has SKINIT."""
    has_skinit = lab.l1.cpuid(0x80000001).value["rcx"] >> SKINIT_BIT & 1
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer & ~Efer.svme)
    faults = in_l1(lab, ["stgi"], 0)
    each("the exception without EFER.SVME", faults, None if has_skinit else Vector.UD)


@guest_test("APM: VMRUN", "APM: VMLOAD", "APM: VMSAVE", "APM: STGI", "APM: CLGI", "APM: INVLPGA")
def instructions_at_cpl_3_fault(lab: SvmLab) -> None:
    """At CPL 3 each SVM instruction but VMMCALL causes #GP(0)."""
    enter = f"push ${USER_DATA}; push $USER_TOP; push $2; push ${USER_CODE64}; push %rbx; iretq"
    enter = enter.replace("USER_TOP", f"{USER + 0x10000:#x}")
    with lab.batch() as batch:
        answers = {}
        for number, text in enumerate(PRIVILEGED):
            where = USER + 0x100 * number
            lab.write(where, lab.assemble(text + "; ud2", where))
            registers = {"rbx": where, "rax": lab.places.control}
            answers[text] = batch.call(lab.assemble(enter), registers)
    seen = {
        text: (fault.vector, fault.error_code, fault.cs & 3) if (fault := a.fault) else None
        for text, a in answers.items()
    }
    each("vector, error code and CPL", seen, (Vector.GP, 0, 3))


@guest_test("APM: VMRUN", "APM: VMLOAD", "APM: VMSAVE")
def a_vmcb_address_that_is_no_page_faults(lab: SvmLab) -> None:
    """VMRUN, VMLOAD and VMSAVE cause #GP(0) where rAX is not a multiple of 4 KiB."""
    addresses = [lab.places.control | 1 << bit for bit in (0, 3, 5, 11)]
    with lab.batch() as batch:
        answers = {
            f"{name} of {address:#x}": batch.call(f"{name}", {"rax": address})
            for name in TAKE_VMCB
            for address in addresses
        }
    each("the exception", vectors(answers), Vector.GP)


@guest_test("APM: VMRUN", "APM: VMLOAD", "APM: VMSAVE")
def a_vmcb_address_beyond_the_physical_width_faults(lab: SvmLab) -> None:
    """VMRUN, VMLOAD and VMSAVE cause #GP(0) where rAX has a bit at or above MAXPHYADDR."""
    bits = {lab.physical_width(), 51, 52, 62, 63}
    with lab.batch() as batch:
        answers = {
            f"{name} with bit {bit}": batch.call(name, {"rax": lab.places.control | 1 << bit})
            for name in TAKE_VMCB
            for bit in sorted(bits)
        }
    each("the exception", vectors(answers), Vector.GP)


@guest_test("APM: VMLOAD", "APM: VMSAVE")
def the_address_size_decides_how_much_of_rax_counts(lab: SvmLab) -> None:
    """With an address-size prefix VMSAVE uses EAX, whatever the high half of RAX holds."""
    lab.fill(lab.places.data, SIZE, 0xA5)
    high = lab.places.data | 0xFFFFFFFF00000000
    answer = lab.call(".byte 0x67; vmsave %rax", {"rax": high}, [])
    equal("the exception", vector_of(answer), None)
    lstar = lab.l1.rdmsr(Msr.LSTAR).value
    equal("LSTAR in the VMCB", lab.read_u64(lab.places.data + F.LSTAR), lstar)


@guest_test("APM: VMRUN", "APM: VMLOAD", "APM: STGI")
def instructions_work_in_compatibility_mode(lab: SvmLab) -> None:
    """The SVM instructions are valid in compatibility mode at CPL 0, and use EAX there."""
    lab.fill(lab.places.data, SIZE, 0xA5)
    legacy = f"""
        .code32
        vmsave %eax
        vmload %eax
        xor %ecx, %ecx
        invlpga %eax, %ecx
        clgi
        stgi
        ljmp $8, ${lab.places.free + 0x800}
    """
    lab.write(lab.places.free, lab.assemble(legacy, lab.places.free))
    lab.write(lab.places.free + 0x800, lab.assemble("ret"))
    given = {"rbx": lab.places.free, "rax": lab.places.data | 0xABCDEF01 << 32}
    answer = lab.call("push $0x18; push %rbx; lretq", given, [])
    equal("the exception", vector_of(answer), None)
    lstar = lab.l1.rdmsr(Msr.LSTAR).value
    equal("LSTAR in the VMCB", lab.read_u64(lab.places.data + F.LSTAR), lstar)


def _l2_faults(lab: SvmLab, runs: dict[str, Run]) -> None:
    each("the exit", {text: run.code for text, run in runs.items()}, ExitCode.EXCP_UD)


@guest_test("APM: VMRUN", "APM: VMLOAD", "APM: STGI", "APM: Instruction Intercepts")
def instructions_in_real_mode_are_undefined(lab: SvmLab) -> None:
    """In real mode each SVM instruction causes #UD, which comes before VMRUN's intercept."""
    begin = modes.real(lab)
    texts = ("vmrun", "vmload", "vmsave", "clgi", "invlpga %eax, %ecx")
    runs = {}
    for text in texts:
        lab.code(f".code16\n{text if ' ' in text else text + ' %eax' * (text != 'clgi')}")
        runs[text] = lab.run(None, begin, wants=[Intercept.EXCP_UD])
    _l2_faults(lab, runs)


@guest_test("APM: Instruction Intercepts", "APM: VMLOAD", "APM: VMSAVE", "APM: INVLPGA")
def l2s_instructions_exit_with_their_intercepts(lab: SvmLab) -> None:
    """Each SVM instruction of L2 exits by its own intercept, with nothing done."""
    runs = {}
    lab.fill(lab.places.data, SIZE, 0xA5)
    for text, intercept in INTERCEPTED.items():
        code = text.replace("skinit", "skinit %eax")
        runs[text] = lab.run(code, {F.RAX: lab.places.data}, wants=[intercept])
    codes = {text: (run.code, run.rip) for text, run in runs.items()}
    each("exit and RIP", codes, lambda text: (INTERCEPTED[text], lab.places.code))
    equal("what VMSAVE would have written", lab.read(lab.places.data, SIZE), b"\xa5" * SIZE)


@guest_test("APM: Instruction Intercepts")
def l2s_privilege_is_checked_before_the_intercept(lab: SvmLab) -> None:
    """At CPL 3 of L2, #GP of an SVM instruction comes before its intercept, except VMMCALL's."""
    begin = modes.user(lab)
    runs = {}
    for text, intercept in INTERCEPTED.items():
        if text in ("vmmcall", "skinit"):
            continue
        runs[text] = lab.run(text, begin, wants=[intercept, Intercept.EXCP_GP])
    each("the exit", {text: run.code for text, run in runs.items()}, ExitCode.EXCP_GP)
    lab.run("nop", begin).ends()


@guest_test("APM: VMMCALL", seconds=HANG)
def vmmcall_in_l2_without_its_intercept_is_undefined(lab: SvmLab) -> None:
    """VMMCALL that the hypervisor does not intercept causes #UD in the guest.

    It is L1 whose intercept is asked for: an L0 that serves the call itself is wrong.
    """
    lab.write(lab.stub(Vector.UD), lab.assemble("hlt"))
    run = lab.run("mov $1, %eax; vmmcall", without=[Intercept.VMMCALL], end="hlt")
    run.exits_with(ExitCode.HLT)
    equal("the vector whose handler L2 stops in", lab.vector_of(run.rip), Vector.UD)


@guest_test("APM: VMMCALL", seconds=HANG)
def vmmcall_without_its_intercept_is_an_undefined_opcode_exit(lab: SvmLab) -> None:
    """The #UD of a VMMCALL that is not intercepted can itself be intercepted, at any CPL."""
    for name, begin in (("CPL 0", {}), ("CPL 3", modes.user(lab))):
        lab.code("mov $0x80000001, %eax; vmmcall", end="hlt")
        wants = [Intercept.EXCP_UD]
        run = lab.run(None, begin, wants=wants, without=[Intercept.VMMCALL])
        run.exits_with(ExitCode.EXCP_UD)
        equal(f"RIP at {name}", run.rip, lab.places.code + 5)
        equal(f"RAX at {name}", run.registers["rax"], 0x80000001)


def _extra_pattern(lab: SvmLab) -> Vmcb:
    """A VMCB whose VMLOAD state is all different from L1's own."""
    vmcb = Vmcb(bytearray(b"\x5a" * SIZE))
    vmcb.set_segment(F.FS_SELECTOR, Segment(0x10, 0x1111000, 0xFFFF, 0x093))
    vmcb.set_segment(F.GS_SELECTOR, Segment(0x2B, 0x7FFF12345000, 0xFFFFFFFF, 0xCF3))
    vmcb.set_segment(F.LDTR_SELECTOR, Segment(0x50, 0xFFFF800000001000, 0x77, 0x082))
    vmcb.set_segment(F.TR_SELECTOR, Segment(0x40, lab.places.tss, 0x67, 0x08B))
    values = {
        F.STAR: 0x0023001000001234, F.LSTAR: 0xFFFF800000002000, F.CSTAR: 0x3000,
        F.SFMASK: 0x47700, F.KERNEL_GS_BASE: 0xFFFF800000004000, F.SYSENTER_CS: 0x28,
        F.SYSENTER_ESP: 0x5000, F.SYSENTER_EIP: 0xFFFF800000006000,
    }  # fmt: skip
    for field, value in values.items():
        vmcb[field] = value
    return vmcb


LOADED_MSRS: Final = {
    Msr.FS_BASE: F.FS_BASE, Msr.GS_BASE: F.GS_BASE, Msr.KERNEL_GS_BASE: F.KERNEL_GS_BASE,
    Msr.STAR: F.STAR, Msr.LSTAR: F.LSTAR, Msr.CSTAR: F.CSTAR, Msr.FMASK: F.SFMASK,
    Msr.SYSENTER_CS: F.SYSENTER_CS, Msr.SYSENTER_ESP: F.SYSENTER_ESP,
    Msr.SYSENTER_EIP: F.SYSENTER_EIP,
}  # fmt: skip


@guest_test("APM: VMLOAD", "APM: VMSAVE")
def vmload_and_vmsave_move_exactly_their_state(lab: SvmLab) -> None:
    """VMLOAD and VMSAVE move FS, GS, TR, LDTR and eight MSRs, and VMSAVE writes nothing else."""
    places, pattern = lab.places, _extra_pattern(lab)
    lab.write(places.data, bytes(pattern.b))
    lab.fill(places.data + 0x1000, SIZE, 0xA5)
    code = "mov %rcx, %rax; vmsave %rax; mov %rdx, %rax; vmload %rax; mov %rbx, %rax; vmsave %rax;"
    code += "mov %rcx, %rax; vmload %rax"
    registers = {"rcx": places.data + 0x2000, "rdx": places.data, "rbx": places.data + 0x1000}
    _ = lab.call(code, registers, []).value
    wanted = bytearray(b"\xa5" * SIZE)
    for start, end in VMLOAD_RANGES:
        wanted[start:end] = pattern.b[start:end]
    got = lab.read(places.data + 0x1000, SIZE)
    differ = {at & ~7: got[at & ~7 : (at & ~7) + 8] for at in range(SIZE) if got[at] != wanted[at]}
    each("what VMSAVE wrote", differ, lambda at: bytes(wanted[at : at + 8]))


@guest_test("APM: VMLOAD")
def vmload_loads_the_registers(lab: SvmLab) -> None:
    """After VMLOAD the MSRs that it covers read as the VMCB has them."""
    places, pattern = lab.places, _extra_pattern(lab)
    lab.write(places.data, bytes(pattern.b))
    with lab.batch() as batch:
        batch.vmsave(places.data + 0x2000)
        batch.vmload(places.data)
        reads = {msr: batch.rdmsr(msr) for msr in LOADED_MSRS}
        batch.vmload(places.data + 0x2000)
    values = {msr: answer.value for msr, answer in reads.items()}
    each("the MSR after VMLOAD", values, lambda msr: pattern[LOADED_MSRS[msr]])


def _vmsave_in_l2(lab: SvmLab, virtualized: int) -> tuple[bool, bool]:
    """Whether L2's VMSAVE of a page that NPT moves reached its own address, and the moved one."""
    places = lab.places
    here, there = places.free, places.free + 0x1000
    changes = lab.npt(12) | {F.LBR_CONTROL: virtualized, F.FS_BASE: 0x1234000}
    lab.write_u64(lab.nested_entry(here), there | 7)
    lab.fill(here, 2 * SIZE, 0xA5)
    lab.run("vmsave %rax", changes | {F.RAX: here}).ends()
    found = [lab.read_u64(at + F.FS_BASE) == 0x1234000 for at in (here, there)]
    return found[0], found[1]


@guest_test("APM: VMSAVE", "APM: VMLOAD and VMSAVE Virtualization", needs=[NPT])
def vmsave_in_l2_without_its_intercept_uses_l1s_physical_address(lab: SvmLab) -> None:
    """A VMSAVE of L2 that is not intercepted writes the system-physical address in rAX.

    System-physical is L1's view: an L0 that lets it go to its own memory is broken into.
    """
    equal("written at rAX, at where NPT moves it", _vmsave_in_l2(lab, 0), (True, False))


@guest_test("APM: VMLOAD and VMSAVE Virtualization", needs=[NPT, feature("vmsave_virt")])
def virtualized_vmsave_uses_l2s_physical_address(lab: SvmLab) -> None:
    """With VMSAVE and VMLOAD virtualization rAX is a guest-physical address that NPT translates."""
    virtualized = int(LbrControl.virtualized_vmload_vmsave_enable)
    equal("written at rAX, at where NPT moves it", _vmsave_in_l2(lab, virtualized), (False, True))


@guest_test("APM: VMLOAD", "APM: VMSAVE")
def vmload_in_l2_without_its_intercept_loads(lab: SvmLab) -> None:
    """VMLOAD that is not intercepted loads L2's registers from the VMCB in rAX."""
    lab.write(lab.places.data, bytes(_extra_pattern(lab).b))
    run = lab.run("vmload %rax", {F.RAX: lab.places.data})
    run.ends()
    equal("L2's FS base", run[F.FS_BASE], 0x1111000)
    equal("L2's LSTAR", run[F.LSTAR], 0xFFFF800000002000)


@guest_test("APM: SKINIT")
def skinit_exists_only_where_cpuid_has_it(lab: SvmLab) -> None:
    """SKINIT at CPL 3 causes #GP(0) where the processor has it."""
    if not lab.l1.cpuid(0x80000001).value["rcx"] >> SKINIT_BIT & 1:
        raise Lacking("the processor has no SKINIT")
    run = lab.run("skinit %eax", modes.user(lab), wants=[Intercept.EXCP_GP, Intercept.SKINIT])
    run.exits_with(ExitCode.EXCP_GP, 0)
