"""VMRUN's checks of the guest's state, and what an entry gives the guest."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.svm.checks import CR4_DEFINED
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import Attributes
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.controls import CHECKS, accepted, rejected
from undervisor.conformance.svm.lab import SvmLab

# The bits of CR4 and EFER that a CPUID bit announces: leaf, register, bit.
CR4_CPUID: Final = {
    "umip": (7, "rcx", 2), "la57": (7, "rcx", 16), "fsgsbase": (7, "rbx", 0),
    "pcide": (1, "rcx", 17), "osxsave": (1, "rcx", 26), "smep": (7, "rbx", 7),
    "smap": (7, "rbx", 20), "pke": (7, "rcx", 3), "cet": (7, "rcx", 7),
}  # fmt: skip
EFER_CPUID: Final = {
    "nxe": (0x80000001, "rdx", 20), "ffxsr": (0x80000001, "rdx", 25),
    "tce": (0x80000001, "rcx", 17), "mcommit": (0x80000008, "rbx", 8),
    "intwb": (0x80000008, "rbx", 13), "uaie": (0x80000021, "rax", 7),
    "aibrse": (0x80000021, "rax", 8),
}  # fmt: skip
OTHER_VENDORS: Final = (24, 25, 27, 28)
"""PKS, UINTR, LASS and LAM_SUP of CR4."""
HIGH: Final = range(32, 64)
OBSERVED: Final = int(Attributes.l | Attributes.db | 1 << 1)
"""What VMRUN observes of CS's attributes: L, D and R. APM 2, "Segment State in the VMCB"."""


def _absent(lab: SvmLab, table: dict[str, tuple[int, str, int]]) -> list[str]:
    """The names of a table whose CPUID bit is 0; a leaf beyond the last counts as zeros."""
    most = {base: lab.l1.cpuid(base).value["rax"] for base in (0, 0x80000000)}
    leaves = {leaf for leaf, _, _ in table.values() if leaf <= most[leaf & 0x80000000]}
    values = {leaf: lab.l1.cpuid(leaf).value for leaf in leaves}
    return [
        name
        for name, (leaf, register, bit) in table.items()
        if leaf not in values or not values[leaf][register] >> bit & 1
    ]


@guest_test(CHECKS)
def efer_svme_must_be_1(lab: SvmLab) -> None:
    """A guest whose EFER.SVME is 0 is illegal."""
    lab.code("nop")
    rejected(lab, "EFER.SVME clear", {"SVME": {F.EFER: lab.vmcb.efer & ~Efer.svme}})


@guest_test(CHECKS)
def a_reserved_bit_of_efer_is_illegal(lab: SvmLab) -> None:
    """Each bit of EFER that is not defined, or whose feature is absent, is illegal."""
    lab.code("nop")
    reserved = Efer.reserved()
    bits = {f"bit {n}": 1 << n for n in range(64) if reserved >> n & 1}
    bits |= {name: Efer.FIELDS[name].mask for name in _absent(lab, EFER_CPUID)}
    rejected(lab, "EFER", {name: {F.EFER: lab.vmcb.efer | bit} for name, bit in bits.items()})


@guest_test(CHECKS)
def cr0_nw_without_cd_is_illegal(lab: SvmLab) -> None:
    """CR0.CD clear with CR0.NW set is illegal; both set, or CD alone, is legal."""
    lab.code("nop")
    cr0 = lab.vmcb.cr0 & ~(Cr0.cd | Cr0.nw)
    rejected(lab, "NW without CD", {"NW": {F.CR0: cr0 | Cr0.nw}})
    both = {F.CR0: cr0 | Cr0.cd | Cr0.nw}
    accepted(lab, "CD", {"CD": {F.CR0: cr0 | Cr0.cd}, "CD and NW": both})


@guest_test(CHECKS)
def the_high_half_of_cr0_is_illegal(lab: SvmLab) -> None:
    """Each of CR0 bits 63:32 is illegal."""
    lab.code("nop")
    rejected(lab, "CR0", {f"bit {n}": {F.CR0: lab.vmcb.cr0 | 1 << n} for n in HIGH})


@guest_test(CHECKS)
def a_high_bit_of_cr3_is_illegal_in_long_mode(lab: SvmLab) -> None:
    """In long mode, each bit of CR3 from MAXPHYADDR to 63 is illegal."""
    lab.code("nop")
    bits = range(lab.physical_width(), 64)
    rejected(lab, "CR3", {f"bit {n}": {F.CR3: lab.vmcb.cr3 | 1 << n} for n in bits})


@guest_test(CHECKS)
def a_reserved_bit_of_cr4_is_illegal(lab: SvmLab) -> None:
    """Each bit of CR4 that AMD does not define is illegal; VMXE and SMXE are among them.

    Those that other vendors define by a CPUID bit are left out.
    """
    lab.code("nop")
    bits = [n for n in range(64) if not CR4_DEFINED >> n & 1 and n not in OTHER_VENDORS]
    rejected(lab, "CR4", {f"bit {n}": {F.CR4: lab.vmcb.cr4 | 1 << n} for n in bits})


@guest_test(CHECKS)
def a_bit_of_cr4_without_its_feature_is_illegal(lab: SvmLab) -> None:
    """A bit of CR4 whose feature CPUID does not have is illegal."""
    lab.code("nop")
    absent = _absent(lab, CR4_CPUID)
    cases = {name: {F.CR4: lab.vmcb.cr4 | Cr4.FIELDS[name].mask} for name in absent}
    rejected(lab, "CR4", cases)


@guest_test(CHECKS)
def the_high_halves_of_dr6_and_dr7_are_illegal(lab: SvmLab) -> None:
    """Each of bits 63:32 of DR6 and of DR7 is illegal."""
    lab.code("nop")
    rejected(lab, "DR6 and DR7", {
        f"{field.name} bit {n}": {field: lab.vmcb[field] | 1 << n}
        for field in (F.DR6, F.DR7)
        for n in HIGH
    })  # fmt: skip


@guest_test(CHECKS)
def long_mode_needs_pae_and_protection(lab: SvmLab) -> None:
    """EFER.LME and CR0.PG set with CR4.PAE or CR0.PE clear are illegal."""
    lab.code("nop")
    rejected(lab, "long mode", {
        "PAE clear": {F.CR4: lab.vmcb.cr4 & ~Cr4.pae},
        "PE clear": {F.CR0: lab.vmcb.cr0 & ~Cr0.pe},
    })  # fmt: skip


@guest_test(CHECKS)
def a_code_segment_of_long_mode_is_not_both_l_and_d(lab: SvmLab) -> None:
    """EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D all set are illegal; without paging they are not."""
    lab.code("nop")
    both = int(Attributes.l | Attributes.db)
    rejected(lab, "L and D", {"L and D": {F.CS_ATTRIBUTES: lab.vmcb.cs_attributes | both}})
    legacy = modes.protected(lab)
    accepted(lab, "L and D in legacy mode", {
        "L and D": legacy | {F.CS_ATTRIBUTES: legacy[F.CS_ATTRIBUTES] | both}
    })  # fmt: skip


@guest_test("APM: VMRUN Instruction", "APM: Paged Real Mode")
def paged_real_mode_is_legal(lab: SvmLab) -> None:
    """CR0.PG set with CR0.PE clear is legal in a guest without EFER.LME: paged real mode."""
    paged = modes.pae(lab)
    cr0 = paged[F.CR0] & ~Cr0.pe
    lab.code(".code16\nmov $0x1234, %ax; mov %ax, 16")
    begin = modes.real(lab) | {F.CR0: cr0, F.CR3: paged[F.CR3], F.CR4: paged[F.CR4]}
    lab.run(None, begin).ends()
    equal("what L2 wrote", lab.read_u32(lab.places.data + 16), 0x1234)


@guest_test("APM: Canonicalization and Consistency Checks", "APM: Extended Feature Enable Register")
def bits_of_efer_that_the_processor_has_are_legal(lab: SvmLab) -> None:
    """SCE, and NXE where CPUID has it, may be set in the guest's EFER, and L2 reads them."""
    features = lab.l1.cpuid(0x80000001).value["rdx"]
    bits = [Efer.sce] + [Efer.nxe] * (features >> 20 & 1)
    lab.fill(lab.places.msr, 0x2000)
    lab.code(f"mov ${int(Msr.EFER):#x}, %ecx; rdmsr")
    for bit, on in product(bits, (0, 1)):
        value = lab.vmcb.efer & ~bit | bit * on
        run = lab.run(None, {F.EFER: value})
        run.ends()
        equal(f"EFER as L2 reads it with {bit:#x} {on}", run.registers["rax"], value)


MODES: Final = {
    "real": modes.real, "16-bit protected": modes.protected16, "32-bit protected": modes.protected,
    "PAE paging": modes.pae, "two-level paging": modes.legacy_paging,
    "compatibility": lambda lab: modes.compatibility(), "64-bit, CPL 3": modes.user,
}  # fmt: skip
SIXTEEN: Final = ("real", "16-bit protected")


@guest_test("APM: VMRUN Instruction", "APM: Segment State in the VMCB", cases={m: m for m in MODES})
def l2_may_begin_in_any_mode(lab: SvmLab, mode: str) -> None:
    """VMRUN starts a guest in each of the processor's modes, and #VMEXIT saves that mode."""
    begin, places = MODES[mode](lab), lab.places
    where = 0x40 if mode in SIXTEEN else places.data + 0x40
    bits = 16 if mode in SIXTEEN else 64 if "64" in mode else 32
    lab.code(f".code{bits}\nmov $0x12345678, %eax; mov %eax, {where:#x}")
    run = lab.run(None, begin)
    run.ends()
    equal("what L2 wrote", lab.read_u32(places.data + 0x40), 0x12345678)
    for field in (F.CR0, F.CR3, F.CR4, F.CPL, F.CS_BASE, F.RFLAGS):
        equal(f"{field.name} at the exit", run[field], begin.get(field, lab.vmcb[field]))
    attributes = begin.get(F.CS_ATTRIBUTES, lab.vmcb.cs_attributes)
    seen = run[F.CS_ATTRIBUTES] & OBSERVED
    equal("D, L and R of CS at the exit", seen, attributes & OBSERVED)
    long_mode = mode in ("compatibility", "64-bit, CPL 3")
    equal("EFER.LMA at the exit", bool(run[F.EFER] & Efer.lma), long_mode)


# What L2 sees of its VMCB: code that moves a register to RBX, and the field.
SEEN: Final = {
    "mov %cr0, %rbx": (F.CR0, int(Cr0.am)), "mov %cr2, %rbx": (F.CR2, 0x123456789000),
    "mov %cr4, %rbx": (F.CR4, int(Cr4.de | Cr4.tsd)), "mov %dr6, %rbx": (F.DR6, 1),
    "mov %dr7, %rbx": (F.DR7, 0x155), "pushfq; pop %rbx": (F.RFLAGS, 0x8D5),
    "mov %rsp, %rbx": (F.RSP, 0x40), "mov %rax, %rbx": (F.RAX, 0xFEDCBA9876543210),
    "mov %ds, %ebx": (F.DS_SELECTOR, 0x20), "mov %es, %ebx": (F.ES_SELECTOR, 0x20),
    "mov %ss, %ebx": (F.SS_SELECTOR, 0x20), "mov %cs, %ebx": (F.CS_SELECTOR, 0x20),
}  # fmt: skip


@guest_test("APM: VMRUN Instruction", "APM: VMCB Layout, State Save Area")
def l2_sees_the_state_that_the_vmcb_holds(lab: SvmLab) -> None:
    """VMRUN loads each register of the state save area: L2 reads what L1 wrote."""
    got, wanted = {}, {}
    for text, (field, extra) in SEEN.items():
        value = lab.vmcb[field] ^ extra
        run = lab.run(text, {field: value, F.RSP: lab.places.stack - 0x40} | {field: value})
        run.exits_with(ExitCode.VMMCALL)
        got[field], wanted[field] = run.registers["rbx"], value
    each("what L2 reads of the field", got, lambda field: wanted[field])


@guest_test("APM: VMRUN Instruction", "APM: VMCB Layout, State Save Area")
def l2_has_the_descriptor_tables_of_the_vmcb(lab: SvmLab) -> None:
    """GDTR and IDTR are the VMCB's, base and limit, in the guest and after its exit."""
    table = {F.GDTR_BASE: 0x123456000, F.GDTR_LIMIT: 0x7F, F.IDTR_BASE: 0x765432000}
    changes = table | {F.IDTR_LIMIT: 0x1FF}
    run = lab.run(f"sgdt {lab.places.data}; sidt {lab.places.data + 16}", changes)
    run.ends()
    for place, name in ((lab.places.data, "GDTR"), (lab.places.data + 16, "IDTR")):
        data = lab.read(place, 10)
        base, limit = F[f"{name}_BASE"], F[f"{name}_LIMIT"]
        equal(f"L2's {name}", int.from_bytes(data[2:], "little"), changes[base])
        equal(f"the limit of L2's {name}", int.from_bytes(data[:2], "little"), changes[limit])
        equal(f"{name} in the VMCB", (run[base], run[limit]), (changes[base], changes[limit]))


@guest_test("APM: Segment State in the VMCB")
def l2_uses_the_hidden_parts_of_its_segments(lab: SvmLab) -> None:
    """The base in the VMCB counts, whatever the selector names in a table."""
    base = lab.places.data + 0x100
    begin = modes.compatibility() | {F.DS_BASE: base, F.ES_BASE: base + 0x1000}
    lab.code(".code32\nmovl $0x51, 0; movl $0x52, %es:8")
    lab.run(None, begin).ends()
    equal("at DS:0", lab.read_u32(base), 0x51)
    equal("at ES:8", lab.read_u32(base + 0x1008), 0x52)


@guest_test("APM: VMLOAD", "APM: VMRUN Instruction")
def vmrun_does_not_load_what_vmload_loads(lab: SvmLab) -> None:
    """VMRUN and #VMEXIT leave alone what VMLOAD and VMSAVE move: L2 has L1's values."""
    places = lab.places
    area = lab.area({F.KERNEL_GS_BASE: 0x1111000, F.LSTAR: 0x2222000})
    lab.code(f"mov ${int(Msr.KERNEL_GS_BASE):#x}, %ecx; rdmsr; mov %eax, %ebx; "
             f"mov ${int(Msr.LSTAR):#x}, %ecx; rdmsr; mov %eax, %esi")  # fmt: skip
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(area))
        old = {msr: batch.rdmsr(msr) for msr in (Msr.KERNEL_GS_BASE, Msr.LSTAR)}
        batch.wrmsr(Msr.KERNEL_GS_BASE, 0x3333000)
        batch.wrmsr(Msr.LSTAR, 0x4444000)
        ran = batch.vmrun(places.control)
        batch.stgi()
    with lab.batch() as batch:
        new = {msr: batch.rdmsr(msr) for msr in (Msr.KERNEL_GS_BASE, Msr.LSTAR)}
        for msr, value in old.items():
            batch.wrmsr(msr, value.value)
    equal("what L2 reads", (ran.value["rbx"], ran.value["rsi"]), (0x3333000, 0x4444000))
    equal("what L1 reads after it", [a.value for a in new.values()], [0x3333000, 0x4444000])
    kept = [lab.read_u64(places.control + f) for f in (F.KERNEL_GS_BASE, F.LSTAR)]
    equal("what the VMCB holds", kept, [0x1111000, 0x2222000])
