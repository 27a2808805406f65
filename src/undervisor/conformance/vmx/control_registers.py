"""L2's control and debug registers: masks, read shadows, CR3 targets, exits and what they tell."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.exits import CrAccessType, ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab

CR0_BITS: Final = {"MP": Cr0.mp, "EM": Cr0.em, "TS": Cr0.ts, "WP": Cr0.wp, "AM": Cr0.am}
CR4_BITS: Final = {
    "PVI": Cr4.pvi, "TSD": Cr4.tsd, "DE": Cr4.de, "PSE": Cr4.pse, "MCE": Cr4.mce, "PGE": Cr4.pge,
    "PCE": Cr4.pce, "OSFXSR": Cr4.osfxsr, "OSXMMEXCPT": Cr4.osxmmexcpt,
}  # fmt: skip
REGISTERS: Final[dict[str, object]] = {"CR0": 0, "CR4": 4}
GPRS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
               *(f"r{n}" for n in range(8, 16)))  # fmt: skip
CR_ACCESS: Final = ExitReason.CONTROL_REGISTER_ACCESSES
GP: Final = 13


def _fields(number: int) -> tuple[F, F, F]:
    """The field, the mask and the read shadow of CR0 or CR4."""
    prefix = f"CR{number}"
    return F[f"GUEST_{prefix}"], F[f"{prefix}_GUEST_HOST_MASK"], F[f"{prefix}_READ_SHADOW"]


def _free_bits(lab: VmxLab, number: int) -> dict[str, int]:
    """Bits that an L2 may set and clear without other effects here."""
    fixed = VmxMsr.IA32_VMX_CR4_FIXED1 if number else VmxMsr.IA32_VMX_CR0_FIXED1
    may_be_one = lab.l1.rdmsr(fixed).value
    bits = CR4_BITS if number else CR0_BITS
    return {name: bit for name, bit in bits.items() if bit & may_be_one}


@guest_test("SDM: Guest/Host Masks and Read Shadows for CR0 and CR4", cases=REGISTERS)
def a_read_takes_each_bit_from_the_shadow_or_the_register(lab: VmxLab, number: int) -> None:
    """MOV from CR: a bit whose mask is 1 comes from the read shadow, the others from the register.

    Each bit, with each value of mask, shadow and register.
    """
    field, mask, shadow = _fields(number)
    base = lab.fields[field]
    cases = list(product(_free_bits(lab, number).items(), (0, 1), (0, 1), (0, 1)))
    lab.code(f"mov %cr{number}, %rax")
    runs = lab.sweep(
        [
            {mask: bit * masked, shadow: bit * shadowed, field: base & ~bit | bit * real}
            for (_, bit), masked, shadowed, real in cases
        ]
    )
    got: dict[tuple[str, int, int, int], object] = {}
    for ((name, bit), masked, shadowed, real), run in zip(cases, runs, strict=True):
        run.ends()
        got[name, masked, shadowed, real] = bool(run.registers["rax"] & bit)
    each("(bit, mask, shadow, register) is read as", got,
         lambda case: bool(case[2] if case[1] else case[3]))  # fmt: skip


@guest_test("SDM: Guest/Host Masks and Read Shadows for CR0 and CR4",
            "SDM: Instructions That Cause VM Exits Conditionally", cases=REGISTERS)  # fmt: skip
def a_write_exits_exactly_if_a_masked_bit_differs_from_its_shadow(lab: VmxLab, number: int) -> None:
    """MOV to CR exits if, for a bit whose mask is 1, source and read shadow differ."""
    field, mask, shadow = _fields(number)
    base = lab.fields[field]
    lab.code(f"mov %rbx, %cr{number}; mov %cr{number}, %rax")
    got: dict[tuple[str, int, int, int], object] = {}
    for name, bit in _free_bits(lab, number).items():
        for new in (0, 1):
            value = base & ~bit | bit * new
            cases = list(product((0, 1), (0, 1)))
            runs = lab.sweep(
                [
                    {
                        mask: bit * masked,
                        shadow: bit * shadowed,
                        field: value ^ bit,
                    }
                    for masked, shadowed in cases
                ],
                registers={"rbx": value},
            )
            for (masked, shadowed), run in zip(cases, runs, strict=True):
                outcome: object = "exits"
                if run.reason == ExitReason.VMCALL:
                    outcome = bool(run[field] & bit)
                got[name, masked, shadowed, new] = outcome

    def want(case: tuple[str, int, int, int]) -> object:
        _, masked, shadowed, new = case
        if masked:  # equal to the shadow: the bit of the register stays
            return "exits" if shadowed != new else bool(1 - new)
        return bool(new)

    each("(bit, mask, shadow, source): exit, or the register's bit", got, want)


@guest_test("SDM: Exit Qualification for Control-Register Accesses")
def a_cr_access_tells_register_and_direction(lab: VmxLab) -> None:
    """The qualification has the control register, the access type and the general register."""
    controls = lab.primary(cr3_load_exiting=1, cr3_store_exiting=1, cr8_load_exiting=1,
                           cr8_store_exiting=1)  # fmt: skip
    controls |= {F.CR3_TARGET_COUNT: 0, F.CR0_GUEST_HOST_MASK: Cr0.ts, F.CR0_READ_SHADOW: Cr0.ts,
                 F.CR4_GUEST_HOST_MASK: Cr4.tsd, F.CR4_READ_SHADOW: Cr4.tsd}  # fmt: skip
    forms = {
        f"mov %{gpr}, %cr{cr}": cr | CrAccessType.MOV_TO_CR << 4 | index << 8
        for cr in (0, 3, 4, 8) for index, gpr in enumerate(GPRS) if gpr != "rsp"
    } | {
        f"mov %cr{cr}, %{gpr}": cr | CrAccessType.MOV_FROM_CR << 4 | index << 8
        for cr in (3, 8) for index, gpr in enumerate(GPRS)
    }  # fmt: skip
    runs = lab.sweep([controls] * len(forms), sources=list(forms))
    for text, run in zip(forms, runs, strict=True):
        run.exits_with(CR_ACCESS)
        equal(f"the length and RIP of {text}", (run.length, run.rip),
              (len(lab.assemble(text)), run.start))  # fmt: skip
    each("the qualification of", {text: run.qualification & 0xF3F for text, run in
                                  zip(forms, runs, strict=True)}, lambda t: forms[t])  # fmt: skip


@guest_test("SDM: CR3-Target Controls")
def a_load_of_a_cr3_target_value_does_not_exit(lab: VmxLab) -> None:
    """With "CR3-load exiting", MOV to CR3 exits unless its source is one of the first N targets."""
    most = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value).cr3_targets
    root = lab.pages()
    values = [root | flags for flags in (0, 8, 0x10, 0x18)][:most]  # PWT and PCD: one root
    targets: Changes = {F.CR3_TARGET_VALUE_0 + 2 * n: value for n, value in enumerate(values)}
    controls = lab.primary(cr3_load_exiting=1) | targets | {F.GUEST_CR3: root}
    cases = list(product(range(len(values) + 1), range(len(values))))
    sources = [f"mov ${values[index]:#x}, %eax; mov %rax, %cr3" for _, index in cases]
    runs = lab.sweep([controls | {F.CR3_TARGET_COUNT: count} for count, _ in cases],
                     sources=sources)  # fmt: skip
    reasons = {case: run.reason for case, run in zip(cases, runs, strict=True)}
    each("(count, target): the exit", dict(reasons),
         lambda case: ExitReason.VMCALL if case[1] < case[0] else CR_ACCESS)  # fmt: skip
    for (count, index), run in zip(cases, runs, strict=True):
        if index < count:
            equal("CR3 after the load of a target", run[F.GUEST_CR3], values[index])


@guest_test("SDM: Primary Processor-Based VM-Execution Controls")
def cr3_is_loaded_and_read_without_exits(lab: VmxLab) -> None:
    """Without "CR3-load exiting" and "CR3-store exiting" MOV CR3 does not exit."""
    root = lab.pages()
    free = lab.primary(cr3_load_exiting=0, cr3_store_exiting=0)
    run = lab.run("mov %rbx, %cr3; mov %cr3, %rax", free, {"rbx": root | 8})
    run.ends()
    equal("CR3 as L2 reads it", run.registers["rax"], root | 8)
    equal("CR3 as the exit saves it", run[F.GUEST_CR3], root | 8)


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation")
def cr8_without_exits_is_l1s_task_priority(lab: VmxLab) -> None:
    """Without CR8 exiting and TPR shadow MOV CR8 works on the processor's own TPR."""
    free = lab.primary(cr8_load_exiting=0, cr8_store_exiting=0, use_tpr_shadow=0)
    lab.l1.write_cr(8, 5)
    run = lab.run("mov %cr8, %rax; mov $9, %ebx; mov %rbx, %cr8", free)
    run.ends()
    after = lab.l1.read_cr(8)
    equal("CR8 as L2 reads it", run.registers["rax"], 5)
    equal("CR8 of L1 afterwards", after.value, 9)


@guest_test("SDM: Instructions That Cause VM Exits Conditionally",
            "SDM: Changes to Instruction Behavior in VMX Non-Root Operation")  # fmt: skip
def clts_goes_by_mask_and_shadow_of_ts(lab: VmxLab) -> None:
    """CLTS exits if mask and shadow of CR0.TS are 1; with mask 1 and shadow 0 it does nothing."""
    set_ts = lab.fields[F.GUEST_CR0] | Cr0.ts
    lab.code("clts")
    cases = list(product((0, 1), (0, 1)))
    runs = lab.sweep(
        [
            {F.CR0_GUEST_HOST_MASK: Cr0.ts * masked, F.CR0_READ_SHADOW: Cr0.ts * shadowed,
             F.GUEST_CR0: set_ts}
            for masked, shadowed in cases
        ]
    )  # fmt: skip
    got = {case: (run.reason, bool(run[F.GUEST_CR0] & Cr0.ts)) for case, run in
           zip(cases, runs, strict=True)}  # fmt: skip
    want = {(0, 0): (ExitReason.VMCALL, False), (0, 1): (ExitReason.VMCALL, False),
            (1, 0): (ExitReason.VMCALL, True), (1, 1): (CR_ACCESS, True)}  # fmt: skip
    each("(mask, shadow): the exit, and CR0.TS after it", dict(got), want.get)
    equal("the qualification of CLTS", runs[3].qualification & 0x3F, CrAccessType.CLTS << 4)


@guest_test("SDM: Instructions That Cause VM Exits Conditionally",
            "SDM: Exit Qualification for Control-Register Accesses")  # fmt: skip
def lmsw_goes_by_masks_and_shadows(lab: VmxLab) -> None:
    """LMSW exits if a masked one of MP, EM, TS differs from its shadow, or to set a masked PE.

    The qualification has the source, and whether it was in memory.
    """
    low = Cr0.pe | Cr0.mp | Cr0.em | Cr0.ts
    masked: Changes = {F.CR0_GUEST_HOST_MASK: low, F.CR0_READ_SHADOW: Cr0.pe | Cr0.mp}
    lab.write_u32(lab.places.data, 0x000B)
    register = lab.run("lmsw %bx", masked, {"rbx": 0x77F9})
    register.exits_with(CR_ACCESS)
    equal("the qualification with a register", register.qualification & 0xFFFF007F,
          0x77F9 << 16 | CrAccessType.LMSW << 4)  # fmt: skip
    memory = lab.run("lmsw (%rbx)", masked, {"rbx": lab.places.data})
    memory.exits_with(CR_ACCESS)
    equal("the qualification with memory", memory.qualification & 0xFFFF007F,
          0xB << 16 | CrAccessType.LMSW << 4 | 1 << 6)  # fmt: skip
    equal("the linear address", memory[F.GUEST_LINEAR_ADDRESS], lab.places.data)
    same = lab.run("lmsw %bx; smsw %rax", masked, {"rbx": 0xFFF3})
    same.ends()
    equal("CR0 after LMSW of the shadow", same[F.GUEST_CR0], lab.fields[F.GUEST_CR0])
    equal("bits 3:0 that SMSW reads", same.registers["rax"] & 0xF, int(Cr0.pe | Cr0.mp))
    free = lab.run("lmsw %bx", {F.CR0_GUEST_HOST_MASK: Cr0.wp}, {"rbx": int(Cr0.ts)})
    free.ends()
    equal("bits 3:0 of CR0 after LMSW of TS", free[F.GUEST_CR0] & low, Cr0.ts | Cr0.pe)
    hidden: Changes = {F.CR0_GUEST_HOST_MASK: Cr0.pe, F.CR0_READ_SHADOW: 0}
    lab.run("lmsw %bx", hidden, {"rbx": int(Cr0.pe)}).exits_with(CR_ACCESS)
    lab.run("lmsw %bx", masked | {F.CR0_GUEST_HOST_MASK: Cr0.pe}, {"rbx": 0}).ends()


@guest_test("SDM: Restrictions on VMX Operation", "SDM: Changes to Instruction Behavior in VMX"
            " Non-Root Operation")  # fmt: skip
def l2_cannot_change_what_vmx_operation_fixes(lab: VmxLab) -> None:
    """MOV to CR that would leave a fixed bit the wrong way causes #GP(0) in L2."""
    lab.code("mov %rbx, %cr4; nop")
    for bit in (Cr4.vmxe, Cr4.pae):
        run = lab.run(None, None, {"rbx": lab.fields[F.GUEST_CR4] & ~bit})
        run.delivers(GP)
    lab.code("mov %rbx, %cr0; nop")
    for bit in (Cr0.ne, Cr0.pg, Cr0.pg | Cr0.pe):
        lab.run(None, None, {"rbx": lab.fields[F.GUEST_CR0] & ~bit}).delivers(GP)


@guest_test("SDM: Guest/Host Masks and Read Shadows for CR0 and CR4")
def a_hidden_vmxe_stays_set_and_reads_as_0(lab: VmxLab) -> None:
    """CR4.VMXE that L1 masks with shadow 0 reads as 0, and writes of it as 0 do not touch it."""
    hidden: Changes = {F.CR4_GUEST_HOST_MASK: Cr4.vmxe, F.CR4_READ_SHADOW: 0}
    run = lab.run("mov %cr4, %rax; mov %rax, %cr4; mov %cr4, %rcx", hidden)
    run.ends()
    plain = lab.fields[F.GUEST_CR4] & ~Cr4.vmxe
    equal("CR4 as L2 reads it", (run.registers["rax"], run.registers["rcx"]), (plain, plain))
    true("CR4.VMXE is still set", run[F.GUEST_CR4] & Cr4.vmxe, run[F.GUEST_CR4])


# -- debug registers -------------------------------------------------------------------------------


@guest_test("SDM: Exit Qualification for MOV DR")
def mov_dr_tells_register_and_direction(lab: VmxLab) -> None:
    """With "MOV-DR exiting" each MOV DR exits and tells debug register, direction, register."""
    forms = {
        f"mov %db{dr}, %{gpr}": dr | 1 << 4 | index << 8
        for dr in (0, 1, 2, 3, 6, 7) for index, gpr in ((0, "rax"), (4, "rsp"), (11, "r11"))
    } | {
        f"mov %{gpr}, %db{dr}": dr | index << 8
        for dr in (0, 1, 2, 3, 6, 7) for index, gpr in ((0, "rax"), (6, "rsi"), (15, "r15"))
    }  # fmt: skip
    runs = lab.sweep([lab.primary(mov_dr_exiting=1)] * len(forms), sources=list(forms))
    for text, run in zip(forms, runs, strict=True):
        run.exits_with(ExitReason.MOV_DR)
        equal(f"the length of {text}", run.length, len(lab.assemble(text)))
    each("the qualification of", {t: run.qualification for t, run in
                                  zip(forms, runs, strict=True)}, lambda t: forms[t])  # fmt: skip


@guest_test("SDM: Primary Processor-Based VM-Execution Controls",
            "SDM: Instructions That Cause VM Exits Conditionally")  # fmt: skip
def mov_dr_works_without_exiting_and_exits_before_it_faults(lab: VmxLab) -> None:
    """Without the control MOV DR works; its exit takes priority over #UD of DR4 under CR4.DE."""
    free, exits = lab.primary(mov_dr_exiting=0), lab.primary(mov_dr_exiting=1)
    run = lab.run("mov %rbx, %db1; mov %db1, %rax", free, {"rbx": 0x4321})
    run.ends()
    equal("DR1", run.registers["rax"], 0x4321)
    de: Changes = {F.GUEST_CR4: lab.fields[F.GUEST_CR4] | Cr4.de}
    lab.run("mov %db4, %rax", free | de).delivers(6)
    lab.run("mov %db4, %rax", exits | de).exits_with(ExitReason.MOV_DR, 4 | 1 << 4)
