import pytest

from undervisor.arch.vmx.exit_information import (
    INSTRUCTION_INFORMATION,
    MEANINGS,
    PLAIN_QUALIFICATIONS,
    QUALIFICATIONS,
    TRAP_LIKE,
    UNCONDITIONAL,
    describe_qualification,
)
from undervisor.arch.vmx.exits import ExitReason


@pytest.mark.parametrize("reason", ExitReason)
def test_every_reason_has_a_meaning(reason):
    assert MEANINGS[reason]


def test_a_qualification_is_read_in_one_way():
    assert not QUALIFICATIONS.keys() & PLAIN_QUALIFICATIONS.keys()


def test_what_always_exits_needs_no_control():
    assert not any("with" in MEANINGS[reason].split('"')[0] for reason in UNCONDITIONAL)


def test_an_instruction_exit_is_fault_like():
    assert not TRAP_LIKE & INSTRUCTION_INFORMATION.keys()


def test_an_ept_violation_is_described():
    words = describe_qualification(ExitReason.EPT_VIOLATION, 0x182)
    assert words.startswith("Data write = 0x1; Guest linear-address field is valid = 0x1")


def test_an_io_qualification_names_the_port():
    words = describe_qualification(ExitReason.IO_INSTRUCTION, 0x03F8_0000)
    assert words == "Port number = 0x3f8"


def test_a_plain_qualification_shows_its_value():
    words = describe_qualification(ExitReason.ENTRY_FAILURE_MSR_LOADING, 3)
    assert words == "0x3: the number of the entry in the list, from 1"


def test_a_qualification_of_zero_is_said_to_be_zero():
    assert describe_qualification(ExitReason.IO_INSTRUCTION, 0) == "all fields are 0"


def test_a_reason_without_qualification_says_so():
    assert "no qualification" in describe_qualification(ExitReason.CPUID, 7)
