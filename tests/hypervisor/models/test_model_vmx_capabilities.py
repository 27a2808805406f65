"""The VMX capability MSRs that follow from a model's features."""

import pytest

from undervisor.arch.vmx.capabilities import VmxCapabilities
from undervisor.arch.vmx.controls import CONTROL_WORDS, ExitControls, PrimaryControls
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor import models
from undervisor.hypervisor.models.support import SUPPORTED
from undervisor.hypervisor.models.vmx_features import VMX_BY_NAME, VMX_FEATURES, Kind

INTEL = [name for name in models.names() if name.startswith("intel")]
every_model = pytest.mark.parametrize("name", INTEL)
WORDS = [word for word in CONTROL_WORDS.values() if not word.flexible]


@every_model
def test_the_default1_bits_are_forced_in_the_plain_msrs(name):
    msrs = models.named(name).msrs()
    for word in WORDS:
        if word.msr in msrs:
            zero, one = msrs[word.msr] & 0xFFFF_FFFF, msrs[word.msr] >> 32
            assert zero & word.default1 == word.default1
            assert zero & ~one == 0


@every_model
def test_a_true_msr_forces_no_more_than_the_plain_one(name):
    model = models.named(name)
    msrs = model.msrs()
    for word in WORDS:
        if word.true_msr is None:
            continue
        assert (word.true_msr in msrs) == model.has("vmx-true-ctls")
        if word.true_msr in msrs:
            plain, true = msrs[word.msr], msrs[word.true_msr]
            assert true >> 32 == plain >> 32
            assert (true & ~plain) & 0xFFFF_FFFF == 0


def test_true_controls_free_exactly_the_four_that_processors_free():
    msrs = models.named("intel").msrs()
    assert msrs[0x482] & ~msrs[0x48E] == 1 << 15 | 1 << 16
    assert msrs[0x483] & ~msrs[0x48F] == 1 << 2
    assert msrs[0x484] & ~msrs[0x490] == 1 << 2
    assert msrs[0x481] == msrs[0x48D]


@every_model
def test_reading_the_msrs_back_gives_the_same_capabilities(name):
    model = models.named(name)
    read = VmxCapabilities.from_msrs(model.msrs(firmware=False), model.facts)
    assert read == model.vmx


def bit_is_reported(msrs, feature):
    """Whether the MSRs report one VMX feature, read as L1 would."""
    if feature.kind is Kind.REPORTED:
        where = {"VmxBasic": 0x480, "VmxMisc": 0x485, "EptVpidCapability": 0x48C}
        return bool(msrs.get(where[feature.layout.__name__], 0) & feature.mask)
    word = CONTROL_WORDS[feature.field]
    if word.flexible:
        return bool(msrs.get(word.msr, 0) & feature.mask)
    if feature.kind is Kind.MAY_BE_ZERO:
        return word.true_msr in msrs and not msrs[word.true_msr] & feature.mask
    return bool(msrs.get(word.msr, 0) >> 32 & feature.mask)


@every_model
def test_the_msrs_report_exactly_the_models_vmx_features(name):
    model = models.named(name)
    msrs = model.msrs()
    for feature in VMX_FEATURES:
        assert bit_is_reported(msrs, feature) == model.has(feature.name), feature.name


@pytest.mark.parametrize("name", sorted(VMX_BY_NAME.keys() & SUPPORTED))
def test_switching_a_vmx_feature_off_clears_its_bit(name):
    model = models.named(f"intel,-{name}")
    assert not bit_is_reported(model.msrs(), VMX_BY_NAME[name])


def test_every_vmx_feature_has_the_manuals_name():
    assert all(feature.manual for feature in VMX_FEATURES)
    assert VMX_BY_NAME["vmx-ept"].manual == "Enable EPT"


def test_no_two_vmx_features_are_the_same_bit():
    bits = {(feature.layout, feature.mask) for feature in VMX_FEATURES}
    assert len(bits) == len(VMX_FEATURES)


def test_every_bit_of_a_control_word_has_a_name_or_no_choice():
    # Bits without a feature: those that long mode decides, and those of system-management mode.
    unnamed = {
        word.field: word.layout.DECLARED
        & ~sum(feature.mask for feature in VMX_FEATURES if feature.field is word.field)
        for word in CONTROL_WORDS.values()
    }
    assert unnamed[VmcsField.PIN_BASED_CONTROLS] == 0
    assert unnamed[VmcsField.PRIMARY_CONTROLS] == 0
    assert unnamed[VmcsField.SECONDARY_CONTROLS] == 0
    assert unnamed[VmcsField.EXIT_CONTROLS] == ExitControls.host_address_space_size
    assert unnamed[VmcsField.ENTRY_CONTROLS] == 0b11 << 10


@every_model
def test_the_highest_field_index_is_that_of_an_existing_field(name):
    model = models.named(name)
    highest = model.msrs()[Msr.VMX_VMCS_ENUM] >> 1
    assert highest == max(field.index for field in model.vmcs_fields)


def test_without_long_mode_there_is_no_64_bit_host_or_guest():
    msrs = models.named("intel,-lm").msrs()
    assert not msrs[0x483] >> 32 & 1 << 9
    assert not msrs[0x484] >> 32 & 1 << 9


def test_cr4_fixed1_is_what_cr4_supports():
    for name in INTEL:
        model = models.named(name)
        assert model.msrs()[Msr.VMX_CR4_FIXED1] == model.cr4_supported
        assert model.msrs()[Msr.VMX_CR4_FIXED0] & ~model.cr4_supported == 0


def test_core2_has_neither_ept_nor_true_controls():
    model = models.named("intel-core2")
    msrs = model.msrs()
    assert Msr.VMX_EPT_VPID_CAP not in msrs
    assert Msr.VMX_TRUE_PINBASED_CTLS not in msrs
    assert not msrs[Msr.VMX_BASIC] >> 55 & 1
    forced = msrs[Msr.VMX_PROCBASED_CTLS] & 0xFFFF_FFFF
    assert forced & PrimaryControls.cr3_load_exiting


def test_without_secondary_controls_their_msr_is_gone():
    model = models.named("intel,-vmx-secondary-ctls")
    assert Msr.VMX_PROCBASED_CTLS2 not in model.msr_table
    assert not model.has("vmx-ept")


def test_the_revision_identifier_leaves_the_shadow_bit_clear():
    basic = models.named("intel").msrs()[Msr.VMX_BASIC]
    assert basic & 1 << 31 == 0
    assert basic & 0x7FFF_FFFF
    assert basic >> 32 & 0x1FFF == 4096
