import pytest

from undervisor.arch.vmx.capabilities import (
    CURRENT_PROCESSOR,
    ControlCapability,
    VmxCapabilities,
    VmxMsr,
)
from undervisor.arch.vmx.controls import CONTROL_WORDS, SecondaryControls
from undervisor.arch.vmx.fields import VmcsField

# As printed by a hypervisor: all of 31:0 may be 0; 63:32 says what may be 1.
WITH_XSAVES = 0x0037_8EF0_0000_0000


def test_a_capability_msr_splits_into_forced_and_possible_bits():
    capability = ControlCapability.from_msr(0x0000_00FF_0000_0016)
    assert (capability.must_be_one, capability.may_be_one) == (0x16, 0xFF)
    assert capability.to_msr() == 0xFF_0000_0016


def test_adjusting_sets_what_is_forced_and_clears_what_is_not_supported():
    capability = ControlCapability(must_be_one=0x16, may_be_one=0x7F)
    assert capability.adjust(0x181) == 0x17
    assert not capability.allows(0x181)
    assert (capability.missing(0x181), capability.excess(0x181)) == (0x16, 0x180)
    assert capability.allows(capability.adjust(0x181))


def test_a_processor_without_vmx_is_refused():
    with pytest.raises(KeyError):
        VmxCapabilities.from_msrs({})


def test_the_true_msr_counts_only_where_basic_says_so():
    msrs = {
        VmxMsr.IA32_VMX_BASIC: 1,
        VmxMsr.IA32_VMX_PINBASED_CTLS: 0x7F_0000_0016,
        VmxMsr.IA32_VMX_TRUE_PINBASED_CTLS: 0x7F_0000_0000,
    }
    pin = VmcsField.PIN_BASED_CONTROLS
    assert VmxCapabilities.from_msrs(msrs).controls[pin].must_be_one == 0x16
    msrs[VmxMsr.IA32_VMX_BASIC] |= 1 << 55
    assert VmxCapabilities.from_msrs(msrs).controls[pin].must_be_one == 0


def test_an_absent_msr_supports_nothing():
    capabilities = VmxCapabilities.from_msrs({VmxMsr.IA32_VMX_BASIC: 1})
    assert not capabilities.controls[VmcsField.SECONDARY_CONTROLS].allows(1)


def test_capabilities_survive_a_round_trip_through_msrs():
    assert VmxCapabilities.from_msrs(CURRENT_PROCESSOR.to_msrs()) == CURRENT_PROCESSOR


def test_a_real_secondary_msr_reads_as_names():
    capability = ControlCapability.from_msr(WITH_XSAVES)
    names = SecondaryControls(capability.may_be_one).names()
    assert "enable_xsaves" in names
    assert "enable_ept" not in names


def test_a_32_bit_limit_narrows_physical_addresses():
    basic = 1 | 1 << 48
    assert VmxCapabilities.from_msrs({VmxMsr.IA32_VMX_BASIC: basic}).physical_address_width == 32


@pytest.mark.parametrize("word", CONTROL_WORDS.values(), ids=lambda word: word.field.name)
def test_the_default_processor_supports_every_declared_control(word):
    capability = CURRENT_PROCESSOR.controls[word.field]
    assert capability.allows(word.layout.DECLARED | word.default1)
    assert capability.allows(word.default1)
