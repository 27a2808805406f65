"""What VMRUN and #VMEXIT save, load and leave alone."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, EventInfo, VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.conformance.expect import each, equal
from undervisor.conformance.places import CS64, DS
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import Changes, SvmLab

# What #VMEXIT writes. APM 2, "#VMEXIT" and appendix "Layout of VMCB"; of DBGCTL to LAST_EXCP_TO
# only LBR virtualization makes it write.
WRITTEN: Final = frozenset(
    {
        F.INTERRUPT_SHADOW, F.EXITCODE, F.EXITINFO1, F.EXITINFO2, F.EXITINTINFO, F.EVENTINJ,
        F.NRIP, F.FETCHED_BYTES, F.GUEST_INSTRUCTION_BYTES, F.V_INTR_CONTROL, F.CPL, F.EFER,
        F.CR0, F.CR2, F.CR3, F.CR4, F.DR6, F.DR7, F.RFLAGS, F.RIP, F.RSP, F.RAX, F.G_PAT,
        *(f for f in F if f.name[:3] in ("ES_", "CS_", "SS_", "DS_")),
        *(f for f in F if f.name[:5] in ("GDTR_", "IDTR_")),
    }
)  # fmt: skip
HOST_RESERVED: Final = bytes(range(0x40, 0x60))
# Fields that may hold anything here: the guest uses none of what they are for.
FREE_VALUES: Final = {
    F.TSC_OFFSET: 0x123456789, F.V_INTR_VECTOR: 0x77, F.N_CR3: 0x5000, F.PERF_CTL0: 0,
    F.KERNEL_GS_BASE: 0x1111000, F.LSTAR: 0x2222000, F.CSTAR: 0x3333000, F.SFMASK: 0x4400,
    F.STAR: 0x0008001000000000, F.SYSENTER_CS: 8, F.SYSENTER_ESP: 0x5555000,
    F.SYSENTER_EIP: 0x6666000, F.FS_BASE: 0x7777000, F.GS_BASE: 0x8888000,
    F.CLEAN_BITS: 0,
}  # fmt: skip


def untouched(lab: SvmLab, changes: Changes, code: ExitCode) -> None:
    """An exit with `code` writes no field that no rule of the manual names."""
    area = lab.area(changes, [Intercept.CPUID])
    area[0x3E0:0x400] = HOST_RESERVED
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(area))
        batch.vmload(lab.places.control)
        batch.vmrun(lab.places.control)
        batch.stgi()
    after = lab.read(lab.places.control, SIZE)
    equal("the exit", int.from_bytes(after[0x70:0x78], "little"), code)
    kept = [field for field in F if field not in WRITTEN and field + field.width <= 0x6E8]
    got = {field: after[field : field + field.width] for field in kept}
    each("the field after the exit", got, lambda field: bytes(area[field : field + field.width]))


@guest_test("APM: #VMEXIT", "APM: VMCB Layout, Control Area", "APM: VMSAVE")
def an_exit_writes_only_its_own_fields(lab: SvmLab) -> None:
    """#VMEXIT leaves alone the controls, what is reserved for the host, and VMSAVE's state."""
    lab.code("mov $1, %eax; cpuid")
    untouched(lab, FREE_VALUES, ExitCode.CPUID)


@guest_test("APM: #VMEXIT", "APM: Event Injection")
def an_exit_clears_the_injected_event(lab: SvmLab) -> None:
    """After #VMEXIT the V bit of EVENTINJ is 0, and EXITINTINFO is not valid without a reason."""
    inject = int(EventInfo.v) | EventType.EXTERNAL_INTERRUPT << 8 | 0x55
    run = lab.run("nop", {F.EVENTINJ: inject})
    run.delivers(0x55)
    equal("EVENTINJ.V", run[F.EVENTINJ] & EventInfo.v, 0)
    equal("EXITINTINFO.V", run[F.EXITINTINFO] & EventInfo.v, 0)


HOST: Final = (
    ("RAX", "mov %rax, {}"), ("RSP", "mov %rsp, {}"),
    ("CR0", "mov %cr0, %rbx; mov %rbx, {}"), ("CR3", "mov %cr3, %rbx; mov %rbx, {}"),
    ("CR4", "mov %cr4, %rbx; mov %rbx, {}"),
    ("EFER", "mov $0xc0000080, %ecx; rdmsr; mov %eax, {}"),
    ("CS", "mov %cs, %ebx; mov %rbx, {}"), ("SS", "mov %ss, %ebx; mov %rbx, {}"),
    ("DS", "mov %ds, %ebx; mov %rbx, {}"), ("ES", "mov %es, %ebx; mov %rbx, {}"),
    ("GDTR base", "sgdt 0x7F0 + DATA; mov 0x7F2 + DATA, %rbx; mov %rbx, {}"),
    ("IDTR base", "sidt 0x7F0 + DATA; mov 0x7F2 + DATA, %rbx; mov %rbx, {}"),
)  # fmt: skip
"""How L1 reads each register that VMRUN keeps for it, without a stack."""


def _reads(at: str) -> str:
    lines = (code.format(f"{at} + {8 * number}") for number, (_, code) in enumerate(HOST))
    return "; ".join(lines)


@guest_test("APM: VMRUN Instruction, Saving Host State", "APM: #VMEXIT")
def the_host_finds_its_state_again(lab: SvmLab) -> None:
    """#VMEXIT restores RAX, RSP, CR0, CR3, CR4, EFER, the segments and tables of VMRUN's time."""
    lab.code("mov $1, %eax; mov $0x1000, %esp; mov %cr0, %rdx; xor $0x40000, %edx; mov %rdx, %cr0")
    begin = {
        F.CR4: lab.vmcb.cr4 ^ int(Cr4.de | Cr4.tsd), F.CR3: lab.pages(),
        F.EFER: lab.vmcb.efer ^ int(Efer.sce), F.CS_SELECTOR: 0x77, F.SS_SELECTOR: 0x78,
    }  # fmt: skip
    area = bytes(lab.area(begin))
    before = f"mov %rax, %r15; {_reads('DATA')}; mov %r15, %rax; mov %rax, DATA"
    code = lab.assemble(f"{before}; vmload %rax; vmrun %rax; {_reads('DATA + 0x100')}; stgi")
    with lab.batch() as batch:
        lab.plan_launch(batch, area)
        batch.vmsave(lab.places.scratch)
        ran = batch.call(code, {"rax": lab.places.control}, [])
        batch.vmload(lab.places.scratch)
    _ = ran.value
    data = lab.read(lab.places.data, 0x200)
    value = {
        name: tuple(
            int.from_bytes(data[at + 8 * n : at + 8 * n + 8], "little") for at in (0, 0x100)
        )
        for n, (name, _) in enumerate(HOST)
    }
    each("the host's register", {n: b for n, (_, b) in value.items()}, lambda n: value[n][0])


@guest_test("APM: #VMEXIT", "APM: VMRUN Instruction")
def the_hosts_flags_come_back_and_its_breakpoints_do_not(lab: SvmLab) -> None:
    """#VMEXIT restores RFLAGS as VMRUN found them, and sets DR7 to "all disabled".

    So it does where VMRUN fails.
    """
    lab.code("xor %ebx, %ebx")
    flags = 0x891 | 2
    code = f"""
        mov $0x455, %ebx; mov %rbx, %dr7; vmload %rax
        push ${flags}; popfq; vmrun %rax; pushfq; pop %rbx; mov %dr7, %rcx; stgi
    """
    for name, asid in (("a VMRUN", 1), ("a VMRUN that fails", 0)):
        with lab.batch() as batch:
            lab.plan_launch(batch, bytes(lab.area({F.RFLAGS: 0x46, F.GUEST_ASID: asid})))
            batch.vmsave(lab.places.scratch)
            ran = batch.call(lab.assemble(code), {"rax": lab.places.control}, ["rbx", "rcx"])
            batch.vmload(lab.places.scratch)
        equal(f"the host's RFLAGS after {name}", ran.value["rbx"], flags)
        equal(f"the host's DR7 after {name}", ran.value["rcx"], 0x400)


DR6: Final = "mov %dr6, %rbx; xor %eax, %eax; mov %rax, %dr7; mov $0xffff0ff0, %eax; mov %rax, %dr6"
"""DR6 into RBX, and debugging off."""


@guest_test("APM: VMRUN and TF/RF Bits in EFLAGS", "APM: Debug Registers")
def a_breakpoint_on_vmrun_comes_before_it(lab: SvmLab) -> None:
    """An instruction breakpoint on VMRUN is #DB, DR6 naming it, unless RFLAGS.RF is 1.

    One that is off, or for data, or elsewhere, is none.
    """
    lab.code("nop")
    area, got = bytes(lab.area()), {}
    wanted: dict[str, tuple[int | None, int]] = {}
    cases = {f"DR{n}, {'global' if bit else 'local'}": (n, 1 << 2 * n + bit, 0x2, 0)
             for n in range(4) for bit in (0, 1)}  # fmt: skip
    cases |= {
        "off": (0, 0, 0x2, 0), "data writes": (0, 1 | 1 << 16, 0x2, 0),
        "elsewhere": (0, 1, 0x2, 1), "with RF": (0, 1, 0x10002, 0),
    }  # fmt: skip
    for name, (n, enable, flags, away) in cases.items():
        code = f"""
            xor %ebx, %ebx; mov %rbx, %dr0; mov %rbx, %dr1; mov %rbx, %dr2; mov %rbx, %dr3
            lea 1f+{away}(%rip), %rbx; mov %rbx, %dr{n}
            mov ${0x400 | enable:#x}, %ebx; mov %rbx, %dr7; lea 1f(%rip), %rbx
            mov %rsp, %rdx; mov %ss, %ecx; push %rcx; push %rdx; push ${flags:#x}
            mov %cs, %ecx; push %rcx; push %rbx; iretq
            1: vmrun %rax; stgi
        """
        with lab.batch() as batch:
            lab.plan_launch(batch, area)
            ran = batch.call(lab.assemble(code), {"rax": lab.places.control}, [])
            after = batch.call(lab.assemble(DR6), {}, ["rbx"])
        hit = len(wanted) < 8
        got[name] = (ran.fault.vector if ran.fault else None, after.value["rbx"] & 0xF)
        wanted[name] = (int(Vector.DB), 1 << n) if hit else (None, 0)
    each("the exception and DR6", got, lambda name: wanted[name])


@guest_test("APM: #VMEXIT", "APM: VMCB Layout, State Save Area")
def an_exit_saves_what_l2_changed(lab: SvmLab) -> None:
    """The registers that L2 changed are in the VMCB after its exit."""
    source = """
        mov %cr0, %rbx; xor $0x40000, %ebx; mov %rbx, %cr0
        mov $0x654321, %ebx; mov %rbx, %cr2
        mov %cr4, %rbx; xor $8, %ebx; mov %rbx, %cr4
        mov $0x455, %ebx; mov %rbx, %dr7
        mov $0x20, %ebx; mov %ebx, %ds; mov %ebx, %es
        sub $8, %rsp; mov $0xabcdef, %eax; stc
    """
    run = lab.run(source)
    run.ends()
    vmcb, got = lab.vmcb, run
    wanted = {
        F.CR0: vmcb.cr0 ^ Cr0.am, F.CR2: 0x654321, F.CR4: vmcb.cr4 ^ Cr4.de, F.DR7: 0x455,
        F.DS_SELECTOR: 0x20, F.ES_SELECTOR: 0x20, F.RSP: vmcb.rsp - 8, F.RAX: 0xABCDEF,
        F.CS_SELECTOR: CS64, F.SS_SELECTOR: DS, F.CPL: 0, F.CR3: vmcb.cr3,
    }  # fmt: skip
    each("the field after the exit", {f: got[f] for f in wanted}, lambda f: wanted[f])
    equal("RFLAGS.CF after the exit", run[F.RFLAGS] & 1, 1)


@guest_test("APM: VMRUN Instruction")
def general_registers_are_not_switched(lab: SvmLab) -> None:
    """All general registers but RAX and RSP pass from L1 to L2 and back as they are."""
    names = [f"r{n}" for n in range(8, 16)] + ["rbx", "rcx", "rdx", "rsi", "rdi", "rbp"]
    given = {name: 0x1111 * (number + 1) << 32 for number, name in enumerate(names)}
    run = lab.run("; ".join(f"inc %{name}" for name in names), registers=given)
    run.ends()
    each("the register", {n: run.registers[n] for n in names}, lambda name: given[name] + 1)


@guest_test("APM: VMRUN Instruction, Saving Host State")
def floating_point_and_breakpoint_addresses_are_not_switched(lab: SvmLab) -> None:
    """XMM registers, the x87 control word, DR0 to DR3 and CR2 are L2's after its exit."""
    lab.code(
        "movq %xmm0, %rbx; mov $0x5678, %ecx; movq %rcx, %xmm0; mov %dr3, %rsi; mov $0x4000, %edi;"
        "mov %rdi, %dr3; push $0x27f; fldcw (%rsp); pop %rdi; mov $0x9000, %edi; mov %rdi, %cr2"
    )
    code = """
        fninit; mov $0x1234, %ebx; movq %rbx, %xmm0; mov $0x3000, %ebx; mov %rbx, %dr3
        vmload %rax; vmrun %rax
        movq %xmm0, %rcx; mov %dr3, %rdi; push $0; fnstcw (%rsp); pop %r8; mov %cr2, %r9; stgi
    """
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area()))
        batch.vmsave(lab.places.scratch)
        ran = batch.call(lab.assemble(code), {"rax": lab.places.control})
        batch.vmload(lab.places.scratch)
    value = ran.value
    equal("XMM0 and DR3 as L2 found them", (value["rbx"], value["rsi"]), (0x1234, 0x3000))
    equal("XMM0 and DR3 as L1 finds them", (value["rcx"], value["rdi"]), (0x5678, 0x4000))
    equal("the x87 control word and CR2", (value["r8"] & 0xFFFF, value["r9"]), (0x27F, 0x9000))


@guest_test("APM: Interrupt Shadows", "APM: #VMEXIT")
def an_interrupt_shadow_is_saved(lab: SvmLab) -> None:
    """An exit behind STI or MOV SS says in INTERRUPT_SHADOW that interrupts are held off."""
    cases = {
        "sti": ("sti", 1), "sti; nop": ("sti; nop", 0), "nop": ("nop", 0),
        "mov ss": ("mov %ss, %ebx; mov %ebx, %ss", 1),
    }  # fmt: skip
    got = {name: lab.run(code)[F.INTERRUPT_SHADOW] & 1 for name, (code, _) in cases.items()}
    each("the shadow", got, lambda name: cases[name][1])


@guest_test("APM: Interrupt Shadows", "APM: VMRUN Instruction")
def an_interrupt_shadow_is_loaded(lab: SvmLab) -> None:
    """With INTERRUPT_SHADOW set, L2's first instruction runs before a virtual interrupt."""
    control = int(VirtualInterrupt.v_irq | VirtualInterrupt.v_ign_tpr)
    masking = int(VirtualInterrupt.v_intr_masking)
    begin = {F.V_INTR_CONTROL: control | masking, F.V_INTR_VECTOR: 0x55, F.RFLAGS: 0x202}
    lab.code("inc %rbx; nop; nop")
    got = {}
    for shadow in (0, 1):
        run = lab.run(None, begin | {F.INTERRUPT_SHADOW: shadow})
        run.delivers(0x55)
        got[shadow] = run.registers["rbx"]
        equal("INTERRUPT_SHADOW after it", run[F.INTERRUPT_SHADOW] & 1, 0)
    each("instructions before the interrupt, by INTERRUPT_SHADOW", got, lambda shadow: shadow)


@guest_test("APM: Interrupt Shadows", "APM: #VMEXIT")
def an_interrupt_shadow_survives_an_exit(lab: SvmLab) -> None:
    """An L2 that exits in a shadow and goes on without a change of it is still in it."""
    run = lab.run("sti; cpuid; inc %rsi; nop", wants=[Intercept.CPUID])
    run.exits_with(ExitCode.CPUID)
    control = int(VirtualInterrupt.v_irq | VirtualInterrupt.v_ign_tpr)
    changes = {F.V_INTR_CONTROL: control, F.V_INTR_VECTOR: 0x55}
    # The instruction behind CPUID stands for it: the shadow that was saved covers it.
    run = lab.skip(run, 2, changes, {"rsi": 0})
    run.delivers(0x55)
    equal("instructions before the interrupt", run.registers["rsi"], 1)
