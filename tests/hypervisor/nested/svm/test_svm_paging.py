"""Nested paging: what L1's tables refuse is L1's, with the right information; the rest works."""

import pytest
from svm_world import DATA, L2_CODE, LAPIC, NPD, NPDPT, NPML4, NPT, PML4, World

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import Entry
from undervisor.hypervisor.nested.svm.paging import Shadow

FINAL, TABLES = 1 << 32, 1 << 33
P, W, U, RSV, ID = 1, 2, 4, 8, 16
READ, WRITE, FETCH = (
    "at: mov DATA + 8, %rax",
    "at: mov %rax, DATA + 8",
    "jmp DATA + 8",
)


@pytest.mark.parametrize("shift", [12, 21, 30])
def test_l2_runs_under_pages_of_every_size(shift):
    world = World(
        "mov $0x1234, %eax; mov %rax, DATA; mov DATA, %rbx; mov %rbx, DATA + 8", nested=shift
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.data(1) == 0x1234


@pytest.mark.parametrize(
    ("access", "clear", "put", "info"),
    [
        (READ, Entry.p, 0, U),
        (WRITE, Entry.p, 0, W | U),
        (FETCH, Entry.p, 0, U | ID),
        (WRITE, Entry.rw, 0, P | W | U),
        (READ, Entry.us, 0, P | U),
        (WRITE, Entry.us, 0, P | W | U),
        (FETCH, 0, Entry.xd, P | U | ID),
        (READ, 0, 1 << 45, P | U | RSV),
        (WRITE, 0, 1 << 45, P | W | U | RSV),
    ],
)
def test_a_refused_access_is_an_exit_with_its_address(access, clear, put, info):
    world = World(access, nested=12)
    world.change_npte(DATA, clear=int(clear), put=int(put))
    world.run()
    vmcb = world.vmcb
    assert vmcb.exitcode == ExitCode.NPF
    assert vmcb.exitinfo1 == info | FINAL
    assert vmcb.exitinfo2 == DATA + 8
    if "at" in world.l2.labels:
        assert vmcb.rip == world.l2.labels["at"]
        fetched = bytes(vmcb.b[0xD1 : 0xD1 + vmcb.fetched_bytes])
        assert fetched.startswith(world.l2.bytes[:8])
    else:
        assert vmcb.rip == DATA + 8
        assert vmcb.fetched_bytes == 0
    assert vmcb.nrip == 0


def test_a_page_that_may_not_be_written_is_still_read_and_fetched():
    world = World("mov DATA, %rax; mov $DATA + 64, %ebx; call *%rbx", nested=12)
    world.memory.write(DATA + 64, b"\xc3")
    world.change_npte(DATA, clear=int(Entry.rw))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL


def test_no_execute_in_l1s_tables_does_not_depend_on_l2s_nxe():
    world = World(FETCH, nested=12)
    world.vmcb.efer &= ~0x800
    world.change_npte(DATA, put=int(Entry.xd))
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == FINAL | P | U | ID


@pytest.mark.parametrize(("clear", "info"), [(Entry.p, W | U), (Entry.rw, P | W | U)])
def test_walking_l2s_tables_is_a_write_and_told_apart(clear, info):
    world = World("nop", nested=12)
    world.change_npte(PML4, clear=int(clear))
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == TABLES | info
    assert world.vmcb.exitinfo2 == PML4
    assert world.vmcb.rip == L2_CODE


def test_a_walk_for_data_is_told_apart_as_well():
    own_pml4, pdpt, far = 0x500000, 0x501000, 0x8000000000
    world = World(f"mov ${far:#x}, %rbx; at: mov (%rbx), %eax", nested=12)
    world.memory.write(own_pml4, world.memory.read(PML4, 8) + (pdpt | 7).to_bytes(8, "little"))
    world.vmcb.cr3 = own_pml4
    world.change_npte(pdpt, clear=int(Entry.p))
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == TABLES | W | U
    assert world.vmcb.exitinfo2 == pdpt
    assert world.vmcb.rip == world.l2.labels["at"]


@pytest.mark.parametrize("table", [NPML4, NPDPT])
def test_a_reserved_bit_in_an_upper_table_faults_in_the_walk_of_l2s_tables(table):
    world = World("nop", nested=12)
    world.memory.set_u64(
        table, world.memory.u64(table) | 1 << 8 | (1 << 45 if table == NPDPT else 0)
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == TABLES | P | W | U | RSV


def test_l1_repairs_its_table_and_l2_goes_on_without_a_flush():
    l1 = """
        mov $VMCB12, %rax
    1:  vmrun %rax
        cmpq $0x400, VMCB12 + 0x70
        jne 2f
        incl SEEN
        orq $1, where
        jmp 1b
    2:  out %eax, $0xf4
    """
    world = World(READ, nested=12, l1=l1.replace("where", f"{NPT + (DATA >> 21) * 0x1000:#x}"))
    world.change_npte(DATA, clear=int(Entry.p))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.seen(0) == 1


FLUSHES = {
    "all": ("movb $1, VMCB12 + 0x5c", ""),
    "by ASID": ("movb $3, VMCB12 + 0x5c", ""),
    "a new ASID": ("movl $2, VMCB12 + 0x58", ""),
    "INVLPGA": ("", "mov $DATA, %eax; mov $1, %ecx; invlpga %rax, %ecx"),
}


@pytest.mark.parametrize("name", FLUSHES)
@pytest.mark.parametrize("tables", [1, 8])
def test_a_flush_makes_a_new_table_entry_hold(name, tables):
    before, instruction = FLUSHES[name]
    touch = "".join(f"mov {0x200000 * table:#x}, %eax;" for table in range(1, tables))
    entry = NPT + (DATA >> 21) * 0x1000
    l1 = f"""
        mov $VMCB12, %rax
        vmrun %rax
        addq $3, VMCB12 + 0x578
        andq $~2, {entry:#x}
        {before}
        {instruction}
        mov $VMCB12, %rax
        vmrun %rax
        out %eax, $0xf4
    """
    world = World(f"{touch} mov %eax, DATA; vmmcall; at: mov %eax, DATA", nested=12, l1=l1)
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == FINAL | P | W | U
    assert world.vmcb.rip == world.l2.labels["at"]


def test_l2_sees_pages_where_l1_puts_them():
    world = World("mov DATA, %rax; mov %rax, DATA + 0x1008", nested=12)
    world.memory.set_u64(world.npte(DATA), 0x600000 | 0x67)
    world.memory.set_u64(0x600000, 0xABCDEF)
    world.run()
    assert world.data(0) == 0
    assert world.memory.u64(DATA + 0x1008) == 0xABCDEF


def test_accessed_and_dirty_are_set_in_l1s_tables_as_they_are_used():
    world = World("mov DATA, %rax; mov %rax, DATA + 0x1000; vmmcall", nested=12)
    for page in (DATA, DATA + 0x1000, DATA + 0x2000):
        world.change_npte(page, clear=int(Entry.a | Entry.d))
    world.run()
    flags = [world.memory.u64(world.npte(DATA + n * 0x1000)) & 0x60 for n in range(3)]
    assert flags == [0x20, 0x60, 0]


def test_a_clean_page_becomes_dirty_at_the_first_write_after_a_read():
    world = World("mov DATA, %rax; mov %rax, DATA", nested=12)
    world.change_npte(DATA, clear=int(Entry.d))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.memory.u64(world.npte(DATA)) & Entry.d


def test_without_nested_paging_l2_uses_l1s_physical_addresses():
    world = World("mov DATA, %rax; mov %rax, DATA + 8; invlpg DATA", nested=0)
    world.memory.set_u64(DATA, 0x77)
    world.memory.set_u64(NPML4, 0)
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.data(1) == 0x77


def test_a_shadow_pager_sees_page_faults_and_invlpg():
    world = World(
        "mov $0x8000000000, %rbx; at: mov (%rbx), %eax", nested=0, wants=[Intercept.EXCP_PF]
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_PF
    assert world.vmcb.exitinfo2 == 0x8000000000
    assert world.vmcb.rip == world.l2.labels["at"]


def test_l2_uses_the_local_apic_that_l1_passes_through():
    world = World(
        f"mov ${LAPIC:#x}, %edi; mov 0x30(%rdi), %ebx; mov %rbx, DATA; movl $0x1ff, 0xf0(%rdi)",
        nested=12,
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.data() & 0xFF >= 0x10
    assert world.vcpu.lapic.pending() is None


def test_l1_traps_l2s_write_to_the_local_apic():
    world = World(
        f"mov ${LAPIC:#x}, %edi; mov 0x80(%rdi), %ebx; at: mov %ebx, 0x80(%rdi)", nested=12
    )
    where = 0x700000
    world.memory.set_u64(NPDPT + 8 * 3, where | 7)
    world.memory.set_u64(where + 8 * (LAPIC >> 21 & 511), (where + 0x1000) | 7)
    world.memory.set_u64(where + 0x1000 + 8 * (LAPIC >> 12 & 511), LAPIC | 0x65)
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo1 == FINAL | P | W | U
    assert world.vmcb.exitinfo2 == LAPIC + 0x80
    assert world.vmcb.rip == world.l2.labels["at"]


def test_frames_of_l0_cannot_be_named():
    world = World("mov DATA, %rax", nested=12)
    private = world.vcpu.vmcb01.hpa
    before = bytes(world.vcpu.vmcb01.b[0x400:0x440])
    world.memory.set_u64(world.npte(DATA), private | 0x67)
    world.machine.run(1)
    assert bytes(world.vcpu.vmcb01.b[0x400:0x440]) == before
    assert world.data(0) == 0


def test_running_out_of_frames_starts_the_shadows_anew(monkeypatch):
    touch = "".join(f"mov {page:#x}, %eax;" for page in range(0x200000, 0xE00000, 0x200000))
    world = World(touch, nested=12)
    allocate, calls = world.memory.frames.allocate, []

    def scarce():
        calls.append(1)
        if len(calls) == 8:
            raise MemoryError
        return allocate()

    monkeypatch.setattr(world.memory.frames, "allocate", scarce)
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert len(calls) > 8


def test_a_shadow_knows_whether_l1s_tables_have_changed():
    world = World("nop", nested=12)
    world.run()
    shadow = world.vcpu.nested.shadows.current
    assert isinstance(shadow, Shadow)
    assert shadow.is_current()
    world.change_npte(0x900000, clear=1)
    table = NPT + (0x900000 >> 21) * 0x1000
    assert shadow.is_current() is (table not in shadow.seen)
    world.memory.set_u64(NPD + 8, 0)
    assert not shadow.is_current()


def test_the_pat_of_l2_is_its_own():
    pat = int(Msr.PAT)
    world = World(f"mov ${pat:#x}, %ecx; rdmsr; mov %eax, DATA; mov $6, %eax; wrmsr", nested=12)
    world.vmcb.g_pat = 0x0007040600010406
    world.run()
    assert world.data() & 0xFFFFFFFF == 0x00010406
    assert world.vmcb.g_pat == 0x0007040600000006
    assert world.vcpu.msrs[Msr.PAT] == 0x0007040600070406


def test_an_event_whose_delivery_needs_a_page_is_in_exitintinfo():
    world = World("mov $DATA + 0x800, %esp; at: int $0x80; back: nop", nested=12)
    world.change_npte(DATA, clear=int(Entry.p))
    world.run()
    assert world.vmcb.exitcode == ExitCode.NPF
    assert world.vmcb.exitinfo2 & -4096 == DATA
    assert world.vmcb.exitintinfo & 0x800007FF == 0x80000480
    assert world.vmcb.rip == world.l2.labels["at"]
