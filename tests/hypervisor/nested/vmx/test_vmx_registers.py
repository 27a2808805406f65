"""CR0 and CR4 masks and shadows, CR3 targets, LMSW, SMSW and CLTS, fixed bits, debug registers."""

import pytest
from vmx_lab import CODE, DATA, PML4

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F

TS, EM, MP, PE, NE, AM, WP, CD, NW, PG = (1 << b for b in (3, 2, 1, 0, 5, 18, 16, 30, 29, 31))
NONE = (1 << 64) - 1


def own(mask, shadow, number=0):
    name = F.CR0_GUEST_HOST_MASK if number == 0 else F.CR4_GUEST_HOST_MASK
    read = F.CR0_READ_SHADOW if number == 0 else F.CR4_READ_SHADOW
    return {name: mask, read: shadow}


def cr_access(number, kind, register=0, source=0):
    return number | kind << 4 | register << 8 | source << 16


# -- masks and shadows -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 4])
def test_owned_bits_are_read_from_the_shadow(lab, number):
    field = F.GUEST_CR0 if number == 0 else F.GUEST_CR4
    real = lab.fields[field] | 0x10 * (number == 0)
    run = lab.run(f"mov %cr{number}, %rax")
    assert run.registers["rax"] == real
    run = lab.run(f"mov %cr{number}, %rax", own(NONE, 0xCAFE, number))
    assert run.registers["rax"] == 0xCAFE
    run = lab.run(f"mov %cr{number}, %r12", own(0xF0, 0xFFFF, number))
    assert run.registers["r12"] == real & ~0xF0 | 0xF0


@pytest.mark.parametrize("bit", [MP, EM, TS, AM, WP, CD])
def test_a_write_that_differs_from_the_shadow_in_an_owned_bit_exits(lab, bit):
    cr0 = lab.fields[F.GUEST_CR0] & ~bit
    base = {F.GUEST_CR0: cr0}
    source = "mov %rbx, %cr0"
    run = lab.run(source, base | own(bit, 0), {"rbx": cr0 | bit})
    assert run.reason is R.CONTROL_REGISTER_ACCESSES
    assert run.qualification == cr_access(0, 0, 3)
    assert (run.length, run[F.GUEST_CR0] & bit) == (3, 0)
    run = lab.run(source, base | own(bit, bit), {"rbx": cr0 | bit})
    assert run.reason is R.VMCALL
    assert run[F.GUEST_CR0] & bit == 0, "an owned bit does not change"
    run = lab.run(source, base | own(0, 0), {"rbx": cr0 | bit})
    assert run.reason is R.VMCALL
    assert run[F.GUEST_CR0] & bit == bit


@pytest.mark.parametrize("bit", [2, 3, 7, 9, 10])
def test_cr4_too(lab, bit):
    cr4 = lab.fields[F.GUEST_CR4] & ~(1 << bit)
    base = {F.GUEST_CR4: cr4}
    run = lab.run("mov %r9, %cr4", base | own(1 << bit, 0, 4), {"r9": cr4 | 1 << bit})
    assert run.qualification == cr_access(4, 0, 9)
    run = lab.run("mov %r9, %cr4", base | own(1 << bit, 1 << bit, 4), {"r9": cr4 | 1 << bit})
    assert (run.reason, run[F.GUEST_CR4]) == (R.VMCALL, cr4)
    run = lab.run("mov %r9, %cr4", base, {"r9": cr4 | 1 << bit})
    assert (run.reason, run[F.GUEST_CR4]) == (R.VMCALL, cr4 | 1 << bit)


@pytest.mark.parametrize(
    ("number", "clear"), [(0, NE), (4, 1 << 13), (0, PE), (0, PG), (4, 1 << 5)]
)
def test_fixed_and_needed_bits_cannot_be_cleared(lab, number, clear):
    value = lab.fields[F.GUEST_CR0 if number == 0 else F.GUEST_CR4] & ~clear
    run = lab.run(f"mov %rbx, %cr{number}", registers={"rbx": value})
    assert run.vector == 13


@pytest.mark.parametrize(("number", "put"), [(0, 1 << 32), (0, NW), (4, 1 << 31), (4, 1 << 40)])
def test_reserved_bits_fault(lab, number, put):
    field = F.GUEST_CR0 if number == 0 else F.GUEST_CR4
    value = lab.fields[field] & ~CD | put
    run = lab.run(
        f"mov %rbx, %cr{number}", {F.GUEST_CR0: lab.fields[F.GUEST_CR0] & ~CD}, {"rbx": value}
    )
    assert run.vector == 13


def test_the_exit_comes_before_the_fault_of_a_reserved_bit(lab):
    value = lab.fields[F.GUEST_CR4] | 1 << 31 | 4
    run = lab.run("mov %rbx, %cr4", own(4, 0, 4), {"rbx": value})
    assert run.reason is R.CONTROL_REGISTER_ACCESSES


# -- CLTS, LMSW, SMSW ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "shadow", "exits", "after"),
    [(TS, TS, True, TS), (TS, 0, False, TS), (0, TS, False, 0), (0, 0, False, 0)],
)
def test_clts(lab, mask, shadow, exits, after):
    changes = own(mask, shadow) | {F.GUEST_CR0: lab.fields[F.GUEST_CR0] | TS}
    run = lab.run("clts", changes)
    assert run[F.GUEST_CR0] & TS == after
    if exits:
        assert (run.qualification, run.length) == (cr_access(0, 2), 2)
    else:
        assert run.reason is R.VMCALL


@pytest.mark.parametrize("bit", [MP, EM, TS])
def test_lmsw_watches_owned_bits(lab, bit):
    base = {F.GUEST_CR0: lab.fields[F.GUEST_CR0] & ~0xE}
    run = lab.run("lmsw %bx", base | own(bit, 0), {"rbx": bit | PE | 0xFFFF0000})
    assert run.qualification == cr_access(0, 3, 0, bit | PE)
    assert run[F.GUEST_LINEAR_ADDRESS] == 0
    run = lab.run("lmsw %bx", base | own(bit, bit), {"rbx": bit | PE})
    assert (run.reason, run[F.GUEST_CR0] & 0xE) == (R.VMCALL, 0)
    run = lab.run("lmsw %bx", base, {"rbx": bit | PE})
    assert (run.reason, run[F.GUEST_CR0] & 0xE) == (R.VMCALL, bit)


def test_lmsw_from_memory_tells_the_address(lab):
    lab.write_u64(DATA + 8, TS | PE)
    run = lab.run("lmsw 8(%rbx)", own(TS, 0), {"rbx": DATA})
    assert run.qualification == cr_access(0, 3, 0, TS | PE) | 1 << 6
    assert run[F.GUEST_LINEAR_ADDRESS] == DATA + 8


def test_lmsw_ignores_pe_that_is_owned_and_clear_in_the_source(lab):
    """LMSW cannot clear PE, so that a 0 in the source is no attempt to change it."""
    run = lab.run("lmsw %bx", own(PE, PE), {"rbx": 0})
    assert run.reason is R.VMCALL
    assert run[F.GUEST_CR0] & PE
    run = lab.run("lmsw %bx", own(PE, 0), {"rbx": PE})
    assert run.reason is R.CONTROL_REGISTER_ACCESSES


def test_smsw_reads_the_shadow(lab):
    run = lab.run("smsw %eax", own(0xF, 0xA) | {F.GUEST_CR0: lab.fields[F.GUEST_CR0] & ~0xE})
    assert run.registers["rax"] & 0xF == 0xA
    lab.write(DATA, b"\xff" * 8)
    lab.run("smsw (%rbx)", own(0xF, 0xA), {"rbx": DATA})
    assert lab.read(DATA, 4)[0] & 0xF == 0xA
    assert lab.read(DATA + 2, 2) == b"\xff\xff"


# -- CR3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(5))
def test_cr3_targets_do_not_exit(lab, count):
    cr3 = lab.facts.l1.cr3
    changes = lab.primary(cr3_load_exiting=1) | {F.CR3_TARGET_COUNT: count}
    for index in range(4):
        changes[F.CR3_TARGET_VALUE_0 + 2 * index] = cr3 if index == 3 else index << 12
    run = lab.run("mov %rbx, %cr3", changes, {"rbx": cr3})
    assert run.reason is (R.VMCALL if count == 4 else R.CONTROL_REGISTER_ACCESSES)
    if count < 4:
        assert run.qualification == cr_access(3, 0, 3)


def test_too_many_cr3_targets_are_refused(lab):
    assert lab.run("cpuid", {F.CR3_TARGET_COUNT: 5}).result.error == 7


def test_cr3_with_pcid_keeps_translations_and_bit_63_out_of_the_register(lab):
    cr4 = lab.fields[F.GUEST_CR4] | 1 << 17
    pages = {F.GUEST_CR3: lab.pages()}
    run = lab.run(
        "mov %rbx, %cr3; mov %cr3, %rax", {F.GUEST_CR4: cr4} | pages, {"rbx": PML4 | 5 | 1 << 63}
    )
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert run.registers["rax"] == PML4 | 5
    assert run[F.GUEST_CR3] == PML4 | 5
    run = lab.run("mov %rbx, %cr3", registers={"rbx": PML4 | 1 << 63})
    assert run.vector == 13


def test_a_reserved_bit_of_cr3_faults(lab):
    width = lab.vcpu.model.physical_width
    run = lab.run("mov %rbx, %cr3", registers={"rbx": lab.facts.l1.cr3 | 1 << width})
    assert run.vector == 13


def test_cr3_loads_change_what_l2_sees(lab):
    """Without EPT too: L1's own tables are not L2's."""
    lab.pages()
    lab.write_u64(lab.pte(DATA), DATA + 0x1000 | 7)
    lab.write(DATA, b"before..")
    lab.write(DATA + 0x1000, b"after...")
    run = lab.run(
        "mov (%rbx), %rax; mov %rcx, %cr3; mov (%rbx), %rdx", None, {"rbx": DATA, "rcx": PML4}
    )
    assert run.registers["rax"].to_bytes(8, "little") == b"before.."
    assert run.registers["rdx"].to_bytes(8, "little") == b"after..."


def test_cr2_is_nobodys_but_the_processors(lab):
    run = lab.run("mov %rbx, %cr2; cpuid; mov %cr2, %rdx", None, {"rbx": 0x1234567})
    assert lab.l1.read_cr(2).value == 0x1234567
    lab.l1.write_cr(2, 0x7654321)
    run = lab.skip(run)
    assert run.registers["rdx"] == 0x7654321


# -- CR8 without a TPR shadow ----------------------------------------------------------------------


def test_cr8_is_l1s_own_without_a_tpr_shadow(lab):
    changes = lab.primary(cr8_load_exiting=0, cr8_store_exiting=0)
    run = lab.run("mov %rbx, %cr8; mov %cr8, %rax", changes, {"rbx": 5})
    assert run.registers["rax"] == 5
    assert lab.l1.read_cr(8).value == 5
    lab.l1.write_cr(8, 0)
    assert lab.run("mov %rbx, %cr8", changes, {"rbx": 16}).vector == 13


def test_cr8_exits_name_the_register(lab):
    run = lab.run("mov %r10, %cr8", lab.primary(cr8_load_exiting=1))
    assert run.qualification == cr_access(8, 0, 10)
    run = lab.run("mov %cr8, %r10", lab.primary(cr8_store_exiting=1))
    assert run.qualification == cr_access(8, 1, 10)


# -- debug registers -------------------------------------------------------------------------------


def test_dr7_is_loaded_and_saved_on_demand(lab):
    lab.l1.write_dr(7, 0x400)
    changes = lab.on_entry(load_debug_controls=1) | lab.on_exit(save_debug_controls=1)
    changes |= {F.GUEST_DR7: 0x70F, F.GUEST_DEBUGCTL: 2}
    run = lab.run("mov %db7, %rax; mov $0x40A, %ebx; mov %rbx, %db7", changes)
    assert run.registers["rax"] == 0x70F
    assert run[F.GUEST_DR7] == 0x40A
    assert lab.l1.read_dr(7).value == 0x400


def test_dr7_is_l1s_without_the_control(lab):
    off = lab.on_entry(load_debug_controls=0) | lab.on_exit(save_debug_controls=0)
    lab.l1.write_dr(7, 0x408)
    run = lab.run("mov %db7, %rax", off | {F.GUEST_DR7: 0x70F})
    assert run.registers["rax"] & 0x40F == 0x408
    assert run[F.GUEST_DR7] == 0x70F
    assert lab.l1.read_dr(7).value == 0x400


def test_debugctl_is_loaded_saved_and_cleared(lab):
    on = lab.on_entry(load_debug_controls=1) | lab.on_exit(save_debug_controls=1)
    on |= lab.primary(use_msr_bitmaps=1)
    run = lab.run(
        "mov $0x1d9, %ecx; rdmsr; mov %eax, %ebx; mov $1, %eax; wrmsr",
        on | {F.GUEST_DEBUGCTL: 2},
    )
    assert run.registers["rbx"] == 2
    assert run[F.GUEST_DEBUGCTL] == 1
    assert lab.l1.rdmsr(0x1D9).value == 0


def test_dr0_to_dr3_and_dr6_are_shared(lab):
    run = lab.run("mov %rbx, %db2; mov %db2, %rax", None, {"rbx": 0x1234})
    assert run.registers["rax"] == 0x1234
    assert lab.l1.read_dr(2).value == 0x1234
    assert run.rip > CODE
