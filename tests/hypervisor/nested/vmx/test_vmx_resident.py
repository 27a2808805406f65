"""Guest state that stays in the processor between an exit and the next entry is the VMCS's."""

from vmx_lab import CODE, DATA, EPT2, PML4, VMCS, VMCS2

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.places import CS32, DS

TO_32 = f"push ${CS32}; push $1f; lretq; .code32; 1: cpuid; inc %edx; cpuid; .code64"


def test_rules_see_the_mode_that_l2_has_changed_to(lab):
    """RIP beyond 4 GiB is good in 64-bit mode, not in the 32-bit code segment that L2 loaded."""
    run = lab.run(TO_32)
    assert run.reason is R.CPUID
    failed = lab.resume({F.GUEST_RIP: 1 << 33})
    assert failed.failed_entry
    assert failed[F.EXIT_REASON] & 0xFFFF == R.ENTRY_FAILURE_INVALID_GUEST_STATE
    again = lab.resume({F.GUEST_RIP: run.rip + 2}, {"rdx": 5})
    assert (again.reason, again.registers["rdx"]) == (R.CPUID, 6)
    assert again[F.GUEST_CS_SELECTOR] == CS32


def test_state_survives_a_resume_that_fails(lab):
    run = lab.run(f"mov ${DS}, %eax; mov %eax, %fs; cpuid; mov %fs, %ebx; cpuid")
    assert lab.resume({F.GUEST_RFLAGS: 0}).failed_entry
    assert lab.resume({F.HOST_CS_SELECTOR: 0, F.GUEST_RFLAGS: 2}).result.error == 8
    host = {F.HOST_CS_SELECTOR: lab.fields[F.HOST_CS_SELECTOR]}
    run = lab.resume(host | {F.GUEST_RIP: run.rip + 2})
    assert (run.reason, run.registers["rbx"]) == (R.CPUID, DS)


def test_a_field_read_before_and_after_a_change_by_l2(lab):
    lab.pages()
    run = lab.run("cpuid; mov $PML4, %eax; mov %rax, %cr3; cpuid")
    assert run[F.GUEST_CR3] == lab.facts.l1.cr3
    run = lab.skip(run)
    assert run[F.GUEST_CR3] == PML4


def test_a_partial_write_of_a_segment_keeps_the_rest_of_it(lab):
    run = lab.run(f"mov ${DS}, %eax; mov %eax, %gs; cpuid; mov %gs:0x10, %rbx; cpuid")
    lab.write(DATA + 0x10, b"based...")
    run = lab.skip(run, {F.GUEST_GS_BASE: DATA}, reads=[F.GUEST_GS_SELECTOR])
    assert run.registers["rbx"].to_bytes(8, "little") == b"based..."
    assert run[F.GUEST_GS_SELECTOR] == DS


def test_controls_changed_between_two_entries_take_effect(lab):
    run = lab.run("hlt; rdtsc; rdtsc; cpuid", lab.primary(rdtsc_exiting=0))
    assert run.reason is R.HLT
    run = lab.skip(run)
    assert run.reason is R.CPUID
    rip = {F.GUEST_RIP: CODE + 1}
    run = lab.resume(lab.primary(rdtsc_exiting=1) | rip)
    assert (run.reason, run.rip) == (R.RDTSC, CODE + 1)
    run = lab.resume(lab.primary(rdtsc_exiting=0))
    assert run.reason is R.CPUID


def test_the_exception_bitmap_may_change_between_two_entries(lab):
    run = lab.run("cpuid; ud2")
    assert lab.skip(run, {F.EXCEPTION_BITMAP: 1 << 6}).intercepted == 6
    assert lab.resume({F.EXCEPTION_BITMAP: 0}).vector == 6


def test_two_l2s_in_turn_keep_their_state_and_their_tables_apart(lab):
    """Two VMCSs, each with its own EPT, registers in memory only: ten rounds."""
    first = lab.ept()
    second = lab.ept(root=EPT2)
    lab.write_u32(VMCS2, int(lab.vcpu.model.vmx.basic.revision))
    lab.code("1: inc %rax; mov %rax, (%rbx); cpuid; jmp 1b")
    fields = {VMCS: lab.fields | first, VMCS2: lab.fields | second}
    for vmcs in (VMCS, VMCS2):
        with lab.batch() as batch:
            batch.vmclear(vmcs)
            batch.vmptrld(vmcs)
            writes = batch.vmwrites(fields[vmcs], lab.places.scratch)
        assert writes.value[0] == len(fields[vmcs])
    values = {VMCS: 100, VMCS2: 200}
    for turn in range(10):
        for index, vmcs in enumerate((VMCS, VMCS2)):
            registers = {"rax": values[vmcs], "rbx": DATA + 8 * index}
            with lab.batch() as batch:
                batch.vmptrld(vmcs)
                run = batch.vmx_run(registers, resume=turn > 0)
                rip, reason = batch.vmread(F.GUEST_RIP), batch.vmread(F.EXIT_REASON)
            assert run.value.result.succeeded
            assert reason.value.value == R.CPUID
            values[vmcs] += 1
            assert lab.read_u64(DATA + 8 * index) == values[vmcs]
            lab.l1.vmwrite(F.GUEST_RIP, rip.value.value + 2)
    lab.l1.vmclear(VMCS2)
    lab.l1.vmptrld(VMCS)


def test_a_vmcs_that_was_cleared_in_between_keeps_its_guest_state(lab):
    run = lab.run(f"mov ${DS}, %eax; mov %eax, %es; cpuid; mov %es, %ebx; cpuid", {
        F.GUEST_ES_SELECTOR: 0, F.GUEST_ES_ACCESS_RIGHTS: 1 << 16})  # fmt: skip
    with lab.batch() as batch:
        batch.vmclear(VMCS)
        batch.vmptrld(VMCS)
        batch.vmwrite(F.GUEST_RIP, run.rip + run.length)
        run = lab.plan_entry(batch, run.registers, resume=False)
    assert (run.reason, run.registers["rbx"]) == (R.CPUID, DS)


def test_l1_may_change_its_own_registers_while_l2_rests(lab):
    """CR2, debug registers and MSRs that no transition switches are one set for both."""
    run = lab.run("cpuid; mov %cr2, %rax; mov %db1, %rbx; cpuid")
    lab.l1.write_cr(2, 0xABC000)
    lab.l1.write_dr(1, 0x5678)
    run = lab.skip(run)
    assert (run.registers["rax"], run.registers["rbx"]) == (0xABC000, 0x5678)


def test_fpu_state_is_shared(lab):
    run = lab.run("mov $0x1234, %eax; movd %eax, %xmm3; cpuid")
    assert run.reason is R.CPUID
    found = lab.call("movd %xmm3, %eax", {}, ["rax"]).value["rax"]
    assert found == 0x1234
