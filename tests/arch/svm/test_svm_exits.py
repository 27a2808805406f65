import pytest

from undervisor.arch.svm.exits import (
    EXIT_INFO,
    SAVES_NEXT_RIP,
    CrAccessInfo,
    ExitCode,
    IoInfo,
    NestedPageFaultInfo,
    TaskSwitchInfo,
    exception_exit,
    exception_vector,
    exit_code_of,
    signed_exit_code,
)
from undervisor.arch.svm.intercepts import (
    EXITS,
    INTERCEPT_OF,
    UNCONDITIONAL,
    Intercept,
    Priority,
    intercept_mask,
    intercepts_of,
    is_intercepted,
    priority_of,
)
from undervisor.arch.svm.vmcb import Vmcb, VmcbField
from undervisor.arch.x86.events import Vector


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("CR0_READ", 0x00),
        ("CR8_WRITE", 0x18),
        ("DR7_WRITE", 0x37),
        ("EXCP_PF", 0x4E),
        ("INTR", 0x60),
        ("CPUID", 0x72),
        ("IOIO", 0x7B),
        ("MSR", 0x7C),
        ("SHUTDOWN", 0x7F),
        ("VMMCALL", 0x81),
        ("XSETBV", 0x8D),
        ("CR15_WRITE_TRAP", 0x9F),
        ("INVPCID", 0xA2),
        ("IDLE_HLT", 0xA6),
        ("NPF", 0x400),
        ("VMGEXIT", 0x403),
        ("INVALID", -1),
    ],
)
def test_an_exit_code_is_the_manual_s(name, code):
    assert ExitCode[name] == code


def test_codes_below_the_last_intercept_have_no_gap():
    assert {code for code in ExitCode if 0 <= code <= 0xA6} == set(range(0xA7))


def test_an_exit_code_of_64_or_32_bits_is_recognized():
    assert exit_code_of(0xFFFF_FFFF_FFFF_FFFF) is ExitCode.INVALID
    assert exit_code_of(0xFFFF_FFFF) is ExitCode.INVALID
    assert exit_code_of(0x400) is ExitCode.NPF
    assert exit_code_of(0x3FF) == 0x3FF
    assert signed_exit_code(ExitCode.BUSY.raw) == -2


def test_exception_exits_go_both_ways():
    for vector in range(32):
        assert exception_vector(exception_exit(vector)) == vector
    assert exception_exit(Vector.PF) is ExitCode.EXCP_PF
    assert exception_vector(ExitCode.INTR) is None


def test_every_exit_has_one_intercept_or_a_stated_cause():
    for code in ExitCode:
        assert (code in INTERCEPT_OF) != (code in UNCONDITIONAL), code.name
    assert set(EXITS) == set(Intercept)


@pytest.mark.parametrize("intercept", Intercept, ids=lambda i: i.name)
def test_an_intercept_s_field_and_word_name_the_same_bit(intercept):
    vmcb = Vmcb(bytearray(4096))
    vmcb[intercept.field] = intercept.field_mask
    assert vmcb.d[intercept.word] == intercept.mask
    assert is_intercepted(vmcb, intercept)
    assert intercepts_of(vmcb) == [intercept]


def test_intercept_bits_are_the_manual_s():
    assert Intercept.CPUID.field is VmcbField.INTERCEPT_WORD3
    assert Intercept.CPUID.field_mask == 1 << 18
    assert Intercept.VMRUN.field is VmcbField.INTERCEPT_WORD4
    assert (Intercept.VMRUN.field_mask, Intercept.XSETBV.field_mask) == (1, 1 << 13)
    assert (Intercept.INVPCID.field, Intercept.INVPCID.mask) == (VmcbField.INTERCEPT_WORD5, 4)
    assert Intercept.CR3_WRITE.field is VmcbField.INTERCEPT_CR_WRITE
    assert Intercept.EXCP_PF.mask == 1 << 14
    assert intercept_mask(Intercept.VMRUN, Intercept.INTR) == (0, 0, 0, 1, 1, 0)


# Where the manual names an intercept and its exit differently.
RENAMED = {"INTN": "SWINT", "IOIO_PROT": "IOIO", "MSR_PROT": "MSR"}


@pytest.mark.parametrize("intercept", Intercept, ids=lambda i: i.name)
def test_an_intercept_produces_the_exit_of_its_name(intercept):
    assert intercept.exit_code is ExitCode[RENAMED.get(intercept.name, intercept.name)]


def test_ioio_information_decodes():
    info = IoInfo(0x03F8_0000 | 1 << 4 | 1 << 9 | 1)
    assert (info.port, info.size, info.address_size, info.in_) == (0x3F8, 1, 8, 1)
    assert IoInfo(1 << 6).size == 4


def test_information_layouts_have_the_manual_s_bits():
    assert NestedPageFaultInfo(1 << 33 | 6).names() == ["rw", "us", "guest_tables"]
    assert CrAccessInfo(1 << 63 | 7).gpr == 7
    assert TaskSwitchInfo(1 << 36 | 1 << 44 | 5).names() == ["error_code", "iret", "has_error_code"]
    assert EXIT_INFO[ExitCode.NPF][1] == "guest-physical address"


def test_next_rip_is_saved_for_instructions_and_nothing_else():
    assert {ExitCode.CPUID, ExitCode.MSR, ExitCode.IOIO, ExitCode.VMMCALL} <= SAVES_NEXT_RIP
    events = {"INTR", "NMI", "SMI", "INIT", "VINTR", "EXCP_PF", "TASK_SWITCH", "SHUTDOWN", "NPF"}
    assert not SAVES_NEXT_RIP & {ExitCode[name] for name in events}
    assert all(code in INTERCEPT_OF for code in SAVES_NEXT_RIP)


@pytest.mark.parametrize(
    ("intercept", "priority"),
    [
        (Intercept.IRET, Priority.BEFORE_ALL),
        (Intercept.XSETBV, Priority.BEFORE_ALL),
        (Intercept.INVPCID, Priority.BEFORE_ALL_BUT_CPL),
        (Intercept.GDTR_WRITE, Priority.BEFORE_MEMORY),
        (Intercept.RDTSC, Priority.AFTER_ALL),
        (Intercept.VMLOAD, Priority.AFTER_ALL),
    ],
)
def test_an_intercept_ranks_against_exceptions_as_the_manual_says(intercept, priority):
    assert priority_of(intercept) is priority
