"""Instructions of L2 that exit by an intercept, and that do not without it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, cast

from undervisor.arch.svm.capabilities import SvmFeatures
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr, MtrrDefType
from undervisor.conformance.expect import Broken, Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature
from undervisor.conformance.svm.run import Run
from undervisor.errors import TimedOut
from undervisor.guest.probe.client import ProbeDied
from undervisor.targets import How, Running

WRITE_BACK: Final = 6
"""A memory type. APM 2, "Memory Types"."""


@dataclass(frozen=True, slots=True)
class Case:
    """An instruction with its intercept: `setup` comes before it, `length` are its bytes.

    `alone`: without the intercept L2 runs on behind it.  `cpuid`: leaf, register and bit that say
    that the processor has it.
    """

    text: str
    intercept: Intercept
    length: int
    setup: str = ""
    alone: bool = True
    cpuid: tuple[int, str, int] | None = None


CASES: Final = (
    Case("cpuid", Intercept.CPUID, 2, "xor %eax, %eax"),
    Case("sidt DATA", Intercept.IDTR_READ, 8),
    Case("sgdt DATA", Intercept.GDTR_READ, 8),
    Case("sldt %ax", Intercept.LDTR_READ, 4),
    Case("str %ax", Intercept.TR_READ, 4),
    Case("lidt DATA", Intercept.IDTR_WRITE, 8, "sidt DATA"),
    Case("lgdt DATA", Intercept.GDTR_WRITE, 8, "sgdt DATA"),
    Case("lldt %ax", Intercept.LDTR_WRITE, 3, "xor %eax, %eax"),
    Case("ltr %ax", Intercept.TR_WRITE, 3, "andb $0xfd, GDT + 0x45; mov $TR, %eax"),
    Case("rdtsc", Intercept.RDTSC, 2),
    Case("rdtscp", Intercept.RDTSCP, 3, cpuid=(0x80000001, "rdx", 27)),
    Case("rdpmc", Intercept.RDPMC, 2, "xor %ecx, %ecx", alone=False),
    Case("pushfq", Intercept.PUSHF, 1),
    Case("popfq", Intercept.POPF, 1, "pushfq"),
    Case(
        "iretq",
        Intercept.IRET,
        2,
        "mov %rsp, %rbx; push $DS; push %rbx; pushfq; push $CS64; lea 7f(%rip), %rax; push %rax",
    ),
    Case("int $0x80", Intercept.INTN, 2, alone=False),
    Case("invd", Intercept.INVD, 2, alone=False),
    Case("wbinvd", Intercept.WBINVD, 2),
    Case("pause", Intercept.PAUSE, 2),
    Case("invlpg DATA", Intercept.INVLPG, 8),
    Case("invlpga %rax, %ecx", Intercept.INVLPGA, 3, "xor %eax, %eax; mov $1, %ecx"),
    Case("stgi", Intercept.STGI, 3),
    Case("clgi", Intercept.CLGI, 3, alone=False),
    Case("skinit %eax", Intercept.SKINIT, 3, alone=False),
    Case("vmrun %rax", Intercept.VMRUN, 3, alone=False),
    Case("vmmcall", Intercept.VMMCALL, 3, alone=False),
    Case("vmload %rax", Intercept.VMLOAD, 3, "mov $DATA, %eax", alone=False),
    Case("vmsave %rax", Intercept.VMSAVE, 3, "mov $DATA, %eax"),
    Case("rsm", Intercept.RSM, 2, alone=False),
    Case(".byte 0xf1", Intercept.ICEBP, 1, alone=False),
    Case("monitor", Intercept.MONITOR, 3, "mov $DATA, %eax; xor %ecx, %ecx; xor %edx, %edx",
         cpuid=(1, "rcx", 3)),
    Case("mwait", Intercept.MWAIT, 3, "xor %eax, %eax; xor %ecx, %ecx", alone=False,
         cpuid=(1, "rcx", 3)),
    Case(
        "xsetbv",
        Intercept.XSETBV,
        3,
        "mov %cr4, %rax; bts $18, %rax; mov %rax, %cr4; xor %ecx, %ecx; xgetbv",
        cpuid=(1, "rcx", 26),
    ),
    Case(
        "invpcid DATA, %rax",
        Intercept.INVPCID,
        10,
        "mov $2, %eax; xorps %xmm0, %xmm0; movups %xmm0, DATA",
        cpuid=(7, "rbx", 10),
    ),
    Case("hlt", Intercept.HLT, 1, alone=False),
)  # fmt: skip


def _offered(lab: SvmLab) -> list[Case]:
    """The cases whose instruction the processor has."""
    leaves = {case.cpuid[0] for case in CASES if case.cpuid}
    values = {leaf: lab.l1.cpuid(leaf).value for leaf in leaves}
    return [
        case
        for case in CASES
        if not case.cpuid or values[case.cpuid[0]][case.cpuid[1]] >> case.cpuid[2] & 1
    ]


def _programs(lab: SvmLab, cases: list[Case]) -> dict[str, tuple[int, int]]:
    """Put the cases' code in place; where each begins, and where its instruction is."""
    places = {}
    for number, case in enumerate(cases):
        begin = lab.places.code + 0x100 * number
        at = begin + (len(lab.assemble(f"{case.setup}\n7:", begin)) if case.setup else 0)
        lab.code(f"{case.setup}\n{case.text}\n7:", at=begin)
        places[case.text] = begin, at
    return places


def _word(lab: SvmLab, intercepts: Iterable[Intercept]) -> dict[F, int]:
    """The VMCB's intercept words with these set besides."""
    words = {field: lab.vmcb[field] for field in (F.INTERCEPT_WORD3, F.INTERCEPT_WORD4)}
    words[F.INTERCEPT_WORD5] = lab.vmcb[F.INTERCEPT_WORD5]
    for intercept in intercepts:
        words[intercept.field] |= intercept.field_mask
    return words


def _intercepted(lab: SvmLab) -> dict[str, tuple[Run, int, Case]]:
    """Each case's run with its own intercept, and where its instruction is."""
    cases = _offered(lab)
    places = _programs(lab, cases)
    runs = lab.sweep(
        [{F.RIP: places[case.text][0]} | _word(lab, [case.intercept]) for case in cases]
    )
    return {c.text: (run, places[c.text][1], c) for c, run in zip(cases, runs, strict=True)}


@guest_test("APM: Intercept Operation", "APM: Instruction Intercepts")
def each_instruction_exits_by_its_intercept(lab: SvmLab) -> None:
    """Each instruction with an intercept exits with its code, with RIP at the instruction."""
    runs = _intercepted(lab)
    got = {text: (run.code, run.rip) for text, (run, _, _) in runs.items()}
    each("exit code and RIP", got, lambda text: (runs[text][2].intercept, runs[text][1]))
    pending = {text: run[F.EXITINTINFO] >> 31 & 1 for text, (run, _, _) in runs.items()}
    each("EXITINTINFO.V", pending, 0)


@guest_test("APM: State Saved on Exit", needs=[feature("nrips")])
def each_instruction_exit_has_the_next_rip(lab: SvmLab) -> None:
    """Where the processor saves nRIP, it is the address behind the intercepted instruction."""
    runs = _intercepted(lab)
    got = {text: run[F.NRIP] - at for text, (run, at, _) in runs.items()}
    each("nRIP behind RIP", got, lambda text: runs[text][2].length)


@guest_test("APM: Intercept Operation")
def without_their_intercepts_instructions_run(lab: SvmLab) -> None:
    """With every other intercept of its kind, but not its own, an instruction is carried out."""
    cases = [case for case in _offered(lab) if case.alone]
    places = _programs(lab, cases)
    # What a setup uses is not intercepted.
    used = {Intercept.PUSHF, Intercept.IDTR_READ, Intercept.GDTR_READ}
    others = {case.intercept for case in CASES} - used
    runs = lab.sweep(
        [{F.RIP: places[c.text][0]} | _word(lab, others - {c.intercept}) for c in cases]
    )
    got = {case.text: (run.code, run.rip) for case, run in zip(cases, runs, strict=True)}
    ends = {case.text: places[case.text][1] + case.length for case in cases}
    each("exit code and RIP", got, lambda text: (ExitCode.VMMCALL, ends[text]))


@guest_test("APM: Instruction Intercepts", "APM: Intercept Operation")
def an_intercepted_instruction_changes_nothing(lab: SvmLab) -> None:
    """The exit comes before the instruction: memory, registers and flags are as they were."""
    lab.fill(lab.places.data, 16, 0xA5)
    run = lab.run("sidt DATA", wants=[Intercept.IDTR_READ])
    run.exits_with(ExitCode.IDTR_READ)
    equal("what SIDT would have written", lab.read(lab.places.data, 16), b"\xa5" * 16)
    run = lab.run("mov $1, %eax; cpuid", registers={"rbx": 7, "rcx": 8, "rdx": 9},
                  wants=[Intercept.CPUID])  # fmt: skip
    got = [run.registers[name] for name in ("rax", "rbx", "rcx", "rdx")]
    equal("the registers at CPUID", got, [1, 7, 8, 9])
    run = lab.run("pushfq", wants=[Intercept.PUSHF])
    equal("RSP at PUSHF", run[F.RSP], lab.vmcb.rsp)
    run = lab.run("push $0x8d7; popfq", wants=[Intercept.POPF])
    equal("RFLAGS at POPF", run[F.RFLAGS], 2)


@guest_test("APM: Decode Assists", needs=[feature("decode_assists")])
def decode_assists_give_int_and_invlpg_their_operands(lab: SvmLab) -> None:
    """With decode assists EXITINFO1 is the vector of INT n, and the linear address of INVLPG."""
    for vector in (0x20, 0x80, 0xFF):
        run = lab.run(f"int ${vector}", wants=[Intercept.INTN])
        run.exits_with(ExitCode.SWINT, vector)
    run = lab.run("mov $0x4321, %ebx; invlpg 0x123000(%rbx)", wants=[Intercept.INVLPG])
    run.exits_with(ExitCode.INVLPG, 0x127321)


@guest_test("APM: Instruction Intercepts")
def int3_and_into_are_no_software_interrupts_to_the_intercepts(lab: SvmLab) -> None:
    """INT3 is an exception to the intercepts, INT 3 in two bytes is INTn."""
    run = lab.run(".byte 0xcd, 3", wants=[Intercept.INTN, Intercept.EXCP_BP])
    run.exits_with(ExitCode.SWINT)
    run = lab.run("int3", wants=[Intercept.INTN, Intercept.EXCP_BP])
    run.exits_with(ExitCode.EXCP_BP)
    equal("RIP at INT3", run.rip, lab.places.code)
    lab.run("int3", wants=[Intercept.INTN]).delivers(3)


@guest_test("APM: Intercept Operation", "APM: PUSHF, POPF, IRET, INTn Intercepts")
def some_intercepts_come_before_every_exception(lab: SvmLab) -> None:
    """PUSHF, POPF and IRET exit before the page fault that their stack would cause."""
    changes = {F.RSP: 0x7FFF_FFFF_F000}
    wants = [Intercept.PUSHF, Intercept.POPF, Intercept.IRET, Intercept.EXCP_PF]
    for text, intercept in (("pushfq", Intercept.PUSHF), ("popfq", Intercept.POPF),
                            ("iretq", Intercept.IRET)):  # fmt: skip
        lab.run(text, changes, wants=wants).exits_with(intercept.exit_code)
        lab.run(text, changes, wants=[Intercept.EXCP_PF]).exits_with(ExitCode.EXCP_PF)


@guest_test("APM: Instruction Intercepts")
def privilege_comes_before_most_intercepts(lab: SvmLab) -> None:
    """At CPL 3 #GP of a privileged instruction comes before its intercept."""
    begin = modes.user(lab)
    cases = {
        "hlt": Intercept.HLT, "invd": Intercept.INVD, "wbinvd": Intercept.WBINVD,
        "lidt DATA": Intercept.IDTR_WRITE, "lgdt DATA": Intercept.GDTR_WRITE,
        "lldt %ax": Intercept.LDTR_WRITE, "ltr %ax": Intercept.TR_WRITE,
        "invlpg DATA": Intercept.INVLPG, "rdmsr": Intercept.MSR_PROT,
    }  # fmt: skip
    runs = {t: lab.run(t, begin, wants=[i, Intercept.EXCP_GP]) for t, i in cases.items()}
    each("the exit", {text: run.code for text, run in runs.items()}, ExitCode.EXCP_GP)


@guest_test("APM: Instruction Intercepts")
def instructions_of_user_code_exit_as_well(lab: SvmLab) -> None:
    """CPUID, RDTSC, PAUSE, PUSHF, SIDT and INTn of CPL 3 exit by their intercepts."""
    begin = modes.user(lab)
    cases = {
        "cpuid": Intercept.CPUID, "rdtsc": Intercept.RDTSC, "pause": Intercept.PAUSE,
        "pushfq": Intercept.PUSHF, "sidt DATA": Intercept.IDTR_READ, "int $0x80": Intercept.INTN,
        "vmmcall": Intercept.VMMCALL,
    }  # fmt: skip
    runs = {text: lab.run(text, begin, wants=[wants]) for text, wants in cases.items()}
    got = {text: (run.code, run[F.CPL]) for text, run in runs.items()}
    each("exit and CPL", got, lambda text: (cases[text], 3))


@guest_test("APM: MWAIT Intercept", "APM: MONITOR Intercept", seconds=5)
def the_conditional_mwait_intercept_asks_for_an_armed_monitor(lab: SvmLab) -> None:
    """The intercept MWAIT_CONDITIONAL exits only while a monitor is armed; MWAIT's own, always."""
    if not lab.l1.cpuid(1).value["rcx"] >> 3 & 1:
        raise Lacking("the processor has no MONITOR")
    _enable_write_back(lab)
    run = lab.run("xor %eax, %eax; xor %ecx, %ecx; mwait", wants=[Intercept.MWAIT_CONDITIONAL])
    run.ends()
    arm = "mov $DATA, %eax; xor %ecx, %ecx; xor %edx, %edx; monitor; xor %eax, %eax; mwait"
    run = lab.run(arm, wants=[Intercept.MWAIT_CONDITIONAL])
    run.exits_with(ExitCode.MWAIT_CONDITIONAL)
    lab.run(arm, wants=[Intercept.MWAIT]).exits_with(ExitCode.MWAIT)


def _enable_write_back(lab: SvmLab) -> None:
    """Turn the MTRRs on where no firmware has: without them no address can be monitored."""
    if not lab.l1.cpuid(1).value["rdx"] >> 12 & 1:
        return
    if not lab.l1.rdmsr(Msr.MTRR_DEF_TYPE).value & MtrrDefType.enable:
        lab.l1.wrmsr(Msr.MTRR_DEF_TYPE, MtrrDefType.enable | WRITE_BACK)


@guest_test("APM: Pause Intercept Filtering", needs=[feature("pause_filter")])
def the_pause_filter_lets_some_through(lab: SvmLab) -> None:
    """With a PAUSE filter count L2 executes that many PAUSEs less one before the exit."""
    lab.code("1: inc %rbx; pause; jmp 1b")
    got = {}
    for count in (1, 2, 5):
        run = lab.run(None, {F.PAUSE_FILTER_COUNT: count}, wants=[Intercept.PAUSE])
        run.exits_with(ExitCode.PAUSE)
        got[count] = run.registers["rbx"]
    each("PAUSEs that L2 reached, by filter count", got, lambda count: count)


@guest_test("APM: Shutdown Intercept")
def a_shutdown_exits_by_its_intercept(lab: SvmLab) -> None:
    """A triple fault of L2 exits with SHUTDOWN, and L1 is whole."""
    run = lab.run("lidt DATA; ud2", wants=[Intercept.SHUTDOWN])
    run.exits_with(ExitCode.SHUTDOWN)
    lab.run("nop").ends()


@guest_test("APM: Shutdown Intercept", "APM: Intercept Operation")
def a_shutdown_without_its_intercept_ends_the_machine(lab: SvmLab) -> None:
    """A triple fault of L2 that is not intercepted shuts the processor down, L1 with it.

    It must not shut down L0: the target is there to say how its machine ended.
    """
    try:
        run = lab.run("lidt DATA; ud2")
    except ProbeDied:
        machine = cast(Running, lab.probe.stream)
        with suppress(TimedOut):  # it starts anew where the platform resets it
            if machine.wait(2.0).how is How.TARGET_DIED:
                raise Broken("the shutdown of L2 took the target with it") from None
        return
    raise Broken(f"{run.describe()}; must be a shutdown of the processor")


@guest_test("APM: CPUID", "APM: Intercept Operation")
def l2_goes_on_where_l1_lets_it(lab: SvmLab) -> None:
    """L1 can emulate what exited and go on behind it, again and again."""
    run = lab.run("xor %esi, %esi; 1: cpuid; add %rax, %rsi; dec %edi; jnz 1b",
                  registers={"rdi": 5}, wants=[Intercept.CPUID])  # fmt: skip
    for number in range(5):
        run.exits_with(ExitCode.CPUID)
        run = lab.skip(run, 2, {F.RAX: 10 + number})
    run.ends()
    equal("the sum of what L1 gave", run.registers["rsi"], 10 + 11 + 12 + 13 + 14)


@guest_test("APM: Function 8000_000Ah: SVM Features")
def features_hang_together(lab: SvmLab) -> None:
    """CPUID Fn8000_000A: at least two ASIDs, and filters and assists only with what they need."""
    has = lab.facts.features
    equal("whether there are two ASIDs", lab.facts.asids >= 2, True)
    pairs = {
        "PauseFilterThreshold without PauseFilter": (
            SvmFeatures.pause_filter_threshold, SvmFeatures.pause_filter),
        "x2AVIC without AVIC": (SvmFeatures.x2avic, SvmFeatures.avic),
        "GMET without NP": (SvmFeatures.gmet, SvmFeatures.np),
    }  # fmt: skip
    each("is offered", {t: bool(has & a and not has & b) for t, (a, b) in pairs.items()}, False)
