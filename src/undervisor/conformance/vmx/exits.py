"""Instructions of L2 that exit: always or by a control; and what they do where they must not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.arch.bits import Register
from undervisor.arch.vmx.controls import PrimaryControls, SecondaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import Lacking, each, equal, true
from undervisor.conformance.places import TR
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab

P, S = PrimaryControls, SecondaryControls
UD, GP = 6, 13
TO_RING_3: Final = "push $DS3; push $USER_STACK; push $2; push $CS3; push $1f; iretq; 1: "


@dataclass(frozen=True, slots=True)
class Controlled:
    """An instruction, its reason to exit and the control that makes it.

    `cpuid` is the leaf, register and bit that shows the instruction; `enable` another control
    without which it is undefined.
    """

    reason: ExitReason
    word: type[Register]
    control: str
    cpuid: tuple[int, str, int] | None = None
    enable: str = ""


R = ExitReason
_MONITOR, _TABLES = (1, "rcx", 3), "descriptor_table_exiting"
CONTROLLED: Final = {
    "hlt": Controlled(R.HLT, P, "hlt_exiting"),
    "invlpg (%rbx)": Controlled(R.INVLPG, P, "invlpg_exiting"),
    "mwait": Controlled(R.MWAIT, P, "mwait_exiting", _MONITOR),
    "monitor": Controlled(R.MONITOR, P, "monitor_exiting", _MONITOR),
    "rdtsc": Controlled(R.RDTSC, P, "rdtsc_exiting"),
    "pause": Controlled(R.PAUSE, P, "pause_exiting"),
    "mov %cr8, %rax": Controlled(R.CONTROL_REGISTER_ACCESSES, P, "cr8_store_exiting"),
    "mov %rdx, %cr8": Controlled(R.CONTROL_REGISTER_ACCESSES, P, "cr8_load_exiting"),
    "mov %cr3, %rax": Controlled(R.CONTROL_REGISTER_ACCESSES, P, "cr3_store_exiting"),
    "mov %db0, %rax": Controlled(R.MOV_DR, P, "mov_dr_exiting"),
    "wbinvd": Controlled(R.WBINVD_OR_WBNOINVD, S, "wbinvd_exiting"),
    "rdrand %eax": Controlled(R.RDRAND, S, "rdrand_exiting", (1, "rcx", 30)),
    "rdseed %eax": Controlled(R.RDSEED, S, "rdseed_exiting", (7, "rbx", 18)),
    "rdtscp": Controlled(R.RDTSCP, P, "rdtsc_exiting", (0x80000001, "rdx", 27), "enable_rdtscp"),
    "invpcid (%rbx), %rdx": Controlled(
        R.INVPCID, P, "invlpg_exiting", (7, "rbx", 10), "enable_invpcid"
    ),
    "sgdt (%rsi)": Controlled(R.ACCESS_TO_GDTR_OR_IDTR, S, _TABLES),
    "sidt (%rsi)": Controlled(R.ACCESS_TO_GDTR_OR_IDTR, S, _TABLES),
    "lgdt (%rdi)": Controlled(R.ACCESS_TO_GDTR_OR_IDTR, S, _TABLES),
    "lidt (%rdi)": Controlled(R.ACCESS_TO_GDTR_OR_IDTR, S, _TABLES),
    "sldt %eax": Controlled(R.ACCESS_TO_LDTR_OR_TR, S, _TABLES),
    "str %eax": Controlled(R.ACCESS_TO_LDTR_OR_TR, S, _TABLES),
    "lldt %dx": Controlled(R.ACCESS_TO_LDTR_OR_TR, S, _TABLES),
    "ltr %r8w": Controlled(R.ACCESS_TO_LDTR_OR_TR, S, _TABLES),
}  # fmt: skip


def _has(lab: VmxLab, row: Controlled) -> bool:
    if row.cpuid is not None:
        leaf, register, bit = row.cpuid
        if not lab.l1.cpuid(leaf).value[register] >> bit & 1:
            return False
    enabled = not row.enable or lab.supports(S, row.enable)
    return enabled and lab.supports(row.word, row.control)


def _operands(lab: VmxLab) -> dict[str, int]:
    """Registers under which each instruction of the table works."""
    places = lab.places
    lab.fill(places.data, 64)
    lab.write_u64(places.data + 128, 0xFFF | places.gdt << 16, places.gdt >> 48)
    lab.write(places.gdt + 0x40 + 5, b"\x89")  # the TSS that LTR loads is available
    return {"rbx": places.data, "rsi": places.data + 64, "rdi": places.data + 128,
            "r8": TR, "rcx": 0, "rdx": 0, "rax": 0}  # fmt: skip


def _with(lab: VmxLab, row: Controlled, on: int) -> Changes:
    base = lab.secondary(None, **{row.enable: 1}) if row.enable else {}
    if row.word is S:
        lab.needs(S, row.control)
    return lab.control(row.word, base, **{row.control: on})


@guest_test("SDM: Instructions That Cause VM Exits Conditionally")
def an_instruction_exits_if_its_control_is_1(lab: VmxLab) -> None:
    """With its control each of these exits: its reason, its length, and nothing done."""
    rows = {text: row for text, row in CONTROLLED.items() if _has(lab, row)}
    runs = lab.sweep([_with(lab, row, 1) for row in rows.values()], sources=list(rows),
                     registers=_operands(lab))  # fmt: skip
    got = {text: (run.reason, run.length, run.rip - run.start, run.registers["rax"])
           for text, run in zip(rows, runs, strict=True)}  # fmt: skip
    each("reason, length, RIP and RAX at the exit of", dict(got),
         lambda text: (rows[text].reason, len(lab.assemble(text)), 0, 0))  # fmt: skip


@guest_test("SDM: Instructions That Cause VM Exits Conditionally")
def an_instruction_does_not_exit_if_its_control_is_0(lab: VmxLab) -> None:
    """Without its control each of these, HLT apart, is executed without a VM exit."""
    rows = {text: row for text, row in CONTROLLED.items() if _has(lab, row) and text != "hlt"}
    got: dict[str, object] = {}
    # Each alone: LTR needs a TSS that is available, LIDT spoils the handlers of the others.
    for text, row in rows.items():
        run = lab.run(text, _with(lab, row, 0), _operands(lab))
        got[text] = (run.reason, run.vector_of(run.rip), run.rip - lab.places.code)
    each("reason, exception and RIP behind", got,
         lambda text: (R.VMCALL, None, len(lab.assemble(text))))  # fmt: skip


@guest_test("SDM: Instructions That Cause VM Exits Conditionally")
def rdpmc_exits_by_its_control(lab: VmxLab) -> None:
    """RDPMC of an absent counter exits with "RDPMC exiting" and causes #GP(0) without."""
    run = lab.run("rdpmc", lab.primary(rdpmc_exiting=1), {"rcx": 0x3FFFFFFF})
    run.exits_with(R.RDPMC)
    equal("the length", run.length, 2)
    lab.run("rdpmc", lab.primary(rdpmc_exiting=0), {"rcx": 0x3FFFFFFF}).delivers(GP)


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
def cpuid_always_exits(lab: VmxLab) -> None:
    """CPUID causes a VM exit unconditionally, before it changes anything."""
    run = lab.run("mov $5, %eax; cpuid")
    run.exits_with(ExitReason.CPUID, qualification=0)
    equal("the exit's instruction length", run.length, 2)
    equal("L2's RAX", run.registers["rax"], 5)


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
def invd_always_exits(lab: VmxLab) -> None:
    """INVD causes a VM exit unconditionally."""
    run = lab.run("invd")
    run.exits_with(ExitReason.INVD, qualification=0)
    equal("the exit's instruction length", run.length, 2)


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally",
            "SDM: Relative Priority of Faults and VM Exits")  # fmt: skip
def xsetbv_always_exits_but_for_its_ud(lab: VmxLab) -> None:
    """XSETBV exits unconditionally with CR4.OSXSAVE; without, it causes #UD."""
    if not lab.l1.cpuid(1).value["rcx"] >> 26 & 1:
        raise Lacking("the processor has no XSETBV")
    cr4 = lab.fields[F.GUEST_CR4]
    run = lab.run("xsetbv", {F.GUEST_CR4: cr4 | Cr4.osxsave}, {"rax": 1})
    run.exits_with(ExitReason.XSETBV, qualification=0)
    equal("the exit's instruction length", run.length, 3)
    lab.run("xsetbv", {F.GUEST_CR4: cr4 & ~Cr4.osxsave}, {"rax": 1}).delivers(UD)


@guest_test("SDM: Relative Priority of Faults and VM Exits")
def privileged_instructions_fault_at_cpl_3_before_they_exit(lab: VmxLab) -> None:
    """A fault based on the privilege level comes before the VM exit of the instruction.

    MOV DR alone would exit first, if it exited.
    """
    controls: Changes = lab.primary({F.GUEST_CR3: lab.pages()}, mov_dr_exiting=0)
    primary = ("hlt_exiting", "invlpg_exiting", "cr3_store_exiting", "cr8_store_exiting",
               "rdpmc_exiting")  # fmt: skip
    for word, names in ((P, primary), (S, ("wbinvd_exiting", _TABLES))):
        for name in names:
            if lab.supports(word, name):
                controls = lab.control(word, controls, **{name: 1})
    texts = ("hlt", "invlpg (%rbx)", "rdmsr", "wrmsr", "mov %cr3, %rax", "mov %cr8, %rax",
             "mov %rax, %cr0", "mov %db7, %rax", "wbinvd", "invd", "lgdt (%rbx)", "lidt (%rbx)",
             "lldt %ax", "ltr %ax", "clts", "lmsw %ax")  # fmt: skip
    runs = lab.sweep([controls] * len(texts), sources=[TO_RING_3 + text for text in texts],
                     registers={"rbx": lab.places.data})  # fmt: skip
    each("the exit reason and the vector that L2 got for",
         {text: (run.reason, run.vector_of(run.rip)) for text, run in
          zip(texts, runs, strict=True)}, (R.VMCALL, GP))  # fmt: skip


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
def cpuid_and_vmcall_exit_at_cpl_3(lab: VmxLab) -> None:
    """CPUID and VMCALL need no privilege: they exit at CPL 3 as well, whose state is saved."""
    user: Changes = {F.GUEST_CR3: lab.pages()}
    for text, reason in (("cpuid", R.CPUID), ("vmcall", R.VMCALL)):
        run = lab.run(TO_RING_3 + text, user)
        run.exits_with(reason)
        equal(f"CS and SS at the exit of {text}",
              (run[F.GUEST_CS_SELECTOR], run[F.GUEST_SS_SELECTOR]), (0x33, 0x3B))  # fmt: skip


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation")
def rdtscp_and_invpcid_are_undefined_unless_enabled(lab: VmxLab) -> None:
    """Without their "enable" control RDTSCP, RDPID and INVPCID cause #UD, exiting or not."""
    seen = False
    for text, enable, exiting in (
        ("rdtscp", "enable_rdtscp", "rdtsc_exiting"),
        ("invpcid (%rbx), %rdx", "enable_invpcid", "invlpg_exiting"),
    ):
        if lab.supports(S, enable):
            seen = True
            for on in (0, 1):
                base = lab.secondary(None, **{enable: 0})
                lab.run(text, lab.primary(base, **{exiting: on}), _operands(lab)).delivers(UD)
    if not seen:
        raise Lacking("the processor has neither RDTSCP nor INVPCID in VMX operation")


@guest_test("SDM: Exit Qualification for Some Instruction Execution")
def invlpg_gives_the_linear_address(lab: VmxLab) -> None:
    """The exit qualification of INVLPG is the linear address of its operand."""
    on = lab.primary(invlpg_exiting=1)
    run = lab.run("invlpg 8(%rbx, %rcx, 4)", on, {"rbx": 1 << 40, "rcx": 3})
    run.exits_with(ExitReason.INVLPG, qualification=(1 << 40) + 20)


@guest_test("SDM: Information for VM Exits Due to Instruction Execution")
def descriptor_table_instructions_tell_themselves_and_their_operand(lab: VmxLab) -> None:
    """The information of reasons 46 and 47 has the operand and, in 29:28, the instruction."""
    on = lab.secondary(descriptor_table_exiting=1)
    memory = 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23
    wanted = {
        "sgdt (%rbx)": memory, "sidt (%rbx)": memory | 1 << 28, "lgdt (%rbx)": memory | 2 << 28,
        "lidt (%rbx)": memory | 3 << 28, "sldt %edx": 1 << 10 | 2 << 3,
        "str %r9d": 1 << 10 | 9 << 3 | 1 << 28, "lldt %bx": 1 << 10 | 3 << 3 | 2 << 28,
        "ltr (%rbx)": memory | 3 << 28,
    }  # fmt: skip
    found = lab.sweep([on] * len(wanted), sources=list(wanted), registers={"rbx": lab.places.data})
    runs = dict(zip(wanted, found, strict=True))
    defined = {True: 3 << 28 | 1 << 10 | 0xF << 3,
               False: 3 << 28 | 1 << 27 | 0xF << 23 | 1 << 22 | 7 << 15 | 7 << 7}  # fmt: skip
    each("the instruction information of",
         {text: run[F.EXIT_INSTRUCTION_INFORMATION] & defined[bool(wanted[text] & 1 << 10)]
          for text, run in runs.items()}, lambda text: wanted[text])  # fmt: skip


@guest_test("SDM: Information for VM Exits Due to Instruction Execution")
def rdrand_and_rdseed_tell_their_destination(lab: VmxLab) -> None:
    """The information of RDRAND and RDSEED has the destination register and the operand size."""
    forms = {"%ax": 0, "%r10d": 10 << 3 | 1 << 11, "%rdx": 2 << 3 | 2 << 11}
    names = [n for n in ("rdrand", "rdseed") if _has(lab, CONTROLLED[f"{n} %eax"])]
    if not names:
        raise Lacking("the processor has no RDRAND or RDSEED exiting")
    for name in names:
        on = lab.secondary(None, **{f"{name}_exiting": 1})
        runs = lab.sweep([on] * len(forms), sources=[f"{name} {form}" for form in forms])
        each(f"the instruction information of {name}",
             {form: run[F.EXIT_INSTRUCTION_INFORMATION] & 0x1878 for form, run in
              zip(forms, runs, strict=True)}, lambda form: forms[form])  # fmt: skip


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation")
def pause_loop_exiting_ends_a_spin_loop(lab: VmxLab) -> None:
    """With "PAUSE-loop exiting" a tight loop of PAUSE exits once it has spun for the window."""
    lab.needs(S, "pause_loop_exiting")
    controls = lab.primary(lab.secondary(pause_loop_exiting=1), pause_exiting=0)
    loops = controls | {F.PLE_GAP: 1 << 20, F.PLE_WINDOW: 20_000}
    run = lab.run("1: pause; inc %rax; jmp 1b", loops, {"rax": 0})
    run.exits_with(R.PAUSE)
    true("it spun before", run.registers["rax"] > 0, run.registers["rax"])
