"""The VMX instructions in L1: faults, VMfailInvalid, VMfailValid with its number, VMsucceed."""

import pytest
from vmx_lab import CODE, DATA, GDT, VMCS, VMCS2, VMXON, Lab

from undervisor.arch.vmx.errors import VmInstructionError as E
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import FieldArea, FieldWidth
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.places import CS32
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.probe.answers import VmxOutcome

NONE = (1 << 64) - 1
INVALID, VALID, GOOD = VmxOutcome.FAIL_INVALID, VmxOutcome.FAIL_VALID, VmxOutcome.SUCCEED
ALL = [
    "vmxoff",
    "vmclear (%rbx)",
    "vmptrld (%rbx)",
    "vmptrst (%rbx)",
    "vmread %rax, %rcx",
    "vmwrite %rax, %rcx",
    "vmlaunch",
    "vmresume",
    "vmcall",
    "invept (%rbx), %rax",
    "invvpid (%rbx), %rax",
]


def revision(lab):
    return int(lab.vcpu.model.vmx.basic.revision)


def outcome(lab, name, *arguments):
    """`(outcome, error)` of one operation of the probe."""
    answer = getattr(lab.l1, name)(*arguments)
    return answer.value.outcome, answer.value.error


def allow_vmxon(lab):
    """Everything that VMXON needs."""
    lab.write_u32(VMXON, revision(lab))
    cr0, cr4 = (lab.l1.read_cr(number).value for number in (0, 4))
    with lab.batch() as batch:
        batch.wrmsr(0x3A, 5)
        batch.write_cr(0, cr0 | 0x20)
        batch.write_cr(4, cr4 | 1 << 13)


@pytest.fixture
def fresh():
    """An L1 whose VMX operation the test may end."""
    return Lab()


@pytest.fixture
def off():
    return Lab(vmx=False)


@pytest.fixture(autouse=True)
def _current(request):
    """The shared lab's VMCS is current, clear and the only one."""
    if "lab" in request.fixturenames:
        lab = request.getfixturevalue("lab")
        with lab.batch() as batch:
            batch.vmclear(VMCS2)
            batch.vmclear(VMCS)
            batch.vmptrld(VMCS)


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ALL)
def test_an_instruction_is_undefined_outside_vmx_operation(off, source):
    assert off.call(source, {"rbx": DATA}).fault.vector == 6


def test_vmxon_is_undefined_without_cr4_vmxe(off):
    assert off.call("vmxon (%rbx)", {"rbx": DATA}).fault.vector == 6


def test_vmfunc_is_undefined_in_l1(lab):
    assert lab.call("vmfunc").fault.vector == 6


@pytest.mark.parametrize("source", ["vmxon (%rbx)", *ALL])
def test_an_instruction_faults_in_compatibility_mode(lab, source):
    """#UD in a 32-bit code segment of IA-32e mode."""
    source = source.replace("%r", "%e")
    code = f"lgdt (%rsi); push ${CS32:#x}; lea 1f(%rip), %rax; push %rax; lretq; .code32; 1: "
    lab.write_u64(DATA + 64, 0x4F | GDT << 16)
    lab.write_u64(DATA + 72, 0)
    answer = lab.call(f"{code} {source}; .code64", {"rbx": DATA, "rsi": DATA + 64})
    assert answer.fault.vector == 6


@pytest.mark.parametrize(
    "source", ["vmxon", "vmclear", "vmptrld", "vmptrst", "vmread %rax,", "vmwrite"]
)
def test_a_memory_operand_may_fault(lab, source):
    operand = "(%rbx)" if "write" not in source else "(%rbx), %rax"
    non_canonical = lab.call(f"{source} {operand}", {"rbx": 1 << 55, "rax": 0x4000})
    if source == "vmxon":  # VMXON in VMX operation fails before it looks at its operand
        assert non_canonical.fault is None
        return
    assert non_canonical.fault.vector == 13
    absent = lab.call(f"{source} {operand}", {"rbx": 1 << 40, "rax": 0x4000}).fault
    assert (absent.vector, absent.cr2) == (14, 1 << 40)
    assert absent.error_code == (2 if source in ("vmptrst", "vmread %rax,") else 0)


def test_a_stack_operand_that_is_not_canonical_is_a_stack_fault(lab):
    assert lab.call("vmptrld (%rbp)", {"rbp": 1 << 55}).fault.vector == 12


@pytest.mark.parametrize("source", ["invept", "invvpid"])
def test_the_descriptor_of_an_invalidation_may_fault(lab, source):
    fault = lab.call(f"{source} (%rbx), %rax", {"rbx": 1 << 40, "rax": 1}).fault
    assert (fault.vector, fault.cr2) == (14, 1 << 40)
    fault = lab.call(f"{source} (%rbx), %rax", {"rbx": 1 << 55, "rax": 1}).fault
    assert fault.vector == 13


# -- VMXON and VMXOFF ------------------------------------------------------------------------------


def test_vmxon_needs_the_feature_control_to_be_locked_and_on(off):
    off.l1.write_cr(4, off.l1.read_cr(4).value | 1 << 13)
    off.write_u32(VMXON, revision(off))
    if not off.l1.rdmsr(0x3A).value & 1:
        assert off.l1.vmxon(VMXON).fault.vector == 13
        off.l1.wrmsr(0x3A, 5)
    assert off.l1.vmxon(VMXON).value.succeeded


@pytest.mark.parametrize("bit", [5, 31])
def test_vmxon_needs_the_fixed_bits_of_cr0(off, bit):
    """NE; PG cannot be tried in 64-bit mode, so that only its place in the MSR is looked at."""
    if bit == 31:
        assert off.vcpu.model.vmx.cr0_fixed0 >> 31 & 1
        return
    allow_vmxon(off)
    off.l1.write_cr(0, off.l1.read_cr(0).value & ~(1 << bit))
    assert off.l1.vmxon(VMXON).fault.vector == 13


@pytest.mark.parametrize("region", [VMXON + 8, VMXON | 1 << 50, 1 << 63])
def test_vmxon_refuses_a_bad_address(off, region):
    allow_vmxon(off)
    assert outcome(off, "vmxon", region) == (INVALID, 0)


@pytest.mark.parametrize("change", [1, 1 << 31])
def test_vmxon_refuses_another_revision(off, change):
    allow_vmxon(off)
    off.write_u32(VMXON, revision(off) ^ change)
    assert outcome(off, "vmxon", VMXON) == (INVALID, 0)


def test_vmxon_fails_in_vmx_operation(lab):
    assert outcome(lab, "vmxon", VMXON) == (VALID, E.VMXON_IN_VMX_ROOT_OPERATION)
    lab.l1.vmclear(VMCS)
    assert outcome(lab, "vmxon", VMXON) == (INVALID, 0)


def test_vmxe_cannot_be_cleared_in_vmx_operation(lab):
    cr4 = lab.l1.read_cr(4).value
    assert lab.l1.write_cr(4, cr4 & ~(1 << 13)).fault.vector == 13


def test_ne_cannot_be_cleared_in_vmx_operation(lab):
    cr0 = lab.l1.read_cr(0).value
    assert lab.l1.write_cr(0, cr0 & ~0x20).fault.vector == 13


def test_vmx_operation_can_be_left_and_entered_again(fresh):
    assert fresh.run("cpuid").reason is R.CPUID
    assert outcome(fresh, "vmxoff") == (GOOD, 0)
    assert fresh.l1.vmptrst().fault.vector == 6
    assert outcome(fresh, "vmxon", VMXON) == (GOOD, 0)
    assert fresh.l1.vmptrst().value.value == NONE
    assert fresh.run("cpuid").reason is R.CPUID


# -- VMCLEAR, VMPTRLD, VMPTRST ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("vmclear", (E.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS, E.VMCLEAR_WITH_VMXON_POINTER)),
        ("vmptrld", (E.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS, E.VMPTRLD_WITH_VMXON_POINTER)),
    ],
)
def test_a_bad_pointer_is_refused(lab, name, errors):
    assert outcome(lab, name, VMCS2 + 1) == (VALID, errors[0])
    assert outcome(lab, name, VMCS2 | 1 << 60) == (VALID, errors[0])
    assert outcome(lab, name, VMXON) == (VALID, errors[1])
    assert lab.l1.vmptrst().value.value == VMCS


def test_vmptrld_refuses_another_revision(lab):
    lab.write_u32(VMCS2, revision(lab) ^ 1)
    assert outcome(lab, "vmptrld", VMCS2) == (VALID, E.VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER)
    assert lab.l1.vmptrst().value.value == VMCS


def test_vmclear_of_the_current_vmcs_leaves_none(lab):
    assert outcome(lab, "vmclear", VMCS) == (GOOD, 0)
    assert lab.l1.vmptrst().value.value == NONE
    for operation in (("vmread", F.GUEST_RIP), ("vmwrite", F.GUEST_RIP, 0), ("vmlaunch",)):
        assert outcome(lab, *operation) == (INVALID, 0)


def test_vmclear_of_another_vmcs_keeps_the_current_one(lab):
    assert outcome(lab, "vmclear", VMCS2) == (GOOD, 0)
    assert lab.l1.vmptrst().value.value == VMCS


def test_two_vmcss_keep_their_data_apart(lab):
    lab.write_u32(VMCS2, revision(lab))
    lab.l1.vmwrite(F.GUEST_RIP, 0x1111)
    lab.l1.vmclear(VMCS2)
    lab.l1.vmptrld(VMCS2)
    lab.l1.vmwrite(F.GUEST_RIP, 0x2222)
    lab.l1.vmptrld(VMCS)
    assert lab.l1.vmread(F.GUEST_RIP).value.value == 0x1111
    lab.l1.vmptrld(VMCS2)
    assert lab.l1.vmread(F.GUEST_RIP).value.value == 0x2222


def test_vmptrld_of_the_current_vmcs_changes_nothing(lab):
    lab.run("cpuid")
    before = lab.l1.vmread(F.GUEST_CS_BASE).value
    lab.l1.vmptrld(VMCS)
    assert lab.l1.vmread(F.GUEST_CS_BASE).value == before
    assert lab.resume({F.GUEST_RIP: CODE}).reason is R.CPUID


def test_an_l2_can_be_left_for_another_and_come_back(lab):
    """Guest state that was not written back yet survives a change of the current VMCS."""
    lab.write_u32(VMCS2, revision(lab))
    run = lab.run("mov $0x10, %ecx; mov %ecx, %fs; cpuid; mov %fs, %edx")
    lab.l1.vmptrld(VMCS2)
    lab.l1.vmwrite(F.GUEST_FS_SELECTOR, 0)
    lab.l1.vmptrld(VMCS)
    run = lab.skip(run)
    assert run.registers["rdx"] == 0x10
    assert lab.l1.vmread(F.GUEST_FS_SELECTOR).value.value == 0x10


# -- VMREAD and VMWRITE ----------------------------------------------------------------------------


def test_every_field_of_the_model_can_be_written_and_read(lab):
    for field in sorted(lab.vcpu.model.vmcs_fields):
        width = {FieldWidth.BITS_16: 16, FieldWidth.BITS_32: 32}.get(field.width, 64)
        value = 0x5A5A_1234_8765_4321 & (1 << width) - 1
        with lab.batch() as batch:
            write = batch.vmwrite(field, 0x5A5A_1234_8765_4321)
            read = batch.vmread(field)
        assert write.value.succeeded, field.name
        assert read.value.value == value, field.name


def test_the_high_half_of_a_64_bit_field_can_be_reached(lab):
    field = F.TSC_OFFSET
    lab.l1.vmwrite(field, 0x1111_2222_3333_4444)
    lab.l1.vmwrite(field + 1, 0xAAAA_BBBB)
    assert lab.l1.vmread(field).value.value == 0xAAAA_BBBB_3333_4444
    assert lab.l1.vmread(field + 1).value.value == 0xAAAA_BBBB


def test_an_absent_field_is_refused(lab):
    absent = [f for f in F if f not in lab.vcpu.model.vmcs_fields]
    assert absent
    for field in [*absent, 0x6FFE, 0x4001 | 1, 1 << 32 | F.GUEST_RIP, F.GUEST_RIP + 1]:
        error = (VALID, E.ACCESS_TO_UNSUPPORTED_COMPONENT)
        assert outcome(lab, "vmread", field) == error, hex(field)
        assert outcome(lab, "vmwrite", field, 0) == error, hex(field)


def test_read_only_fields_stay_so_without_the_feature():
    lab = Lab("intel-westmere")
    assert not lab.vcpu.model.vmx.misc.vmwrite_any_field
    for field in F:
        if field.area is FieldArea.READ_ONLY and field in lab.vcpu.model.vmcs_fields:
            assert outcome(lab, "vmwrite", field, 0) == (VALID, E.VMWRITE_TO_READ_ONLY_COMPONENT)


def test_vmread_to_memory_writes_eight_bytes(lab):
    lab.write(DATA, b"\xff" * 24)
    lab.l1.vmwrite(F.GUEST_RIP, 0x1234)
    lab.call("vmread %rax, 8(%rbx)", {"rax": F.GUEST_RIP, "rbx": DATA})
    assert lab.read(DATA, 24) == b"\xff" * 8 + (0x1234).to_bytes(8, "little") + b"\xff" * 8


def test_vmwrite_takes_memory(lab):
    lab.write_u64(DATA, 0x77665544)
    lab.call("vmwrite (%rbx), %rax", {"rax": F.GUEST_RIP, "rbx": DATA})
    assert lab.l1.vmread(F.GUEST_RIP).value.value == 0x77665544


def test_the_error_number_stays_after_success(lab):
    outcome(lab, "vmread", 0x6FFE)
    assert lab.l1.vmread(F.VM_INSTRUCTION_ERROR).value.value == 12


def test_flags_after_success_and_failure(lab):
    every = 0x8D5
    answer = lab.call("vmread %rcx, %rax", {"rcx": F.GUEST_RIP, "rflags": 2 | every})
    assert answer.value.rflags & every == 0
    answer = lab.call("vmread %rcx, %rax", {"rcx": 0x6FFE, "rflags": 2 | every})
    assert answer.value.rflags & every == 0x40
    lab.l1.vmclear(VMCS)
    answer = lab.call("vmread %rcx, %rax", {"rcx": F.GUEST_RIP, "rflags": 2 | every})
    assert answer.value.rflags & every == 1


# -- VMLAUNCH and VMRESUME -------------------------------------------------------------------------


def test_the_launch_state_decides_between_launch_and_resume(lab):
    lab.code("cpuid")
    lab.l1.vmwrite(F.GUEST_RIP, CODE)
    assert outcome(lab, "vmresume") == (VALID, E.VMRESUME_WITH_NON_LAUNCHED_VMCS)
    lab.run("cpuid")
    assert outcome(lab, "vmlaunch") == (VALID, E.VMLAUNCH_WITH_NON_CLEAR_VMCS)
    lab.l1.vmclear(VMCS)
    lab.l1.vmptrld(VMCS)
    assert outcome(lab, "vmresume") == (VALID, E.VMRESUME_WITH_NON_LAUNCHED_VMCS)


def test_the_launch_state_survives_another_current_vmcs(lab):
    lab.run("cpuid")
    lab.write_u32(VMCS2, revision(lab))
    lab.l1.vmptrld(VMCS2)
    lab.l1.vmptrld(VMCS)
    assert outcome(lab, "vmlaunch") == (VALID, E.VMLAUNCH_WITH_NON_CLEAR_VMCS)
    assert lab.resume({F.GUEST_RIP: CODE}).reason is R.CPUID


def test_an_entry_after_a_failure_of_its_checks_is_still_a_launch(lab):
    run = lab.run("cpuid", {F.HOST_CS_SELECTOR: 0})
    assert (run.entered, run.result.error) == (False, E.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)
    assert outcome(lab, "vmresume") == (VALID, E.VMRESUME_WITH_NON_LAUNCHED_VMCS)


def test_a_failed_entry_with_bad_guest_state_leaves_the_vmcs_clear(lab):
    run = lab.run("cpuid", {F.GUEST_RFLAGS: 0})
    assert run.failed_entry
    assert outcome(lab, "vmresume") == (VALID, E.VMRESUME_WITH_NON_LAUNCHED_VMCS)


@pytest.mark.parametrize("shadow", ["mov %ecx, %ss", "sti"])
def test_an_entry_is_refused_in_the_shadow_of_mov_ss_only(lab, shadow):
    lab.run("cpuid")
    lab.l1.vmwrite(F.GUEST_RIP, CODE)
    lab.code("cpuid")
    host = "lea 1f(%rip), %rdx; mov $0x6c16, %eax; vmwrite %rdx, %rax; mov $0x6c14, %eax;"
    host += "vmwrite %rsp, %rax; mov %ss, %ecx;"
    answer = lab.call(f"cli; {host} {shadow}; vmresume; 1: cli", {}, ["rax"])
    flags = answer.value.rflags & 0x41
    error = lab.l1.vmread(F.VM_INSTRUCTION_ERROR).value.value
    if shadow == "sti":
        assert flags == 0
    else:
        assert flags == 0x40
        assert error == E.ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS


def test_vmcall_fails_in_l1(lab):
    lab.call("vmcall")
    error = lab.l1.vmread(F.VM_INSTRUCTION_ERROR).value.value
    assert error == E.VMCALL_IN_VMX_ROOT_OPERATION


# -- INVEPT and INVVPID ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 1 << 32 | 1, NONE])
def test_invept_knows_two_types(lab, kind):
    found = outcome(lab, "invept", kind, 0x100000 | 0x1E)
    good = kind in (1, 2)
    assert found == ((GOOD, 0) if good else (VALID, E.INVALID_OPERAND_TO_INVEPT_OR_INVVPID))


@pytest.mark.parametrize("eptp", [0x100000, 0x100000 | 0x26, 0x100000 | 0x9E, 1 << 60 | 0x1E])
def test_invept_refuses_a_bad_eptp_for_a_single_context(lab, eptp):
    assert outcome(lab, "invept", 1, eptp) == (VALID, E.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
    assert outcome(lab, "invept", 2, eptp) == (GOOD, 0)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 8, NONE])
def test_invvpid_knows_four_types(lab, kind):
    found = outcome(lab, "invvpid", kind, 1, 0x1000)
    good = kind in (0, 1, 2, 3)
    assert found == ((GOOD, 0) if good else (VALID, E.INVALID_OPERAND_TO_INVEPT_OR_INVVPID))


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_invvpid_checks_its_descriptor(lab, kind):
    bad = (VALID, E.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
    assert outcome(lab, "invvpid", kind, 0, 0) == ((GOOD, 0) if kind == 2 else bad)
    for bit in (16, 32, 63):
        assert outcome(lab, "invvpid", kind, 1 | 1 << bit, 0) == bad
    address = outcome(lab, "invvpid", kind, 1, 1 << 55)
    assert address == (bad if kind == 0 else (GOOD, 0))


def test_invept_and_invvpid_are_undefined_on_a_processor_without_them():
    lab = Lab("intel-core2")
    assert lab.l1.invept(2).fault.vector == 6
    assert lab.l1.invvpid(2).fault.vector == 6


# -- a VMCS on two processors ----------------------------------------------------------------------


def test_a_vmcs_moves_from_one_processor_to_another():
    lab = Lab(cpus=2)
    lab.start_others(2)
    other = VmxLab(lab.probe, 1)
    other.on(like=lab)
    first = lab.run("mov $0x10, %ecx; mov %ecx, %fs; cpuid; mov %fs, %edx")
    assert first.reason is R.CPUID
    lab.l1.vmclear(VMCS)
    host = {f: v for f, v in other.fields.items() if f.area is FieldArea.HOST}
    with other.batch() as batch:
        batch.vmptrld(VMCS)
        batch.vmwrites(host | {F.GUEST_RIP: first.rip + 2}, other.places.scratch)
        run = other.plan_entry(batch, {}, resume=False)
    run.exits_with(R.VMCALL)
    assert run.registers["rdx"] == 0x10
