"""RDMSR and WRMSR at L1 level, by class of MSR."""

import pytest
from small_guests import DATA, build, in_ring_3, run

from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor.models.overrides import named

GP = (13, 0)
NON_CANONICAL = 0x8000_0000_0000_0000
MODELS = ["intel", "amd"]


def rdmsr(number):
    return f"mov ecx, {number:#x}; rdmsr; shl rdx, 32; or rax, rdx;"


def wrmsr(number, value):
    low, high = value & 0xFFFFFFFF, value >> 32
    return f"mov ecx, {number:#x}; mov eax, {low:#x}; mov edx, {high:#x}; wrmsr;"


@pytest.mark.parametrize("cpu", MODELS)
@pytest.mark.parametrize("text", ["rdmsr", "wrmsr"])
def test_an_unknown_msr_raises_gp(cpu, text):
    result = run(f"mov ecx, 0x12345; here: {text}", cpu)
    assert result.faults == [GP]
    assert result.events[0].rip == result.labels["here"]


@pytest.mark.parametrize("cpu", MODELS)
def test_every_msr_of_the_model_reads_as_its_value_or_raises_gp_where_it_is_write_only(cpu):
    model = named(cpu)
    numbers = [n for n, spec in model.msr_table.items() if not spec.live and spec.readable]
    moves = {Msr.FS_BASE, Msr.GS_BASE, Msr.EFER}
    numbers = [n for n in numbers if n not in moves and n not in range(0x800, 0x900)]
    text = "".join(
        f"{rdmsr(number)} mov [{0x200000 + 8 * i:#x}], rax;" for i, number in enumerate(numbers)
    )
    result = run(text, cpu)
    assert result.faults == []
    expected = model.msrs()
    read = {number: result.u64(0x200000 + 8 * i) for i, number in enumerate(numbers)}
    assert read == {number: expected[number] for number in numbers}


@pytest.mark.parametrize(
    ("cpu", "number"), [("intel", Msr.PRED_CMD), ("amd", Msr.PRED_CMD), ("intel", Msr.FLUSH_CMD)]
)
def test_a_command_msr_can_be_written_and_not_read(cpu, number):
    if number not in named(cpu).msr_table:
        pytest.skip("the model has no such MSR")
    assert run(wrmsr(number, 1), cpu).faults == []
    assert run(rdmsr(number), cpu).faults == [GP]
    assert run(wrmsr(number, 2), cpu).faults == [GP]


@pytest.mark.parametrize(
    ("cpu", "number"),
    [
        ("intel", Msr.VMX_BASIC),
        ("intel", Msr.MTRRCAP),
        ("amd", Msr.MTRRCAP),
        ("intel", Msr.MCG_CAP),
    ],
)
def test_a_read_only_msr_refuses_writes(cpu, number):
    assert run(wrmsr(number, 0), cpu).faults == [GP]


@pytest.mark.parametrize(
    "number",
    [Msr.FS_BASE, Msr.GS_BASE, Msr.KERNEL_GS_BASE, Msr.LSTAR, Msr.CSTAR, Msr.SYSENTER_EIP],
)
def test_an_address_msr_of_intel_keeps_canonical_values_and_refuses_others(number):
    address = 0xFFFF_8000_0000_1000
    assert run(wrmsr(number, address) + rdmsr(number)).rax == address
    assert run(wrmsr(number, NON_CANONICAL)).faults == [GP]


def test_a_written_fs_base_is_used():
    text = wrmsr(Msr.FS_BASE, DATA) + f"mov dword ptr [{DATA + 8:#x}], 77; mov ebx, fs:[8]"
    assert run(text).rbx == 77


def test_swapgs_and_the_base_msrs_agree():
    text = wrmsr(Msr.GS_BASE, 0x1000) + wrmsr(Msr.KERNEL_GS_BASE, 0x2000) + "swapgs;"
    result = run(text + rdmsr(Msr.GS_BASE) + "mov rbx, rax;" + rdmsr(Msr.KERNEL_GS_BASE))
    assert (result.rbx, result.rax) == (0x2000, 0x1000)


@pytest.mark.parametrize("cpu", MODELS)
@pytest.mark.parametrize("bit", [1, 9, 13, 16, 19, 22, 63])
def test_a_reserved_bit_of_efer_raises_gp(cpu, bit):
    assert run(wrmsr(Msr.EFER, 0x901 | 1 << bit), cpu).faults == [GP]


def test_lme_may_not_change_while_paging_is_on():
    assert run(wrmsr(Msr.EFER, 0x801)).faults == [GP]


def test_lma_is_ignored_by_a_write_and_kept():
    result = run(wrmsr(Msr.EFER, 0x901) + rdmsr(Msr.EFER))
    assert result.faults == []
    assert result.rax == 0xD01


def test_svme_exists_on_amd_only():
    assert run(wrmsr(Msr.EFER, 0x1D01), "amd").faults == []
    assert run(wrmsr(Msr.EFER, 0x1D01), "intel").faults == [GP]


def test_no_execute_can_be_switched_off_and_on():
    result = run(wrmsr(Msr.EFER, 0x101) + wrmsr(Msr.EFER, 0x901) + rdmsr(Msr.EFER))
    assert result.rax == 0xD01


def test_the_tsc_can_be_set_and_tsc_adjust_moves_with_it():
    text = wrmsr(Msr.TSC, 1 << 40) + rdmsr(Msr.TSC) + "mov rbx, rax;"
    result = run(text + rdmsr(Msr.TSC_ADJUST))
    assert 1 << 40 <= result.rbx < (1 << 40) + 1_000_000
    assert 0 < (1 << 40) - result.rax < 1_000_000


def test_tsc_adjust_moves_the_tsc():
    text = "rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax;" + wrmsr(Msr.TSC_ADJUST, 1 << 40)
    result = run(text + "rdtsc; shl rdx, 32; or rax, rdx; sub rax, rbx")
    assert 1 << 40 <= result.rax < (1 << 40) + 1_000_000


def test_a_negative_tsc_adjust_reads_back():
    value = (1 << 64) - 5
    assert run(wrmsr(Msr.TSC_ADJUST, value) + rdmsr(Msr.TSC_ADJUST)).rax == value


def test_pat_refuses_reserved_memory_types():
    assert run(wrmsr(Msr.PAT, 0x0007040600070406) + rdmsr(Msr.PAT)).rax == 0x0007040600070406
    assert run(wrmsr(Msr.PAT, 2)).faults == [GP]
    assert run(wrmsr(Msr.PAT, 8)).faults == [GP]


def test_the_apic_base_msr_knows_the_bootstrap_processor():
    assert run(rdmsr(Msr.APIC_BASE)).rax == 0xFEE00900


def test_the_local_apic_can_be_switched_off_and_on_by_its_msr():
    result = run(
        wrmsr(Msr.APIC_BASE, 0xFEE00100)
        + "mov eax, 1; cpuid; mov r8, rdx;"
        + wrmsr(Msr.APIC_BASE, 0xFEE00900)
        + "mov eax, 1; cpuid; mov r9, rdx"
    )
    assert (result.r8 >> 9 & 1, result.r9 >> 9 & 1) == (0, 1)


def test_x2apic_registers_exist_only_in_x2apic_mode():
    assert run(rdmsr(0x802)).faults == [GP]
    assert run(wrmsr(Msr.APIC_BASE, 0xFEE00D00) + rdmsr(0x802)).faults == []
    assert run(wrmsr(Msr.APIC_BASE, 0xFEE00D00) + wrmsr(0x802, 0)).faults == [GP]


def test_the_feature_control_msr_is_locked_by_firmware():
    assert run(rdmsr(Msr.FEATURE_CONTROL)).rax == 5
    assert run(wrmsr(Msr.FEATURE_CONTROL, 5)).faults == [GP]


LOCKED = 8


def test_a_locked_vm_cr_opens_with_the_key():
    text = wrmsr(Msr.SVM_LOCK_KEY, 0x1234) + wrmsr(Msr.VM_CR, LOCKED)
    assert run(text + rdmsr(Msr.VM_CR), "amd").rax == LOCKED
    assert run(text + wrmsr(Msr.SVM_LOCK_KEY, 0x1234) + rdmsr(Msr.VM_CR), "amd").rax == 0
    assert run(text + wrmsr(Msr.SVM_LOCK_KEY, 0x1235) + rdmsr(Msr.VM_CR), "amd").rax == LOCKED


def test_a_key_written_while_vm_cr_is_locked_is_not_stored():
    text = wrmsr(Msr.SVM_LOCK_KEY, 1) + wrmsr(Msr.VM_CR, LOCKED) + wrmsr(Msr.SVM_LOCK_KEY, 2)
    assert run(text + wrmsr(Msr.SVM_LOCK_KEY, 2) + rdmsr(Msr.VM_CR), "amd").rax == LOCKED
    assert run(text + wrmsr(Msr.SVM_LOCK_KEY, 1) + rdmsr(Msr.VM_CR), "amd").rax == 0


def test_the_svm_key_cannot_be_read():
    assert run(rdmsr(Msr.SVM_LOCK_KEY), "amd").faults == [GP]


def test_ring_3_may_not_use_msrs():
    assert in_ring_3("mov ecx, 0x10; rdmsr").faults == [GP]


def test_a_written_msr_is_the_processors_own():
    machine = build(cpus=2)
    run(wrmsr(Msr.TSC_AUX, 7), machine=machine)
    assert machine.vcpus[0].msrs[Msr.TSC_AUX] == 7
    assert machine.vcpus[1].msrs[Msr.TSC_AUX] == 0
