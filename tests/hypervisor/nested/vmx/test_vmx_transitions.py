"""Entries and exits: what is loaded, saved and left alone; what each failed entry does."""

import struct

import pytest
from vmx_lab import (
    CODE,
    DATA,
    EPT,
    GDT,
    MSR_LIST,
    MSR_LIST2,
    PD,
    PDPT,
    PML4,
    READ_BITMAP,
    SHADOW,
    STACK,
    VALID,
    VMCS,
    WRITE_BITMAP,
    Lab,
    event,
)

from undervisor.arch.vmx.controls import EntryControls, ExitControls
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.places import CS16, CS32, DS, DS16
from undervisor.guest.asm import assemble
from undervisor.guest.probe.answers import VmxOutcome

NONE = (1 << 64) - 1
EFER, PAT, STAR, LSTAR, KERNEL_GS = 0xC0000080, 0x277, 0xC0000081, 0xC0000082, 0xC0000102
LME, LMA, NXE, SCE = 1 << 8, 1 << 10, 1 << 11, 1
LOW = 0x30000
UNUSABLE = 1 << 16


# -- EFER, PAT, SYSENTER ---------------------------------------------------------------------------


def test_efer_is_loaded_saved_and_restored(lab):
    host = lab.facts.l1.efer
    controls = lab.on_entry(load_efer=1) | lab.on_exit(save_efer=1, load_efer=1)
    controls |= lab.primary(use_msr_bitmaps=1)
    guest = (host | LME | LMA) ^ SCE
    run = lab.run(
        "mov $0xc0000080, %ecx; rdmsr; mov %eax, %ebx; xor $1, %eax; wrmsr",
        controls | {F.GUEST_EFER: guest, F.HOST_EFER: host ^ NXE},
    )
    assert run.registers["rbx"] == guest
    assert run[F.GUEST_EFER] == guest ^ SCE
    assert lab.l1.rdmsr(EFER).value == host ^ NXE
    lab.l1.wrmsr(EFER, host)


def test_efer_of_l1_without_the_controls(lab):
    host = lab.facts.l1.efer
    controls = lab.primary(use_msr_bitmaps=1)
    run = lab.run("mov $0xc0000080, %ecx; rdmsr", controls | {F.GUEST_EFER: 0})
    assert run.registers["rax"] == host | LMA | LME
    assert run[F.GUEST_EFER] == 0
    assert lab.l1.rdmsr(EFER).value == host


def test_l2_resumes_with_the_efer_that_l1_has_by_then(lab):
    host = lab.facts.l1.efer
    controls = lab.primary(use_msr_bitmaps=1)
    lab.run("1: mov $0xc0000080, %ecx; rdmsr; vmcall; jmp 1b", controls)
    lab.l1.wrmsr(EFER, host ^ SCE)
    run = lab.resume({F.GUEST_RIP: CODE})
    lab.l1.wrmsr(EFER, host)
    assert run.registers["rax"] == (host | LMA | LME) ^ SCE


def test_pat_is_loaded_saved_and_restored(lab):
    before = lab.l1.rdmsr(PAT).value
    controls = lab.on_entry(load_pat=1) | lab.on_exit(save_pat=1, load_pat=1)
    controls |= lab.primary(use_msr_bitmaps=1)
    run = lab.run(
        "mov $0x277, %ecx; rdmsr; mov %eax, %ebx; mov $0x06060606, %eax; mov %eax, %edx; wrmsr",
        controls | {F.GUEST_PAT: 0x0101010104040404, F.HOST_PAT: 0x0505050500000000},
    )
    assert run.registers["rbx"] == 0x04040404
    assert run[F.GUEST_PAT] == 0x0606060606060606
    assert lab.l1.rdmsr(PAT).value == 0x0505050500000000
    lab.l1.wrmsr(PAT, before)


def test_pat_is_shared_without_the_controls(lab):
    before = lab.l1.rdmsr(PAT).value
    run = lab.run(
        "mov $0x277, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr",
        lab.primary(use_msr_bitmaps=1) | {F.GUEST_PAT: 0x0101010101010101},
    )
    assert run[F.GUEST_PAT] == 0x0101010101010101
    assert lab.l1.rdmsr(PAT).value == 0
    lab.l1.wrmsr(PAT, before)


def test_sysenter_msrs_are_switched(lab):
    msrs = {0x174: 0x1234, 0x175: 0xFFFF800000001000, 0x176: 0x7FFF00002000}
    guest = dict(zip((F.GUEST_SYSENTER_CS, F.GUEST_SYSENTER_ESP, F.GUEST_SYSENTER_EIP),
                     (0x10, 0x5000, 0x6000), strict=True))  # fmt: skip
    host = dict(zip((F.HOST_SYSENTER_CS, F.HOST_SYSENTER_ESP, F.HOST_SYSENTER_EIP),
                    msrs.values(), strict=True))  # fmt: skip
    source = "mov $0x174, %ecx; rdmsr; mov %eax, %ebx; mov $0x175, %ecx; rdmsr; inc %eax; wrmsr"
    run = lab.run(
        source, guest | host | lab.primary(use_msr_bitmaps=1), reads=[F.GUEST_SYSENTER_ESP]
    )
    assert run.registers["rbx"] == 0x10
    assert run[F.GUEST_SYSENTER_ESP] == 0x5001
    assert {msr: lab.l1.rdmsr(msr).value for msr in msrs} == msrs


@pytest.mark.parametrize("msr", [STAR, LSTAR, KERNEL_GS, 0xC0000103])
def test_other_msrs_are_shared(lab, msr):
    lab.l1.wrmsr(msr, 0x1000)
    source = f"mov ${msr:#x}, %ecx; rdmsr; mov %eax, %ebx; mov $0x2000, %eax; xor %edx, %edx; wrmsr"
    run = lab.run(source, lab.primary(use_msr_bitmaps=1))
    assert run.registers["rbx"] == 0x1000
    assert lab.l1.rdmsr(msr).value == 0x2000
    lab.l1.wrmsr(msr, 0)


# -- host state ------------------------------------------------------------------------------------


def test_host_segments_and_tables_are_the_vmcss(lab):
    host = {
        F.HOST_FS_SELECTOR: DS, F.HOST_FS_BASE: 0x1234_5000, F.HOST_GS_BASE: NONE - 0xFFF,
        F.HOST_ES_SELECTOR: 0, F.HOST_DS_SELECTOR: 0,
    }  # fmt: skip
    lab.run("cpuid", host)
    assert lab.l1.rdmsr(0xC0000100).value == 0x1234_5000
    assert lab.l1.rdmsr(0xC0000101).value == NONE - 0xFFF
    code = "mov %ds, %eax; mov %es, %ecx; mov %fs, %edx; mov %ss, %ebx; str %esi; sldt %edi"
    found = lab.call(code, {}).value.registers
    assert [found[r] for r in ("rax", "rcx", "rdx", "rdi")] == [0, 0, DS, 0]
    assert found["rbx"] == lab.fields[F.HOST_SS_SELECTOR]
    assert found["rsi"] == lab.fields[F.HOST_TR_SELECTOR]
    lab.write(DATA, bytes(64))
    lab.call("sgdt (%rbx); sidt 16(%rbx)", {"rbx": DATA})
    limit, base = struct.unpack("<HQ", lab.read(DATA, 10))
    assert (limit, base) == (0xFFFF, lab.fields[F.HOST_GDTR_BASE])
    limit, base = struct.unpack("<HQ", lab.read(DATA + 16, 10))
    assert (limit, base) == (0xFFFF, lab.fields[F.HOST_IDTR_BASE])


def test_host_rflags_are_clear_after_an_exit(lab):
    """The probe's RET follows the exit at once: what it returns are RFLAGS after it."""
    run = lab.run("std; stc; cpuid", {F.GUEST_RFLAGS: 0x202})
    assert run[F.GUEST_RFLAGS] == 0x603
    batch = lab.call("pushfq; pop %rax", {}, ["rax"])
    assert batch.value["rax"] & 0x600 == 0


def test_host_cr4_and_cr0_come_from_the_vmcs(lab):
    l1 = lab.facts.l1
    lab.run("cpuid", {F.HOST_CR4: l1.cr4 | 1 << 9 | 1 << 2, F.HOST_CR0: l1.cr0 | 8})
    assert lab.l1.read_cr(0).value & 8
    assert lab.l1.read_cr(4).value == l1.cr4 | 1 << 9 | 1 << 2
    lab.run("cpuid")
    assert [lab.l1.read_cr(number).value for number in (0, 4)] == [l1.cr0, l1.cr4]


def test_cr0_cd_and_nw_are_not_loaded_from_the_vmcs(lab):
    l1 = lab.facts.l1
    lab.run("cpuid", {F.GUEST_CR0: l1.cr0 ^ 1 << 30})
    assert lab.l1.read_cr(0).value == l1.cr0


# -- guest state -----------------------------------------------------------------------------------


def test_every_guest_segment_comes_back_as_it_was(lab):
    rights = {"FS": 0xC093, "GS": 0x0093, "LDTR": 0x0082, "TR": 0x008B, "ES": 0xC0F3}
    state = {F.GUEST_LDTR_SELECTOR: 0x50, F.GUEST_FS_SELECTOR: DS, F.GUEST_GS_SELECTOR: DS16}
    for number, (name, value) in enumerate(rights.items()):
        state[F[f"GUEST_{name}_ACCESS_RIGHTS"]] = value
        state[F[f"GUEST_{name}_BASE"]] = number * 0x1000
        state[F[f"GUEST_{name}_LIMIT"]] = 0xFFFFF if value >> 15 == 0 else 0xFFFFFFFF
    state[F.GUEST_TR_LIMIT] = 0x67
    state[F.GUEST_ES_SELECTOR] = 0x3B
    run = lab.run("cpuid", state, reads=list(state))
    assert run.reason is R.CPUID, hex(run[F.EXIT_REASON])
    for field, value in state.items():
        assert run[field] == value, field.name


@pytest.mark.parametrize("name", ["ES", "DS", "FS", "GS", "LDTR"])
def test_an_unusable_segment_stays_unusable(lab, name):
    field = F[f"GUEST_{name}_ACCESS_RIGHTS"]
    run = lab.run("cpuid", {field: UNUSABLE}, reads=[field])
    assert run[field] & UNUSABLE


def test_a_null_selector_loaded_by_l2_makes_a_segment_unusable(lab):
    run = lab.run("xor %eax, %eax; mov %eax, %fs; cpuid", reads=[F.GUEST_FS_ACCESS_RIGHTS])
    assert run[F.GUEST_FS_ACCESS_RIGHTS] & UNUSABLE


def test_descriptor_tables_are_l2s_own(lab):
    lab.write(DATA, bytes(64))
    limit = {F.GUEST_GDTR_LIMIT: 0x47}
    run = lab.run("sgdt (%rbx); sidt 16(%rbx); cpuid", limit, {"rbx": DATA}, reads=limit)
    assert run.reason is R.CPUID
    assert struct.unpack("<HQ", lab.read(DATA, 10)) == (0x47, GDT)
    assert run[F.GUEST_GDTR_LIMIT] == 0x47


def test_only_what_l1_wrote_changes_at_a_resume(lab):
    """The state that stays in the processor between exit and entry is still the VMCS's."""
    run = lab.run("mov %fs, %eax; cpuid; mov %fs, %ebx; cpuid", {F.GUEST_FS_SELECTOR: DS,
        F.GUEST_FS_ACCESS_RIGHTS: 0xC093, F.GUEST_FS_LIMIT: 0xFFFFFFFF})  # fmt: skip
    assert run.registers["rax"] == DS
    run = lab.skip(run, {F.GUEST_FS_BASE: 0x7000})
    assert run.registers["rbx"] == DS
    run = lab.skip(run, reads=[F.GUEST_FS_BASE, F.GUEST_FS_LIMIT])
    assert (run[F.GUEST_FS_BASE], run[F.GUEST_FS_LIMIT]) == (0x7000, 0xFFFFFFFF)


def test_general_registers_cross_in_both_directions(lab):
    names = ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
    values = {name: 0x1111 * (i + 1) << 32 | i for i, name in enumerate(names)}
    run = lab.run("; ".join(f"inc %{n}" for n in names), None, values)
    assert run.registers == {name: value + 1 for name, value in values.items()}


def test_a_guest_may_be_left_and_resumed_many_times(lab):
    run = lab.run("1: cpuid; inc %r15; jmp 1b")
    for count in range(20):
        assert run.registers["r15"] == count
        run = lab.skip(run)


# -- interrupt shadows -----------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "blocking"), [("sti", 1), ("mov %eax, %ss", 2)])
def test_a_shadow_is_saved_and_says_where_it_came_from(lab, source, blocking):
    run = lab.run(f"cli; mov $0x10, %eax; {source}; cpuid")
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == blocking
    run = lab.skip(run, {F.GUEST_INTERRUPTIBILITY_STATE: 0})
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == 0


@pytest.mark.parametrize("blocking", [1, 2])
def test_a_shadow_is_loaded_and_ends_with_an_instruction(lab, blocking):
    state = {F.GUEST_INTERRUPTIBILITY_STATE: blocking, F.GUEST_RFLAGS: 0x202}
    run = lab.run("cpuid", state)
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == blocking
    run = lab.run("nop; cpuid", state)
    assert run[F.GUEST_INTERRUPTIBILITY_STATE] == 0


# -- modes -----------------------------------------------------------------------------------------


def real_mode(lab, **more):
    """An unrestricted guest in real mode with its code at LOW."""
    changes = lab.ept()
    unrestricted = lab.secondary(unrestricted_guest=1)[F.SECONDARY_CONTROLS]
    changes[F.SECONDARY_CONTROLS] |= unrestricted
    changes |= lab.on_entry(ia32e_mode_guest=0)
    changes |= {F.GUEST_CR0: 0x30, F.GUEST_CR3: 0, F.GUEST_CR4: 1 << 13}
    changes |= {F.GUEST_GDTR_LIMIT: 0x4F, F.GUEST_IDTR_BASE: 0, F.GUEST_IDTR_LIMIT: 0x3FF}
    for name in ("ES", "SS", "DS", "FS", "GS"):
        changes |= segment(name, 0, 0, 0xFFFF, 0x93)
    changes |= segment("CS", LOW >> 4, LOW, 0xFFFF, 0x9B)
    changes |= {F.GUEST_RIP: 0, F.GUEST_RSP: 0x7000, **more}
    return changes


def segment(name, selector, base, limit, rights):
    parts = zip(("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"), (selector, base, limit, rights),
                strict=True)  # fmt: skip
    return {F[f"GUEST_{name}_{part}"]: value for part, value in parts}


def put(lab, source, bits):
    lab.write(LOW if bits == 16 else CODE, assemble(f".code{bits}\n{source}\nvmcall\n", 0).bytes)


def test_an_unrestricted_guest_runs_in_real_mode(lab):
    put(lab, "mov $0x1234, %bx; mov %cs, %ax; cpuid", 16)
    run = lab.run(None, real_mode(lab))
    assert (run.reason, run.failed_entry) == (R.CPUID, False)
    assert run.registers["rbx"] == 0x1234
    assert run.registers["rax"] == LOW >> 4
    assert (run.rip, run.length) == (5, 2)
    assert run[F.GUEST_CR0] == 0x30


def test_real_mode_interrupts_go_through_the_vector_table(lab):
    lab.write_u32(0x21 * 4, (LOW >> 4) << 16 | 0x40)
    put(lab, "int $0x21; .org 0x40; mov $7, %dx", 16)
    run = lab.run(None, real_mode(lab))
    assert (run.reason, run.registers["rdx"]) == (R.VMCALL, 7)
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(0x21, 0), F.GUEST_RFLAGS: 0x202}
    run = lab.run(None, real_mode(lab) | injected)
    assert (run.reason, run.registers["rdx"]) == (R.VMCALL, 7)


def test_vmx_instructions_are_undefined_in_real_mode_but_vmcall(lab):
    put(lab, "vmresume", 16)
    run = lab.run(None, real_mode(lab) | {F.EXCEPTION_BITMAP: 1 << 6})
    assert run.intercepted == 6
    put(lab, "", 16)
    assert lab.run(None, real_mode(lab)).reason is R.VMCALL


def test_an_unrestricted_guest_climbs_from_real_to_long_mode(lab):
    """PE, then PAE, LME and PG; the IA-32e-mode control follows at the exit."""
    lab.pages()
    source = f"""
        .code16
        cli
        lgdtl %cs:1f
        mov %cr0, %eax
        or $1, %al
        mov %eax, %cr0
        ljmpl ${CS32}, $({LOW} + 2f)
    1:  .word 0x4f
        .long {GDT}
        .code32
    2:  mov ${DS}, %eax
        mov %eax, %ds
        mov %eax, %ss
        mov %cr4, %eax
        or $0x20, %eax
        mov %eax, %cr4
        mov ${PML4:#x}, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx
        rdmsr
        or $0x100, %eax
        wrmsr
        mov %cr0, %eax
        or $0x80000000, %eax
        mov %eax, %cr0
        ljmpl $8, $({LOW} + 3f)
        .code64
    3:  mov $0x1122334455667788, %rbx
        vmcall
    """
    lab.write(LOW, assemble(source, 0).bytes)
    changes = real_mode(lab) | lab.primary(use_msr_bitmaps=1)
    changes[F.PRIMARY_CONTROLS] |= 1 << 31
    changes |= lab.on_entry(load_efer=1, ia32e_mode_guest=0) | lab.on_exit(save_efer=1)
    changes |= {F.GUEST_EFER: 0}
    run = lab.run(None, changes)
    assert run.reason is R.VMCALL, hex(run[F.EXIT_REASON])
    assert run.registers["rbx"] == 0x1122334455667788
    assert run[F.GUEST_EFER] & (LME | LMA) == LME | LMA
    assert run[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest
    assert run[F.GUEST_CS_ACCESS_RIGHTS] >> 13 & 1


def protected(lab, bits=32):
    """A guest with 32-bit paging by 4-MiB pages."""
    lab.write_u32(PD, *(index << 22 | 0x87 for index in range(1024)))
    changes = lab.on_entry(ia32e_mode_guest=0)
    changes |= {F.GUEST_CR3: PD, F.GUEST_CR4: 1 << 13 | 1 << 4 | 1 << 9}
    code = (CS32, 0, 0xFFFFFFFF, 0xC09B) if bits == 32 else (CS16, CODE, 0xFFFF, 0x009B)
    changes |= segment("CS", *code)
    for name in ("ES", "SS", "DS"):
        changes |= segment(name, DS, 0, 0xFFFFFFFF, 0xC093)
    changes |= {F.GUEST_RIP: CODE if bits == 32 else 0}
    return changes


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("ept", [False, True])
def test_a_protected_mode_guest(lab, ept, bits):
    source = "mov %cs, %eax; mov %cr3, %ebx; vmcall"
    lab.write(CODE, assemble(f".code{bits}\n{source}", 0).bytes)
    run = lab.run(None, (lab.ept() if ept else {}) | protected(lab, bits))
    assert (run.reason, run.failed_entry) == (R.VMCALL, False)
    assert run.registers["rax"] == (CS32 if bits == 32 else CS16)
    assert run.registers["rbx"] == PD


def pae(lab):
    changes = protected(lab)
    lab.table(PDPT, 4, PD | 1, 0x1000)
    lab.table(PD, 512 * 4, 0x87, 1 << 21)
    return changes | {F.GUEST_CR3: PDPT, F.GUEST_CR4: 1 << 13 | 1 << 5 | 1 << 9}


@pytest.mark.parametrize("ept", [False, True])
def test_a_pae_guest_and_its_pdptes(lab, ept):
    put(lab, "mov $0x40000000, %ebx; mov %cr3, %eax; mov %eax, %cr3", 32)
    changes = (lab.ept() if ept else {}) | pae(lab)
    if ept:
        for index in range(4):
            changes[F.GUEST_PDPTE0 + 2 * index] = PD + 0x1000 * index | 1
    run = lab.run(None, changes, reads=[F.GUEST_PDPTE0, F.GUEST_PDPTE1])
    assert (run.reason, run.failed_entry) == (R.VMCALL, False)
    if ept:
        assert run[F.GUEST_PDPTE0] == PD | 1
        assert run[F.GUEST_PDPTE1] == PD + 0x1000 | 1


def test_a_bad_pdpte_fails_the_entry(lab):
    put(lab, "nop", 32)
    changes = pae(lab)
    lab.write_u64(PDPT + 8, PD | 1 | 6)
    run = lab.run(None, changes)
    assert run.failed_entry
    assert (run.reason, run.qualification) == (R.ENTRY_FAILURE_INVALID_GUEST_STATE, 2)


def test_a_violation_at_the_load_of_pdptes_has_no_linear_address(lab):
    put(lab, "mov $0xC0000000, %eax; mov %eax, %cr3", 32)
    changes = lab.ept() | pae(lab)
    for index in range(4):
        changes[F.GUEST_PDPTE0 + 2 * index] = PD + 0x1000 * index | 1
    lab.write_u64(EPT + 0x1000 + 8 * 3, 0)
    lab.l1.invept(2)
    run = lab.run(None, changes)
    assert (run.reason, run.qualification) == (R.EPT_VIOLATION, 1)
    assert (run[F.GUEST_PHYSICAL_ADDRESS], run.rip) == (0xC0000000, CODE + 5)


def test_a_compatibility_mode_guest(lab):
    put(lab, "mov $0x11223344, %ebx; cpuid", 32)
    run = lab.run(None, segment("CS", CS32, 0, 0xFFFFFFFF, 0xC09B))
    assert (run.reason, run.registers["rbx"]) == (R.CPUID, 0x11223344)


def test_a_virtual_8086_guest(lab):
    changes = protected(lab) | {F.GUEST_RFLAGS: 0x23002}
    for name in ("ES", "SS", "DS", "FS", "GS"):
        changes |= segment(name, 0, 0, 0xFFFF, 0xF3)
    changes |= segment("CS", LOW >> 4, LOW, 0xFFFF, 0xF3)
    changes |= {F.GUEST_RIP: 0, F.GUEST_RSP: 0x7000}
    lab.write(LOW, assemble(".code16; mov $0x77, %bx; cpuid").bytes)
    run = lab.run(None, changes)
    assert (run.reason, run.failed_entry) == (R.CPUID, False), run.qualification
    assert run.registers["rbx"] == 0x77
    assert run[F.GUEST_RFLAGS] >> 17 & 1
    assert run[F.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3 == 3


# -- MSR lists -------------------------------------------------------------------------------------


def entries(lab, where, rows):
    lab.write(where, b"".join(struct.pack("<IIQ", i, r, v) for i, r, v in rows))


def test_msr_lists_are_loaded_and_stored_in_order(lab):
    entries(lab, MSR_LIST, [(KERNEL_GS, 0, 0x111), (KERNEL_GS, 0, 0x222), (LSTAR, 0, 0x333)])
    entries(lab, MSR_LIST2, [(KERNEL_GS, 0, 0), (0x10, 0, 0)])
    entries(lab, MSR_LIST2 + 0x100, [(KERNEL_GS, 0, 0x999)])
    lists = {
        F.ENTRY_MSR_LOAD_ADDRESS: MSR_LIST, F.ENTRY_MSR_LOAD_COUNT: 3,
        F.EXIT_MSR_STORE_ADDRESS: MSR_LIST2, F.EXIT_MSR_STORE_COUNT: 2,
        F.EXIT_MSR_LOAD_ADDRESS: MSR_LIST2 + 0x100, F.EXIT_MSR_LOAD_COUNT: 1,
    }  # fmt: skip
    source = "mov $0xc0000102, %ecx; rdmsr; mov %eax, %ebx; mov $0x444, %eax; wrmsr"
    run = lab.run(source, lists | lab.primary(use_msr_bitmaps=1))
    assert run.registers["rbx"] == 0x222
    assert lab.read_u64(MSR_LIST2 + 8) == 0x444
    assert lab.read_u64(MSR_LIST2 + 24) > 0
    assert lab.l1.rdmsr(KERNEL_GS).value == 0x999
    assert lab.l1.rdmsr(LSTAR).value == 0x333


@pytest.mark.parametrize(
    "bad",
    [
        (0xC0000100, 0, 0), (0xC0000101, 0, 0), (0x808, 0, 0), (KERNEL_GS, 1, 0),
        (KERNEL_GS, 0, 1 << 55), (0x12345, 0, 0), (0x3A, 0, 0), (EFER, 0, 1 << 40), (0x79, 0, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("position", [1, 3])
def test_a_bad_entry_fails_the_entry_with_its_number(lab, position, bad):
    rows = [(LSTAR, 0, 0x5000 + n) for n in range(position - 1)] + [bad]
    entries(lab, MSR_LIST, rows)
    lists = {F.ENTRY_MSR_LOAD_ADDRESS: MSR_LIST, F.ENTRY_MSR_LOAD_COUNT: position}
    run = lab.run("cpuid", lists)
    assert run.entered
    assert run[F.EXIT_REASON] == 1 << 31 | R.ENTRY_FAILURE_MSR_LOADING
    assert run.qualification == position
    if position == 3:
        assert lab.l1.rdmsr(LSTAR).value == 0x5001, "those before it were loaded"
    assert lab.run("cpuid").reason is R.CPUID


@pytest.mark.parametrize(
    ("count", "where"),
    [
        (F.ENTRY_MSR_LOAD_COUNT, F.ENTRY_MSR_LOAD_ADDRESS),
        (F.EXIT_MSR_LOAD_COUNT, F.EXIT_MSR_LOAD_ADDRESS),
        (F.EXIT_MSR_STORE_COUNT, F.EXIT_MSR_STORE_ADDRESS),
    ],
)
@pytest.mark.parametrize("address", [MSR_LIST + 1, MSR_LIST + 8, 1 << 50, NONE - 0xF])
def test_a_bad_list_address_is_a_bad_control(lab, count, where, address):
    run = lab.run("cpuid", {count: 1, where: address})
    assert (run.entered, run.result.error) == (False, 7)
    assert lab.run("cpuid", {count: 0, where: address}).reason is R.CPUID


def test_the_largest_recommended_list_is_loaded(lab):
    most = 512 * ((lab.vcpu.model.vmx.misc >> 25 & 7) + 1)
    entries(lab, MSR_LIST, [(KERNEL_GS, 0, n) for n in range(most)])
    run = lab.run("cpuid", {F.ENTRY_MSR_LOAD_ADDRESS: MSR_LIST, F.ENTRY_MSR_LOAD_COUNT: most})
    assert run.reason is R.CPUID
    assert lab.l1.rdmsr(KERNEL_GS).value == most - 1


def test_a_list_beyond_the_recommended_maximum_fails_at_its_first_entry_too_many(lab):
    most = 512 * ((lab.vcpu.model.vmx.misc >> 25 & 7) + 1)
    entries(lab, MSR_LIST, [(KERNEL_GS, 0, n) for n in range(most + 1)])
    run = lab.run("cpuid", {F.ENTRY_MSR_LOAD_ADDRESS: MSR_LIST, F.ENTRY_MSR_LOAD_COUNT: most + 1})
    assert run[F.EXIT_REASON] == 1 << 31 | R.ENTRY_FAILURE_MSR_LOADING
    assert run.qualification == most + 1


def test_the_tsc_that_an_exit_stores_is_l1s_at_the_moment_of_the_exit(lab):
    entries(lab, MSR_LIST, [(0x10, 0, 0)])
    changes = lab.primary(use_tsc_offsetting=1) | {F.TSC_OFFSET: 1 << 40}
    changes |= {F.EXIT_MSR_STORE_ADDRESS: MSR_LIST, F.EXIT_MSR_STORE_COUNT: 1}
    run = lab.run("rdtsc", changes)
    guest = run.registers["rdx"] << 32 | run.registers["rax"]
    assert 0 <= lab.read_u64(MSR_LIST + 8) + (1 << 40) - guest < 750


@pytest.mark.parametrize("loading", [False, True])
def test_a_list_that_fails_at_an_exit_is_a_vmx_abort(loading):
    lab = Lab()
    entries(lab, MSR_LIST, [(0x12345, 0, 0)])
    where, count = (
        (F.EXIT_MSR_LOAD_ADDRESS, F.EXIT_MSR_LOAD_COUNT)
        if loading
        else (F.EXIT_MSR_STORE_ADDRESS, F.EXIT_MSR_STORE_COUNT)
    )
    with pytest.raises(AssertionError, match="VMX abort"):
        lab.run("cpuid", {where: MSR_LIST, count: 1})
    assert lab.read_u32(VMCS + 4) == (4 if loading else 1)


# -- failed entries --------------------------------------------------------------------------------

BAD_CONTROLS = [
    ({F.PIN_BASED_CONTROLS: 0}, 7),
    ({F.PRIMARY_CONTROLS: 0}, 7),
    ({F.EXIT_CONTROLS: 0}, 7),
    ({F.ENTRY_CONTROLS: 0}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(0, 1)}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(3, NONE & 2)}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(32, 3)}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(13, 3)}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(6, 3, error_code=True)}, 7),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(6, 3) | 1 << 12}, 7),
    ({F.HOST_CS_SELECTOR: 0}, 8),
    ({F.HOST_TR_SELECTOR: 0}, 8),
    ({F.HOST_SS_SELECTOR: 1}, 8),
    ({F.HOST_CR4: 0}, 8),
    ({F.HOST_CR0: 0}, 8),
    ({F.HOST_FS_BASE: 1 << 55}, 8),
    ({F.HOST_GDTR_BASE: 1 << 55}, 8),
    ({F.HOST_SYSENTER_EIP: 1 << 55}, 8),
    ({F.HOST_CR3: 1 << 60}, 8),
]


@pytest.mark.parametrize(("changes", "error"), BAD_CONTROLS)
def test_bad_controls_and_host_state_fail_the_instruction(lab, changes, error):
    run = lab.run("cpuid", changes)
    assert run.result.outcome is VmxOutcome.FAIL_VALID
    assert run.result.error == error
    assert lab.resume({f: lab.fields.get(f, 0) for f in changes}).reason is R.CPUID


def test_controls_are_checked_before_host_state(lab):
    assert lab.run("cpuid", {F.HOST_CS_SELECTOR: 0, F.PIN_BASED_CONTROLS: 0}).result.error == 7


BAD_GUESTS = [
    ({F.GUEST_RFLAGS: 0}, 0),
    ({F.GUEST_RFLAGS: 2 | 1 << 63}, 0),
    ({F.GUEST_CR0: 0}, 0),
    ({F.GUEST_CR4: 0}, 0),
    ({F.GUEST_RIP: 1 << 55}, 0),
    ({F.GUEST_CS_ACCESS_RIGHTS: UNUSABLE}, 0),
    ({F.GUEST_SS_ACCESS_RIGHTS: 0xC0B3}, 0),
    ({F.GUEST_TR_ACCESS_RIGHTS: UNUSABLE}, 0),
    ({F.GUEST_TR_SELECTOR: 4}, 0),
    ({F.GUEST_LDTR_ACCESS_RIGHTS: 0x8B, F.GUEST_LDTR_SELECTOR: 0x40}, 0),
    ({F.GUEST_GDTR_LIMIT: 0x10000}, 0),
    ({F.GUEST_IDTR_BASE: 1 << 55}, 0),
    ({F.GUEST_ACTIVITY_STATE: 4}, 0),
    ({F.GUEST_ACTIVITY_STATE: 1, F.GUEST_INTERRUPTIBILITY_STATE: 1}, 0),
    ({F.GUEST_INTERRUPTIBILITY_STATE: 3, F.GUEST_RFLAGS: 0x202}, 0),
    ({F.GUEST_INTERRUPTIBILITY_STATE: 1, F.GUEST_RFLAGS: 2}, 0),
    ({F.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << 4}, 0),
    ({F.VMCS_LINK_POINTER: 1}, 4),
    ({F.VMCS_LINK_POINTER: VMCS}, 4),
    ({F.GUEST_SYSENTER_ESP: 1 << 55}, 0),
    ({F.ENTRY_INTERRUPTION_INFORMATION: event(0x30, 0), F.GUEST_RFLAGS: 2}, 0),
]


@pytest.mark.parametrize(("changes", "qualification"), BAD_GUESTS)
def test_bad_guest_state_is_a_failed_entry_that_loads_host_state(lab, changes, qualification):
    run = lab.run("cpuid", changes, reads=list(changes))
    assert run[F.EXIT_REASON] == 1 << 31 | R.ENTRY_FAILURE_INVALID_GUEST_STATE
    assert run.qualification == qualification
    for field, value in changes.items():
        assert run[field] == value, "guest state is not saved"
    assert run[F.ENTRY_INTERRUPTION_INFORMATION] == changes.get(F.ENTRY_INTERRUPTION_INFORMATION, 0)
    good = {f: lab.fields.get(f, 0) for f in changes}
    assert lab.resume(good).reason is R.CPUID


def test_l1_is_whole_after_a_failed_entry(lab):
    registers = {"rbx": 0x1111, "r15": 0x2222, "rax": 0x3333}
    run = lab.run("cpuid", {F.GUEST_RFLAGS: 0}, registers)
    assert {name: run.registers[name] for name in registers} == registers
    assert lab.l1.read_cr(4).value == lab.facts.l1.cr4


def test_exit_information_is_not_touched_by_a_failed_instruction(lab):
    lab.run("cpuid")
    run = lab.run("cpuid", {F.HOST_CS_SELECTOR: 0, F.EXIT_REASON: 0x1234})
    assert run[F.EXIT_REASON] == 0x1234


# -- VMCS shadowing --------------------------------------------------------------------------------


def shadowing(lab, *, link=SHADOW, revision=None, marked=True):
    base = int(lab.vcpu.model.vmx.basic.revision) if revision is None else revision
    lab.write_u32(SHADOW, base | marked << 31)
    lab.fill(READ_BITMAP, 0x1000)
    lab.fill(WRITE_BITMAP, 0x1000)
    changes = lab.secondary(vmcs_shadowing=1)
    return changes | {
        F.VMREAD_BITMAP_ADDRESS: READ_BITMAP, F.VMWRITE_BITMAP_ADDRESS: WRITE_BITMAP,
        F.VMCS_LINK_POINTER: link,
    }  # fmt: skip


def test_l2_reads_and_writes_the_shadow_vmcs(lab):
    changes = shadowing(lab)
    field = F.GUEST_RIP
    source = "vmwrite %rbx, %rcx; setna %al; vmread %rcx, %rdx; setna %ah"
    run = lab.run(source, changes, {"rcx": field, "rbx": 0x7788, "rax": 0})
    assert run.reason is R.VMCALL
    assert (run.registers["rdx"], run.registers["rax"] & 0xFFFF) == (0x7788, 0)
    lab.l1.vmclear(SHADOW)
    lab.l1.vmptrld(SHADOW)
    value, launch = lab.l1.vmread(field), lab.l1.vmlaunch()
    lab.l1.vmptrld(VMCS)
    assert value.value.value == 0x7788
    assert launch.value.outcome is VmxOutcome.FAIL_INVALID, "a shadow VMCS cannot be entered"


@pytest.mark.parametrize("write", [False, True])
def test_the_bitmaps_choose_what_exits(lab, write):
    changes = shadowing(lab)
    bitmap = WRITE_BITMAP if write else READ_BITMAP
    lab.write(bitmap + F.GUEST_RIP // 8, bytes([1 << F.GUEST_RIP % 8]))
    source = "vmwrite %rbx, %rcx" if write else "vmread %rcx, %rbx"
    run = lab.run(source, changes, {"rcx": F.GUEST_RIP})
    assert run.reason is (R.VMWRITE if write else R.VMREAD)
    assert lab.run(source, changes, {"rcx": F.GUEST_RSP}).reason is R.VMCALL
    assert lab.run(source, changes, {"rcx": 1 << 20}).reason is not R.VMCALL


def test_an_absent_field_of_the_shadow_is_vmfailvalid(lab):
    run = lab.run("vmread %rcx, %rbx; setz %al", shadowing(lab), {"rcx": 0x6FFE})
    assert run.registers["rax"] & 0xFF == 1


def test_no_shadow_is_vmfailinvalid(lab):
    run = lab.run("vmread %rcx, %rbx; setc %al", shadowing(lab, link=NONE), {"rcx": F.GUEST_RIP})
    assert run.registers["rax"] & 0xFF == 1


@pytest.mark.parametrize(("revision", "marked"), [(1, True), (None, False)])
def test_the_link_must_be_a_shadow_vmcs(lab, revision, marked):
    run = lab.run("cpuid", shadowing(lab, revision=revision, marked=marked))
    assert run.failed_entry
    assert run.qualification == 4


def test_without_the_control_vmread_exits(lab):
    assert lab.run("vmread %rcx, %rbx").reason is R.VMREAD


# -- the entry controls that long mode saves -------------------------------------------------------


def test_the_ia32e_control_follows_efer_at_an_exit(lab):
    run = lab.run("cpuid")
    assert run[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest
    put(lab, "nop", 32)
    run = lab.run(None, protected(lab))
    assert not run[F.ENTRY_CONTROLS] & EntryControls.ia32e_mode_guest
    assert ExitControls.host_address_space_size


def test_activity_state_hlt_waits_for_an_event(lab):
    run = lab.run("nop", {F.GUEST_ACTIVITY_STATE: 1, F.ENTRY_INTERRUPTION_INFORMATION: event(2, 2)})
    assert run.vector == 2
    assert run[F.ENTRY_INTERRUPTION_INFORMATION] & VALID == 0
    assert STACK


# -- VPID ------------------------------------------------------------------------------------------


def test_a_vpid_must_not_be_0(lab):
    vpid = lab.secondary(enable_vpid=1)
    assert lab.run("cpuid", vpid | {F.VPID: 0}).result.error == 7
    assert lab.run("cpuid", vpid | {F.VPID: 1}).reason is R.CPUID


def test_translations_of_one_vpid_are_not_seen_by_another(lab):
    """L2 changes a table without INVLPG, and another L2 with its own VPID sees the new one."""
    pages = {F.GUEST_CR3: lab.pages()}
    vpid = lab.secondary(enable_vpid=1)
    lab.write(DATA, b"first...")
    lab.write(DATA + 0x1000, b"second..")
    run = lab.run("mov (%rbx), %rax", pages | vpid | {F.VPID: 1}, {"rbx": DATA})
    assert run.registers["rax"].to_bytes(8, "little") == b"first..."
    lab.write_u64(lab.pte(DATA), DATA + 0x1000 | 7)
    run = lab.run("mov (%rbx), %rax", pages | vpid | {F.VPID: 2}, {"rbx": DATA})
    assert run.registers["rax"].to_bytes(8, "little") == b"second.."
