"""Time in L2: the TSC's offset and ratio, and the filter of PAUSE."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature

MASK64: Final = (1 << 64) - 1
ONE: Final = 1 << 32
"""The ratio 1.0 of TSC_RATIO: 8.32 fixed point."""
OFFSETS: Final = {"positive": 1 << 40, "negative": -(1 << 20) & MASK64, "zero": 0}
RDTSC: Final = "rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, %rbx"
READS: Final = {
    "RDTSC": RDTSC,
    "RDTSCP": f"rdtscp; {RDTSC.removeprefix('rdtsc; ')}",
    "RDMSR of TSC": f"mov $0x10, %ecx; rdmsr; {RDTSC.removeprefix('rdtsc; ')}",
}


def _between(lab: SvmLab, code: str, changes: dict[F, int]) -> tuple[int, int, int]:
    """L1's TSC before, what L2 leaves in RBX, L1's TSC after."""
    lab.code(code)
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area(changes)))
        before = batch.rdtsc()
        run = lab.plan_entry(batch, None)
        after = batch.rdtsc()
    run.ends()
    return before.value, run.registers["rbx"], after.value


@guest_test("APM: TSC_OFFSET", "APM: VMRUN Instruction", cases={n: n for n in OFFSETS})
def l2s_tsc_has_the_offset(lab: SvmLab, name: str) -> None:
    """RDTSC, RDTSCP and RDMSR of TSC in L2 give L1's count with TSC_OFFSET added."""
    offset = OFFSETS[name]
    for what, code in READS.items():
        if what == "RDTSCP" and not lab.l1.cpuid(0x80000001).value["rdx"] >> 27 & 1:
            continue
        before, seen, after = _between(lab, code, {F.TSC_OFFSET: offset})
        true(f"{what} in L2 less the offset is between L1's before and after",
             before <= (seen - offset & MASK64) <= after, before, seen, after)  # fmt: skip


@guest_test("APM: TSC_OFFSET", "APM: #VMEXIT")
def l1s_tsc_goes_on_without_the_offset(lab: SvmLab) -> None:
    """The offset is L2's only: L1's count is not moved by an entry and an exit."""
    before, _, after = _between(lab, "nop", {F.TSC_OFFSET: 1 << 60})
    true("L1's count after the exit is a little above the one before",
         0 <= after - before < 1 << 40, before, after)  # fmt: skip


@guest_test("APM: RDTSC", "APM: Instruction Intercepts")
def rdtsc_at_cpl_3_faults_before_its_intercept(lab: SvmLab) -> None:
    """With CR4.TSD RDTSC at CPL 3 is #GP, which comes before the intercept of RDTSC."""
    begin = modes.user(lab)
    wants = [Intercept.RDTSC, Intercept.EXCP_GP]
    run = lab.run("rdtsc", begin | {F.CR4: lab.vmcb.cr4 | Cr4.tsd}, wants=wants)
    run.exits_with(ExitCode.EXCP_GP, 0)
    lab.run("rdtsc", begin, wants=wants).exits_with(ExitCode.RDTSC)


@guest_test("APM: RDTSC", "APM: Intercept Operation")
def rdtsc_and_rdtscp_have_an_intercept_each(lab: SvmLab) -> None:
    """RDTSCP does not exit by the intercept of RDTSC, and RDTSC not by RDTSCP's."""
    lab.run("rdtsc", wants=[Intercept.RDTSCP]).ends()
    if lab.l1.cpuid(0x80000001).value["rdx"] >> 27 & 1:
        lab.run("rdtscp", wants=[Intercept.RDTSC]).ends()
        lab.run("rdtscp", wants=[Intercept.RDTSCP]).exits_with(ExitCode.RDTSCP)


@guest_test("APM: TSC Ratio MSR (C000_0104h)", needs=[feature("tsc_rate_msr")])
def l2s_tsc_has_the_ratio(lab: SvmLab) -> None:
    """With TSC_RATIO of 2.0 L2's count is twice L1's, and TSC_OFFSET is added after that."""
    offset = 1 << 50
    lab.l1.wrmsr(Msr.TSC_RATIO, 2 * ONE)
    before, seen, after = _between(lab, RDTSC, {F.TSC_OFFSET: offset})
    lab.l1.wrmsr(Msr.TSC_RATIO, ONE)
    true("L2's count less the offset is twice one between L1's",
         2 * before <= seen - offset <= 2 * after + 1, before, seen, after)  # fmt: skip


@guest_test("APM: TSC Ratio MSR (C000_0104h)", needs=[feature("tsc_rate_msr")])
def the_ratios_reserved_bits_fault(lab: SvmLab) -> None:
    """TSC_RATIO bits 63:40 are reserved; its reset value is 1.0."""
    equal("TSC_RATIO after reset", lab.l1.rdmsr(Msr.TSC_RATIO).value, ONE)
    fault = lab.l1.wrmsr(Msr.TSC_RATIO, 1 << 40).fault
    equal("the exception", fault.vector if fault else None, 13)


@guest_test("APM: Pause Intercept Filtering", needs=[feature("pause_filter_threshold")])
def the_pause_filter_starts_anew_behind_its_threshold(lab: SvmLab) -> None:
    """PAUSEs further apart than the threshold do not count against the filter."""
    changes = {F.PAUSE_FILTER_COUNT: 3, F.PAUSE_FILTER_THRESHOLD: 100}
    code = "mov $10, %esi; 1: pause; mov $10000, %ecx; 2: loop 2b; dec %esi; jnz 1b"
    lab.run(code, changes, wants=[Intercept.PAUSE]).ends()
