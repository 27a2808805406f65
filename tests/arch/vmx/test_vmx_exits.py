import pytest

from undervisor.arch.bits import Register
from undervisor.arch.vmx import exits
from undervisor.arch.vmx.errors import SENTENCES, VmInstructionError
from undervisor.arch.vmx.exits import (
    CrAccessQualification,
    EptViolationQualification,
    ExitReason,
    IoQualification,
    VmreadInformation,
)

# The manual leaves these numbers out.
UNUSED = {35, 38, 42, 71, 82, 83}


def test_the_exit_reasons_have_no_other_gaps():
    assert set(range(max(ExitReason) + 1)) - set(ExitReason) == UNUSED


@pytest.mark.parametrize("error", VmInstructionError)
def test_every_instruction_error_has_its_sentence(error):
    assert error.sentence
    assert SENTENCES[error] == error.sentence


def test_the_instruction_errors_have_only_the_manuals_gaps():
    assert set(range(1, 29)) - set(VmInstructionError) == {14, 21, 27}


def test_an_io_qualification_reads_as_the_instruction():
    rep_insb = IoQualification(0x03F8_0038)
    assert (rep_insb.port, rep_insb.input, rep_insb.string, rep_insb.rep) == (0x3F8, 1, 1, 1)
    assert rep_insb.size == 0


def test_a_mov_to_cr3_qualification_names_both_registers():
    qualification = CrAccessQualification.of(control_register=3, access_type=0, register=9)
    assert qualification == 0x903


def test_an_ept_violation_shows_access_and_permissions():
    value = EptViolationQualification(0x182 | 1 << 3)
    assert value.names() == ["write", "readable", "linear_address_valid", "translation"]


def test_vmread_information_has_the_fields_of_its_memory_operand():
    value = VmreadInformation(0xA << 28 | 1 << 10 | 3 << 3)
    assert (value.register2, value.is_register, value.register1) == (0xA, 1, 3)


def test_every_layout_is_declared():
    layouts = [v for v in vars(exits).values() if isinstance(v, type) and issubclass(v, Register)]
    assert len(layouts) > 15
