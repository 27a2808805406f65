"""EPT: permissions, misconfigurations, accessed and dirty flags, PML, what L1 learns of a fault."""

import pytest
from vmx_lab import (
    CODE,
    DATA,
    EPT,
    EPT2,
    EPTP_LIST,
    IDT,
    PML,
    PML4,
    STACK,
    VALID,
    Lab,
    event,
)

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.places import WINDOW
from undervisor.guest.asm import assemble

READ, WRITE, EXEC = 1, 2, 4
LINEAR, TRANSLATED = 0x80, 0x100
TARGET = 0x4000_0000 + DATA + 0x128
"""An address of which L1 translates nothing else, at whatever page size."""
TABLE1, TABLE2 = EPT + 0x3000, EPT + 0x4000
ACCESS = {
    READ: "mov (%rbx), %rax",
    WRITE: "mov %rax, (%rbx)",
    EXEC: "call *%rbx",
}
SHIFTS = [12, 21, 30]


def target(lab, shift, rights, bits=0x30, base=None):
    """The translation of TARGET by one page of a size, and the address of its leaf."""
    lab.fill(DATA, 0x1000)
    lab.write(DATA + 0x128, assemble("ret").bytes)
    page = DATA if base is None else base
    where = {30: EPT + 0x1008, 21: TABLE1 + (TARGET >> 21 & 511) * 8}.get(
        shift, TABLE2 + (TARGET >> 12 & 511) * 8
    )
    lab.fill(TABLE1, 0x2000)
    lab.write_u64(EPT + 0x1008, TABLE1 | 7)
    lab.write_u64(TABLE1 + (TARGET >> 21 & 511) * 8, TABLE2 | 7)
    large = 0x80 if shift > 12 else 0
    lab.write_u64(where, page & ~((1 << shift) - 1) | bits | large | rights)
    return where


def touch(lab, access, changes, address=TARGET, **more):
    lab.l1.invept(2)
    return lab.run(ACCESS[access], changes, {"rbx": address, "rax": 0x1122}, **more)


# -- permissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
@pytest.mark.parametrize("rights", range(8))
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_pages_permissions_decide(lab, shift, rights, access):
    changes = lab.ept()
    target(lab, shift, rights)
    run = touch(lab, access, changes)
    if rights & 3 == WRITE:
        assert run.reason is R.EPT_MISCONFIGURATION
        assert run[F.GUEST_PHYSICAL_ADDRESS] == TARGET
        return
    if rights & access:
        assert (run.reason, run.vector) == (R.VMCALL, None)
        if access == WRITE:
            assert lab.read_u64(DATA + 0x128) == 0x1122
        return
    assert run.reason is R.EPT_VIOLATION
    assert run.qualification == access | rights << 3 | LINEAR | TRANSLATED
    assert run[F.GUEST_LINEAR_ADDRESS] == TARGET
    assert run[F.GUEST_PHYSICAL_ADDRESS] == TARGET
    if access != EXEC:
        assert run.rip == CODE
    else:
        assert run.rip == TARGET


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("rights", [0, 1, 3, 4, 5])
def test_a_tables_permissions_narrow_those_below(lab, level, rights):
    changes = lab.ept()
    target(lab, 12, 7)
    where = {2: TABLE1 + (TARGET >> 21 & 511) * 8, 3: EPT + 0x1008}[level]
    lab.write_u64(where, lab.read_u64(where) & ~7 | rights)
    for access in ACCESS:
        run = touch(lab, access, changes)
        if rights & access:
            assert run.reason is R.VMCALL
        else:
            assert run.reason is R.EPT_VIOLATION
            assert run.qualification == access | rights << 3 | LINEAR | TRANSLATED


def test_execute_only_is_a_misconfiguration_without_the_feature():
    lab = Lab("intel,-vmx-ept-execonly")
    changes = lab.ept()
    target(lab, 12, EXEC)
    assert touch(lab, EXEC, changes).reason is R.EPT_MISCONFIGURATION


def test_a_read_modify_write_needs_both(lab):
    changes = lab.ept()
    target(lab, 12, READ)
    lab.l1.invept(2)
    run = lab.run("lock incl (%rbx)", changes, {"rbx": TARGET})
    assert run.reason is R.EPT_VIOLATION
    assert run.qualification & WRITE
    assert run.qualification & ~3 == READ << 3 | LINEAR | TRANSLATED


@pytest.mark.parametrize(
    ("source", "gva"),
    [
        ("movdqu (%rbx), %xmm0", TARGET),
        ("push (%rbx)", TARGET),
        ("mov %rbx, %rsp; push %rax", TARGET - 8),
        ("mov %rbx, %rsp; pop %rax", TARGET),
        ("mov %rbx, %rsp; call 1f; 1:", TARGET - 8),
        ("mov %rbx, %rsp; ret", TARGET),
        ("mov %rbx, %rsi; lodsq", TARGET),
        ("mov %rbx, %rdi; stosb", TARGET),
        ("mov %rbx, %rdi; mov $4, %ecx; rep stosq", TARGET),
        ("fxsave -8(%rbx)", TARGET - 8),
        ("cmpxchg %rcx, 8(%rbx)", TARGET + 8),
        ("mov %gs:(%rbx), %al", TARGET),
        ("mov -1(%rbx, %rdx, 2), %al", TARGET - 1 + 6),
        ("sgdt (%rbx)", TARGET),
        ("enter $16, $0", None),
        ("lidt (%rbx)", TARGET),
        ("smsw (%rbx)", TARGET),
    ],
)
def test_the_linear_address_of_any_access_is_found(lab, source, gva):
    changes = lab.ept()
    target(lab, 12, 0)
    lab.l1.invept(2)
    if source.startswith("enter"):
        changes |= {F.GUEST_RSP: TARGET}
        gva = TARGET - 8
    run = lab.run(source, changes, {"rbx": TARGET, "rdx": 3})
    assert run.reason is R.EPT_VIOLATION
    assert run.qualification & (LINEAR | TRANSLATED) == LINEAR | TRANSLATED
    address = run[F.GUEST_LINEAR_ADDRESS]
    assert address == gva if gva is not None else address & -4096 == TARGET & -4096
    assert run[F.GUEST_PHYSICAL_ADDRESS] == address


def test_an_access_across_pages_faults_on_the_second(lab):
    changes = lab.ept()
    target(lab, 12, 7)
    lab.l1.invept(2)
    edge = TARGET | 0xFFC
    run = lab.run("mov (%rbx), %rax", changes, {"rbx": edge})
    assert run.reason is R.EPT_VIOLATION
    assert run[F.GUEST_PHYSICAL_ADDRESS] == edge + 4
    assert run.qualification & 0x3F == READ


def test_a_fetch_across_pages_faults_on_the_second(lab):
    changes = lab.ept()
    target(lab, 12, 7)
    lab.l1.invept(2)
    lab.write(DATA + 0xFFE, b"\x48\xb8")
    run = lab.run("jmp *%rbx", changes, {"rbx": TARGET & -4096 | 0xFFE})
    assert run.reason is R.EPT_VIOLATION
    assert run[F.GUEST_PHYSICAL_ADDRESS] == (TARGET & -4096) + 4096
    assert run.qualification == EXEC | LINEAR | TRANSLATED


def test_execute_only_code_runs_and_cannot_be_read(lab):
    changes = lab.ept()
    target(lab, 12, EXEC)
    lab.write(DATA + 0x128, assemble("mov $7, %eax; lea (%rip), %rdx; mov (%rdx), %cl").bytes)
    lab.l1.invept(2)
    run = lab.run("jmp *%rbx", changes, {"rbx": TARGET})
    assert run.reason is R.EPT_VIOLATION
    assert run.registers["rax"] == 7
    assert run.qualification == READ | EXEC << 3 | LINEAR | TRANSLATED


def test_execute_only_code_may_loop_and_exit(lab):
    changes = lab.ept()
    target(lab, 12, EXEC)
    code = "mov $1000, %ecx; 1: inc %rax; dec %ecx; jnz 1b; cpuid"
    lab.write(DATA + 0x128, assemble(code).bytes)
    lab.l1.invept(2)
    run = lab.run("xor %eax, %eax; jmp *%rbx", changes, {"rbx": TARGET})
    assert (run.reason, run.length) == (R.CPUID, 2)
    assert run.registers["rax"] == 1000


# -- misconfigurations -----------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("memory_type", range(8))
def test_memory_types_2_3_and_7_are_misconfigurations(lab, shift, memory_type):
    changes = lab.ept()
    target(lab, shift, 7, memory_type << 3)
    run = touch(lab, READ, changes)
    assert run.reason is (R.EPT_MISCONFIGURATION if memory_type in (2, 3, 7) else R.VMCALL)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("bit", [12, 20, 21, 29, 45, 48, 51])
def test_reserved_address_bits_are_misconfigurations(lab, shift, bit):
    width = lab.vcpu.model.physical_width
    changes = lab.ept()
    target(lab, shift, 7, 0x30 | 1 << bit)
    run = touch(lab, READ, changes)
    reserved = bit >= width or 12 <= bit < shift
    assert (run.reason is R.EPT_MISCONFIGURATION) == reserved


@pytest.mark.parametrize("bit", [3, 4, 5, 6])
def test_reserved_bits_of_a_table_are_misconfigurations(lab, bit):
    changes = lab.ept()
    target(lab, 12, 7)
    for where in (EPT + 0x1008, TABLE1 + (TARGET >> 21 & 511) * 8):
        old = lab.read_u64(where)
        lab.write_u64(where, old | 1 << bit)
        run = touch(lab, READ, changes)
        lab.write_u64(where, old)
        assert run.reason is R.EPT_MISCONFIGURATION


@pytest.mark.parametrize("bit", [8, 9, 10, 11, 52, 57, 60, 63])
def test_ignored_bits_are_ignored(lab, bit):
    changes = lab.ept()
    target(lab, 12, 7, 0x30 | 1 << bit)
    assert touch(lab, READ, changes).reason is R.VMCALL


def test_an_entry_that_is_not_present_may_hold_anything(lab):
    changes = lab.ept()
    target(lab, 12, 0, ~7 & (1 << 64) - 1)
    run = touch(lab, READ, changes)
    assert (run.reason, run.qualification) == (R.EPT_VIOLATION, READ | LINEAR | TRANSLATED)


# -- invalidation ----------------------------------------------------------------------------------


def test_less_is_seen_after_invept_and_more_without(lab):
    changes = lab.ept()
    where = target(lab, 12, 7)
    assert touch(lab, WRITE, changes).reason is R.VMCALL
    entry = lab.read_u64(where)
    lab.write_u64(where, entry & ~7)
    assert touch(lab, READ, changes).reason is R.EPT_VIOLATION
    lab.write_u64(where, entry & ~WRITE)
    assert lab.run(ACCESS[READ], changes, {"rbx": TARGET}).reason is R.VMCALL
    assert lab.run(ACCESS[WRITE], changes, {"rbx": TARGET}).reason is R.EPT_VIOLATION
    lab.write_u64(where, entry)
    assert lab.run(ACCESS[WRITE], changes, {"rbx": TARGET}).reason is R.VMCALL


@pytest.mark.parametrize("kind", [1, 2])
def test_another_page_is_seen_after_invept(lab, kind):
    changes = lab.ept()
    where = target(lab, 12, 7)
    lab.write(DATA + 0x128, b"first...")
    lab.write(DATA + 0x1128, b"second..")
    run = lab.run(ACCESS[READ], changes, {"rbx": TARGET})
    lab.l1.invept(2)
    run = lab.run(ACCESS[READ], changes, {"rbx": TARGET})
    assert run.registers["rax"].to_bytes(8, "little") == b"first..."
    lab.write_u64(where, lab.read_u64(where) + 0x1000)
    lab.l1.invept(kind, changes[F.EPT_POINTER])
    run = lab.run(ACCESS[READ], changes, {"rbx": TARGET})
    assert run.registers["rax"].to_bytes(8, "little") == b"second.."


def test_invept_of_another_context_keeps_this_one(lab):
    """Not required of a processor, but what makes the difference measurable."""
    changes = lab.ept()
    target(lab, 12, 7)
    assert touch(lab, READ, changes).reason is R.VMCALL
    lab.l1.invept(1, EPT2 | 0x1E)
    assert lab.run(ACCESS[READ], changes, {"rbx": TARGET}).reason is R.VMCALL


# -- L2's own paging structures --------------------------------------------------------------------

GVA = DATA + 0x1128
A, D = 0x20, 0x40


def paging_structure(lab, rights, flags, accessed_dirty):
    """L2's page tables, their last level alone in a page with `rights`; the entry's flags."""
    changes = lab.ept(12, accessed_dirty=accessed_dirty) | {F.GUEST_CR3: lab.pages()}
    for gva in range(lab.places.base, lab.places.base + WINDOW, 4096):
        where = lab.pte(gva)
        lab.write_u64(where, lab.read_u64(where) | A | D)
    for level in (PML4, PML4 + 0x1000, *range(PML4 + 0x2000, PML4 + 0x2100, 8)):
        lab.write_u64(level, lab.read_u64(level) | A)
    for index in range(8):
        where = PML4 + 0x2000 + 8 * index
        lab.write_u64(where, lab.read_u64(where) | A | D)
    table = lab.pte(GVA) & -4096
    lab.write_u64(lab.pte(GVA), GVA & -4096 | 7 | flags)
    lab.write(GVA, assemble("ret").bytes)
    entry = lab.read_u64(lab.nested_entry(table))
    lab.write_u64(lab.nested_entry(table), entry & ~7 | rights)
    lab.l1.invept(2)
    return changes


@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
@pytest.mark.parametrize("flags", [0, A, A | D])
@pytest.mark.parametrize("rights", [1, 5])
def test_a_read_only_paging_structure_serves_walks_that_set_no_flag(lab, rights, flags, access):
    changes = paging_structure(lab, rights, flags, False)
    run = touch(lab, access, changes, GVA)
    if flags & A and (access != WRITE or flags & D):
        assert (run.reason, run.vector) == (R.VMCALL, None)
        return
    assert run.reason is R.EPT_VIOLATION
    assert run.qualification == READ | WRITE | rights << 3 | LINEAR
    assert run[F.GUEST_PHYSICAL_ADDRESS] == lab.pte(GVA)
    assert run[F.GUEST_LINEAR_ADDRESS] == GVA


@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
@pytest.mark.parametrize("flags", [0, A, A | D])
def test_walks_are_writes_with_ept_accessed_and_dirty_flags(lab, flags, access):
    changes = paging_structure(lab, 1, flags, True)
    run = touch(lab, access, changes, GVA)
    assert run.reason is R.EPT_VIOLATION
    if run[F.GUEST_LINEAR_ADDRESS] == GVA:
        assert run[F.GUEST_PHYSICAL_ADDRESS] == lab.pte(GVA)
    assert run.qualification == READ | WRITE | READ << 3 | LINEAR


@pytest.mark.parametrize("accessed_dirty", [False, True])
@pytest.mark.parametrize("rights", [0, 4])
@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
def test_an_unreadable_paging_structure_serves_nothing(lab, access, rights, accessed_dirty):
    changes = paging_structure(lab, rights, A | D, accessed_dirty)
    run = touch(lab, access, changes, GVA)
    assert run.reason is R.EPT_VIOLATION
    kind = READ | WRITE if accessed_dirty else READ
    assert run.qualification == kind | rights << 3 | LINEAR
    assert run[F.GUEST_PHYSICAL_ADDRESS] & -4096 == lab.pte(GVA) & -4096


@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
@pytest.mark.parametrize("accessed_dirty", [False, True])
def test_a_paging_structure_need_not_be_executable(lab, accessed_dirty, access):
    changes = paging_structure(lab, 3, 0, accessed_dirty)
    run = touch(lab, access, changes, GVA)
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert lab.read_u64(lab.pte(GVA)) & (A | D) == (A | D if access == WRITE else A)


def test_a_misconfigured_paging_structure(lab):
    changes = paging_structure(lab, WRITE, A | D, False)
    run = touch(lab, READ, changes, GVA)
    assert run.reason is R.EPT_MISCONFIGURATION
    assert run[F.GUEST_PHYSICAL_ADDRESS] & -4096 == lab.pte(GVA) & -4096


def test_a_page_fault_of_l2_comes_before_the_violation_of_the_page(lab):
    changes = lab.ept() | {F.GUEST_CR3: lab.pages()}
    target(lab, 12, 0)
    lab.write_u64(lab.pte(GVA), GVA & -4096)
    run = touch(lab, READ, changes, GVA)
    assert run.vector == 14


# -- accessed and dirty flags ----------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
def test_ept_flags_are_set_as_the_access_needs(lab, shift, access):
    changes = lab.ept(accessed_dirty=True)
    where = target(lab, shift, 7)
    assert touch(lab, access, changes).reason is R.VMCALL
    assert lab.read_u64(where) >> 8 & 3 == (3 if access == WRITE else 1)
    if shift == 12:
        assert lab.read_u64(EPT + 0x1008) >> 8 & 1
        assert lab.read_u64(TABLE1 + (TARGET >> 21 & 511) * 8) >> 8 & 1
    assert lab.read_u64(EPT) >> 8 & 1


def test_a_page_that_was_read_becomes_dirty_when_it_is_written(lab):
    changes = lab.ept(accessed_dirty=True)
    where = target(lab, 12, 7)
    lab.l1.invept(2)
    lab.run("mov (%rbx), %rax; cpuid; mov %rax, (%rbx)", changes, {"rbx": TARGET})
    assert lab.read_u64(where) >> 8 & 3 == 1
    run = lab.resume({F.GUEST_RIP: CODE + 5}, {"rbx": TARGET})
    assert run.reason is R.VMCALL
    assert lab.read_u64(where) >> 8 & 3 == 3


def test_flags_stay_without_the_eptp_bit(lab):
    changes = lab.ept()
    where = target(lab, 12, 7)
    assert touch(lab, WRITE, changes).reason is R.VMCALL
    assert lab.read_u64(where) >> 8 & 3 == 0


# -- page-modification logging ---------------------------------------------------------------------


def pml(lab, index, shift=12):
    changes = lab.ept(accessed_dirty=True)
    where = target(lab, shift, 7)
    for at in (TARGET, STACK - 8, CODE):  # what L2 needs anyhow is dirty already
        entry = lab.nested_entry(at & 0x3FFF_FFFF, 2)
        lab.write_u64(entry, lab.read_u64(entry) | 0x300)
    entry = lab.nested_entry(0x180000, 2)
    lab.write_u64(entry, lab.read_u64(entry) | 0x300)
    lab.write(PML, bytes(4096))
    changes |= {F.PML_ADDRESS: PML, F.PML_INDEX: index}
    return lab.secondary(changes, enable_pml=1), where


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_page_that_becomes_dirty_is_logged(lab, shift):
    changes, _ = pml(lab, 511, shift)
    assert touch(lab, READ, changes, reads=[F.PML_INDEX])[F.PML_INDEX] == 511
    run = touch(lab, WRITE, changes, reads=[F.PML_INDEX])
    assert run.reason is R.VMCALL
    assert run[F.PML_INDEX] == 510
    assert lab.read_u64(PML + 8 * 511) == TARGET & -4096
    assert touch(lab, WRITE, changes, reads=[F.PML_INDEX])[F.PML_INDEX] == 511


def test_a_full_log_exits_before_the_access(lab):
    changes, where = pml(lab, 0xFFFF)
    run = touch(lab, WRITE, changes)
    assert run.reason is R.PAGE_MODIFICATION_LOG_FULL
    assert run.rip == CODE
    assert not lab.read_u64(where) >> 9 & 1
    run = lab.resume({F.PML_INDEX: 0}, run.registers, reads=[F.PML_INDEX])
    assert run.reason is R.VMCALL
    assert run[F.PML_INDEX] == 0xFFFF
    assert lab.read_u64(PML) == TARGET & -4096


# -- EPTP switching --------------------------------------------------------------------------------


def vm_functions(lab, functions=1):
    lab.fill(EPTP_LIST, 0x1000)
    changes = lab.secondary(lab.ept(), enable_vm_functions=1)
    return changes | {F.VM_FUNCTION_CONTROLS: functions, F.EPTP_LIST_ADDRESS: EPTP_LIST}


def test_vmfunc_switches_the_eptp_without_an_exit(lab):
    changes = vm_functions(lab)
    lab.ept(root=EPT2)
    lab.write_u64(EPT2 + 0x1008, 0xB7)
    target(lab, 30, 0)
    lab.write_u64(EPTP_LIST + 8 * 3, EPT2 | 0x1E)
    lab.l1.invept(2)
    source = "xor %eax, %eax; mov $3, %ecx; vmfunc; mov (%rbx), %rax"
    lab.write(DATA + 0x128, b"switched")
    run = lab.run(source, changes, {"rbx": TARGET}, reads=[F.EPT_POINTER])
    assert run.reason is R.VMCALL
    assert run.registers["rax"].to_bytes(8, "little") == b"switched"
    assert run[F.EPT_POINTER] == EPT2 | 0x1E


@pytest.mark.parametrize(
    ("function", "index", "eptp"),
    [(0, 512, EPT2 | 0x1E), (0, 3, EPT2 | 0x1F), (1, 3, EPT2 | 0x1E), (63, 3, EPT2 | 0x1E)],
)
def test_a_bad_vmfunc_exits(lab, function, index, eptp):
    changes = vm_functions(lab)
    lab.write_u64(EPTP_LIST + 8 * 3, eptp)
    run = lab.run("vmfunc", changes, {"rax": function, "rcx": index})
    assert (run.reason, run.length) == (R.VMFUNC, 3)


def test_a_number_above_63_is_no_vm_function(lab):
    assert lab.run("vmfunc", vm_functions(lab), {"rax": 64}).vector == 6


def test_vmfunc_exits_if_the_function_is_off_and_is_undefined_if_all_are(lab):
    assert lab.run("vmfunc", vm_functions(lab, 0)).reason is R.VMFUNC
    assert lab.run("vmfunc").vector == 6


# -- delivery --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vector", "length"),
    [(0, 0x30, 0), (2, 2, 0), (3, 6, 0), (3, 13, 0), (4, 0x30, 2), (6, 3, 1)],
)
@pytest.mark.parametrize("where", ["idt", "stack"])
def test_a_violation_in_delivery_tells_the_event(lab, kind, vector, length, where):
    """IDT-vectoring information; injected again as it is, the event arrives."""
    changes = lab.ept(12)
    page = IDT if where == "idt" else STACK - 8
    entry = lab.read_u64(lab.nested_entry(page))
    lab.write_u64(lab.nested_entry(page), entry & ~7)
    information = event(vector, kind, error_code=vector == 13)
    changes |= {
        F.ENTRY_INTERRUPTION_INFORMATION: information,
        F.ENTRY_EXCEPTION_ERROR_CODE: 0x18,
        F.ENTRY_INSTRUCTION_LENGTH: length,
        F.GUEST_RFLAGS: 0x202,
    }
    lab.l1.invept(2)
    run = lab.run("nop; nop", changes)
    assert run.reason is R.EPT_VIOLATION
    assert run[F.IDT_VECTORING_INFORMATION] == information
    assert run.rip == CODE
    if vector == 13:
        assert run[F.IDT_VECTORING_ERROR_CODE] == 0x18
    if kind in (4, 6):
        assert run.length == length
    assert run[F.GUEST_PHYSICAL_ADDRESS] & -4096 == page & -4096
    assert run[F.GUEST_LINEAR_ADDRESS] & -4096 == page & -4096
    lab.write_u64(lab.nested_entry(page), entry)
    again = {
        F.ENTRY_INTERRUPTION_INFORMATION: run[F.IDT_VECTORING_INFORMATION],
        F.ENTRY_EXCEPTION_ERROR_CODE: run[F.IDT_VECTORING_ERROR_CODE],
        F.ENTRY_INSTRUCTION_LENGTH: run.length,
    }
    run = lab.resume(again)
    assert run.vector == vector
    frame = run[F.GUEST_RSP] + (8 if vector == 13 else 0)
    assert lab.read_u64(frame) == CODE + length
    assert run[F.IDT_VECTORING_INFORMATION] & VALID == 0


@pytest.mark.parametrize(
    ("source", "vector", "kind", "length"),
    [("ud2", 6, 3, 0), ("int3", 3, 6, 1), ("int $0x40", 0x40, 4, 2), ("mov (%rbx), %al", 14, 3, 0)],
)
def test_an_exception_of_l2s_own_that_meets_a_violation_is_told(lab, source, vector, kind, length):
    changes = lab.ept(12)
    entry = lab.read_u64(lab.nested_entry(IDT))
    lab.write_u64(lab.nested_entry(IDT), entry & ~7)
    lab.l1.invept(2)
    run = lab.run(source, changes, {"rbx": 1 << 40})
    lab.write_u64(lab.nested_entry(IDT), entry)
    assert run.reason is R.EPT_VIOLATION
    information = run[F.IDT_VECTORING_INFORMATION]
    assert information == event(vector, kind, error_code=vector == 14)
    assert run.rip == CODE
    if length:
        assert run.length == length


# -- what else is behind EPT -----------------------------------------------------------------------


def test_device_memory_can_be_mapped_into_l2(lab):
    """L1's local APIC through an identity page: L0 answers."""
    changes = lab.ept()
    run = lab.run("mov $0xfee00030, %ebx; mov (%rbx), %eax", changes)
    assert run.reason is R.VMCALL
    assert run.registers["rax"] & 0xFF in range(0x10, 0x20)


def test_string_output_may_read_device_memory(lab):
    run = lab.run("mov $0xfee00030, %esi; mov $0x80, %edx; outsb", lab.ept())
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert run.registers["rsi"] == 0xFEE00031


def test_a_segment_register_from_device_memory_ends_the_run_in_words():
    lab = Lab()
    with pytest.raises(AssertionError, match="on device memory is not emulated"):
        lab.run("mov $0xfee00030, %esi; mov (%rsi), %fs", lab.ept())


def test_a_page_outside_ram_reads_as_ones(lab):
    changes = lab.ept()
    target(lab, 12, 7, base=0x1_0000_0000)
    run = touch(lab, READ, changes)
    assert run.reason is R.VMCALL
    assert run.registers["rax"] == (1 << 64) - 1


def test_cr3_may_point_where_ept_does_not(lab):
    changes = lab.ept()
    lab.write_u64(EPT + 0x1000 + 8 * 3, 0)
    changes[F.GUEST_CR3] = 0xC000_0000
    lab.l1.invept(2)
    run = lab.run("nop", changes)
    assert run.reason is R.EPT_VIOLATION
    assert run.qualification == READ | LINEAR
    assert run[F.GUEST_PHYSICAL_ADDRESS] & -4096 == 0xC000_0000
    assert run[F.GUEST_LINEAR_ADDRESS] == CODE
