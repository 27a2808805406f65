"""What an entry loads, what an exit saves, and what neither may disturb."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr4, Rflags
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.places import CS64, DS, DS3, TR
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.guest.probe.answers import ALL

STATUS: Final = 0xCD5  # RFLAGS: CF PF AF ZF SF DF OF
RIGHTS: Final = 0x1F0FF
"""The access rights that are not reserved."""
DATA_RIGHTS, LDT_RIGHTS, UNUSABLE = 0xC093, 0x82, 1 << 16


def _usable(lab: VmxLab) -> Changes:
    """Every segment usable and unlike the others, and odd values where any may be."""
    changes: Changes = {}
    for number, name in enumerate(("FS", "GS")):
        changes |= {
            F[f"GUEST_{name}_SELECTOR"]: DS3,
            F[f"GUEST_{name}_BASE"]: 0x1234_5678_9000 + number,
            F[f"GUEST_{name}_LIMIT"]: 0x12345 + number,
            F[f"GUEST_{name}_ACCESS_RIGHTS"]: 0x40F3 | number << 12,
        }
    return changes | {
        F.GUEST_LDTR_SELECTOR: 0x48, F.GUEST_LDTR_BASE: 0x7FFF_1234_5000,
        F.GUEST_LDTR_LIMIT: 0x777, F.GUEST_LDTR_ACCESS_RIGHTS: LDT_RIGHTS,
        F.GUEST_TR_LIMIT: 0x89, F.GUEST_GDTR_LIMIT: 0x123, F.GUEST_IDTR_LIMIT: 0xFFE,
        F.GUEST_GDTR_BASE: 0xFFFF_8000_1234_5678, F.GUEST_IDTR_BASE: 0x7FFF_FFFF_F000,
        F.GUEST_SYSENTER_CS: 0xABCD, F.GUEST_SYSENTER_ESP: 0xFFFF_8000_0000_1111,
        F.GUEST_SYSENTER_EIP: 0x7FFF_0000_2222, F.GUEST_RSP: 0x1234_5678_9ABC_DEF0,
        F.GUEST_RFLAGS: 0x2 | STATUS | Rflags.ac | Rflags.id | Rflags.nt | Rflags.iopl,
    }  # fmt: skip


@guest_test("SDM: Saving Guest State", "SDM: Loading Guest State")
def an_exit_saves_the_guest_state_that_entry_loaded(lab: VmxLab) -> None:
    """What L2 does not change is in every guest-state field as it was written before the entry."""
    changes = _usable(lab)
    fields = {f: value for f, value in {**lab.fields, **changes}.items()
              if F(f).area is FieldArea.GUEST}  # fmt: skip
    want = dict(fields)
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"):
        want[F[f"GUEST_{name}_ACCESS_RIGHTS"]] &= RIGHTS
    run = lab.run("cpuid", changes, reads=[F(f) for f in fields])
    run.exits_with(ExitReason.CPUID)
    each("the field after the exit", {F(f): run[F(f)] for f in fields}, lambda f: want[f])


@guest_test("SDM: VM Entries", "SDM: VM Exits")
def general_registers_pass_through_both_ways(lab: VmxLab) -> None:
    """Entry and exit leave the general registers alone: L2 begins with L1's, L1 goes on with L2's.

    RAX to R15 but RSP, each with a value of its own.
    """
    values = {name: 0x0101_0101_0101_0101 * (n + 1) for n, name in enumerate(ALL)}
    source = "; ".join(f"not %{name}" for name in ALL)
    run = lab.run(source, None, values)
    run.ends()
    each("L2's register at the exit", dict(run.registers),
         lambda name: values[name] ^ (1 << 64) - 1)  # fmt: skip


@guest_test("SDM: VM Entries", "SDM: VM Exits")
def x87_and_sse_state_passes_through_both_ways(lab: VmxLab) -> None:
    """Entry and exit leave XMM registers, MXCSR and the x87 state alone."""
    cr4 = lab.fields[F.GUEST_CR4] | Cr4.osfxsr
    data = lab.places.data
    lab.write_u32(data, 0x1FC0, 0x0F7F, 0, 0)
    numbers = range(16)
    with lab.batch() as batch:
        batch.write_cr(4, lab.facts.l1.cr4 | Cr4.osfxsr)
        load = "; ".join(f"lea {n + 1}(%rax), %rcx; movq %rcx, %xmm{n}" for n in numbers)
        begun = batch.call(
            lab.assemble(f"{load}; ldmxcsr (%rbx); fninit; fldcw 4(%rbx); fldpi"),
            {"rax": 0x5500, "rbx": data},
        )
    _ = begun.value
    check = "; ".join(
        f"movq %xmm{n}, %rdx; sub ${0x5501 + n}, %rdx; or %rdx, %rsi; "
        f"lea {0x100 + n}(%rax), %rcx; movq %rcx, %xmm{n}"
        for n in numbers
    )
    own = "stmxcsr 8(%rbx); fnstcw 12(%rbx); fstpl 16(%rbx)"
    state: Changes = {F.GUEST_CR4: cr4, F.HOST_CR4: lab.facts.l1.cr4 | Cr4.osfxsr}
    run = lab.run(f"{check}; {own}; fld1", state, {"rbx": data})
    run.ends()
    read = "; ".join(f"movq %xmm{n}, %rdx; sub ${0x100 + n}, %rdx; or %rdx, %rsi" for n in numbers)
    with lab.batch() as batch:
        back = batch.call(lab.assemble(f"{read}; fstpl 24(%rbx); fninit"), {"rbx": data}, ["rsi"])
    equal("differences of L2's XMM registers", run.registers["rsi"], 0)
    equal("differences of L1's XMM registers", back.value["rsi"], 0)
    equal("MXCSR and the x87 control word of L2",
          (lab.read_u32(data + 8), lab.read_u32(data + 12) & 0xFFFF), (0x1FC0, 0x0F7F))  # fmt: skip
    equal("ST(0) of L2, pi", lab.read_u64(data + 16), 0x400921FB54442D18)
    equal("ST(0) of L1, 1", lab.read_u64(data + 24), 0x3FF0000000000000)


@guest_test("SDM: VM Entries", "SDM: VM Exits", "SDM: Loading Host Control Registers, Debug"
            " Registers, MSRs")  # fmt: skip
def debug_registers_and_cr2_pass_through(lab: VmxLab) -> None:
    """DR0 to DR3, DR6 and CR2 are neither saved nor loaded; an exit sets DR7 to 400H."""
    with lab.batch() as batch:
        for number in range(4):
            batch.write_dr(number, 0x1000 * (number + 1))
        batch.write_dr(6, 0xFFFF0FF1)
        batch.write_cr(2, 0x1234_5000)
    source = """
        mov %db0, %rax; mov %db1, %rbx; mov %db2, %rcx; mov %db3, %rdx
        mov %db6, %rsi; mov %cr2, %rdi; mov %db7, %r8
        mov $0x9000, %ebp; mov %rbp, %db2; mov %rbp, %cr2
    """
    dr7 = lab.on_entry(load_debug_controls=1) | lab.on_exit(save_debug_controls=1)
    run = lab.run(source, dr7 | {F.GUEST_DR7: 0x700})
    run.ends()
    with lab.batch() as batch:
        after = {"DR2": batch.read_dr(2), "CR2": batch.read_cr(2), "DR7": batch.read_dr(7)}
    got = [run.registers[name] for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")]
    equal("DR0 to DR3, DR6, CR2 and DR7 of L2", got,
          [0x1000, 0x2000, 0x3000, 0x4000, 0xFFFF0FF1, 0x12345000, 0x700])  # fmt: skip
    each("L1's register", {name: answer.value for name, answer in after.items()},
         {"DR2": 0x9000, "CR2": 0x9000, "DR7": 0x400}.get)  # fmt: skip
    equal("guest DR7", run[F.GUEST_DR7], 0x700)


SHARED: Final = {
    Msr.STAR: 0x0010_0008_0000_0000, Msr.LSTAR: 0x7000_1111, Msr.FMASK: 0x200,
    Msr.KERNEL_GS_BASE: 0x7000_2222,
}  # fmt: skip


@guest_test("SDM: VM Entries", "SDM: VM Exits")
def msrs_without_a_field_pass_through(lab: VmxLab) -> None:
    """STAR, LSTAR, FMASK and KERNEL_GS_BASE are one for L1 and L2 where no list changes them."""
    with lab.batch() as batch:
        for msr, value in SHARED.items():
            batch.wrmsr(msr, value)
    bitmaps = lab.primary(use_msr_bitmaps=1)
    for msr, value in SHARED.items():
        source = f"mov ${int(msr):#x}, %ecx; rdmsr; mov %eax, %ebx; mov %edx, %esi; inc %eax; wrmsr"
        run = lab.run(source, bitmaps)
        run.ends()
        seen = run.registers["rsi"] << 32 | run.registers["rbx"]
        equal(f"{msr.name} in L2", seen, value)
        equal(f"{msr.name} in L1 afterwards", lab.l1.rdmsr(msr).value, value + 1)


LOOK: Final = """
    push %rbp; mov %rsp, %rbp
    mov $0x6c14, %eax; vmwrite %rsp, %rax
    lea 1f(%rip), %rdx; mov $0x6c16, %eax; vmwrite %rdx, %rax
    vmlaunch
    ud2
1:  pushfq; pop %rax
    cld
    sgdt (%rdi); sidt 16(%rdi)
    str %cx; sldt %dx
    mov %cs, %ebx; mov %ss, %esi; mov %fs, %r8d; mov %db7, %r9
    pop %rbp
"""
"""L1 enters L2 and looks at itself right behind the exit."""


@guest_test("SDM: Loading Host State", "SDM: Loading Host RIP, RSP, RFLAGS, and SSP")
def an_exit_loads_all_of_the_hosts_state(lab: VmxLab) -> None:
    """At an exit RFLAGS is 2, GDTR and IDTR limits FFFFH, LDTR null, selectors the host's."""
    lab.run("cpuid", _usable(lab)).exits_with(ExitReason.CPUID)
    data = lab.places.data
    with lab.batch() as batch:
        batch.vmclear(lab.places.control)
        batch.vmptrld(lab.places.control)
        looked = batch.call(lab.assemble(LOOK), {"rdi": data})
        bases = [batch.rdmsr(msr) for msr in (Msr.FS_BASE, Msr.GS_BASE)]
        crs = {number: batch.read_cr(number) for number in (0, 3, 4)}
    seen, fields, l1 = looked.value, lab.fields, lab.facts.l1
    equal("RFLAGS behind the exit", seen["rax"], 2)
    tables = lab.read(data, 32)
    for name, at in (("GDTR", 0), ("IDTR", 16)):
        limit, base = tables[at : at + 2], tables[at + 2 : at + 10]
        equal(f"{name} limit", int.from_bytes(limit, "little"), 0xFFFF)
        equal(f"{name} base", int.from_bytes(base, "little"), fields[F[f"HOST_{name}_BASE"]])
    equal("TR, LDTR, CS, SS and FS", [seen[name] & 0xFFFF for name in
                                      ("rcx", "rdx", "rbx", "rsi", "r8")],
          [fields[F.HOST_TR_SELECTOR], 0, fields[F.HOST_CS_SELECTOR],
           fields[F.HOST_SS_SELECTOR], 0])  # fmt: skip
    equal("DR7", seen["r9"], 0x400)
    equal("the bases of FS and GS", [base.value for base in bases], [0, 0])
    each("CR", {n: cr.value for n, cr in crs.items()}, {0: l1.cr0, 3: l1.cr3, 4: l1.cr4}.get)


@guest_test("SDM: Saving Segment Registers and Descriptor-Table Registers")
def what_l2_loads_is_what_the_exit_saves(lab: VmxLab) -> None:
    """Selectors, bases, limits and access rights that L2 loads are in the fields after the exit."""
    lab.write_u64(lab.places.gdt + 0x48, 0x0000_8200_5000_0777 | 0x12 << 32, 0)
    lab.write_u64(lab.places.data, 0x0000_5678_0000_0123, 0)
    source = """
        mov $DS3, %eax; mov %eax, %ds
        mov $DS16, %eax; mov %eax, %fs
        xor %eax, %eax; mov %eax, %gs; mov %eax, %es
        mov $0xc0000101, %ecx; mov $0x3333, %eax; mov $0x44, %edx; wrmsr
        mov $0x48, %eax; lldt %ax
        lidt (%rbx)
    """
    fields = {
        F.GUEST_DS_SELECTOR: DS3, F.GUEST_DS_BASE: 0, F.GUEST_DS_LIMIT: 0xFFFFFFFF,
        F.GUEST_DS_ACCESS_RIGHTS: 0xC0F3, F.GUEST_FS_SELECTOR: 0x28, F.GUEST_FS_LIMIT: 0xFFFF,
        F.GUEST_FS_ACCESS_RIGHTS: 0x93, F.GUEST_GS_BASE: 0x44_0000_3333,
        F.GUEST_GS_SELECTOR: 0, F.GUEST_ES_SELECTOR: 0,
        F.GUEST_LDTR_SELECTOR: 0x48, F.GUEST_LDTR_BASE: 0x125000, F.GUEST_LDTR_LIMIT: 0x777,
        F.GUEST_LDTR_ACCESS_RIGHTS: LDT_RIGHTS, F.GUEST_IDTR_LIMIT: 0x123,
        F.GUEST_IDTR_BASE: 0x5678_0000, F.GUEST_CS_SELECTOR: CS64, F.GUEST_SS_SELECTOR: DS,
        F.GUEST_TR_SELECTOR: TR, F.GUEST_TR_ACCESS_RIGHTS: 0x8B,
    }  # fmt: skip
    more = [F.GUEST_ES_ACCESS_RIGHTS, F.GUEST_GS_ACCESS_RIGHTS]
    bitmaps = lab.primary(use_msr_bitmaps=1) | {F.GUEST_GDTR_LIMIT: 0x57}
    lab.write_u64(lab.places.data, 0x0000_5678_0000_0123)
    run = lab.run(source, bitmaps, {"rbx": lab.places.data}, reads=[*fields, *more])
    run.ends()
    each("the field after the exit", {f: run[f] for f in fields}, lambda f: fields[f])
    each("the unusable bit of", {f: run[f] & UNUSABLE for f in more}, UNUSABLE)


@guest_test("SDM: Saving RIP, RSP, RFLAGS, and SSP", "SDM: Saving Control Registers, Debug"
            " Registers, and MSRs")  # fmt: skip
def rip_rsp_rflags_and_control_registers_are_saved(lab: VmxLab) -> None:
    """At an exit RIP names the instruction; RSP, RFLAGS, CR0, CR3 and CR4 are L2's own."""
    root = lab.pages()
    source = """
        mov %rbx, %cr3
        mov %cr4, %rcx; or $0x80, %rcx; mov %rcx, %cr4
        lea -0x40(%rsp), %rsp
        push $0x8d7; popfq
        cpuid
    """
    run = lab.run(source, lab.primary(cr3_load_exiting=0), {"rbx": root}, end="")
    run.exits_with(ExitReason.CPUID)
    length = len(lab.assemble(source, lab.places.code))
    equal("RIP, RSP, RFLAGS, CR3 and CR4",
          (run.rip, run[F.GUEST_RSP], run[F.GUEST_RFLAGS], run[F.GUEST_CR3], run[F.GUEST_CR4]),
          (lab.places.code + length - 2, lab.places.stack - 0x40, 0x8D7, root,
           lab.fields[F.GUEST_CR4] | Cr4.pge))  # fmt: skip


@guest_test("SDM: VM-Execution Control Fields", "SDM: VM Exits")
def an_exit_writes_no_control_and_no_host_field(lab: VmxLab) -> None:
    """Control fields and host-state fields are as written after an exit; L2 ran in between."""
    fields = {f: value for f, value in lab.fields.items()
              if F(f).area in (FieldArea.CONTROL, FieldArea.HOST)}  # fmt: skip
    run = lab.run("mov $5, %eax; cpuid", reads=[F(f) for f in fields])
    run.exits_with(ExitReason.CPUID)
    each("the field after the exit", {F(f): run[F(f)] for f in fields}, lambda f: fields[f])


@guest_test("SDM: VM-Execution Control Fields", "SDM: I/O Instructions in VMX Non-Root Operation")
def an_access_that_does_not_exit_reaches_l1s_devices(lab: VmxLab) -> None:
    """What no control makes exit works on the same device that L1 has: here the RTC's RAM."""
    io = lab.primary(unconditional_io_exiting=0, use_io_bitmaps=0)
    with lab.batch() as batch:
        batch.outp(0x70, 0x7A)
        batch.outp(0x71, 0x5C)
        there = batch.inp(0x71)
    if there.value & 0xFF != 0x5C:
        raise Lacking("there is no RTC")
    source = "mov $0x7a, %al; out %al, $0x70; in $0x71, %al; mov %al, %bl; not %al; out %al, $0x71"
    run = lab.run(source, io)
    run.ends()
    equal("the byte that L2 reads", run.registers["rbx"] & 0xFF, 0x5C)
    with lab.batch() as batch:
        batch.outp(0x70, 0x7A)
        byte = batch.inp(0x71)
    equal("the byte that L1 reads afterwards", byte.value & 0xFF, 0xA3)
