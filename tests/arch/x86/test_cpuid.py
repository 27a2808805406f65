"""CPUID: the feature table and the structured leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86 import cpuid
from undervisor.arch.x86.cpuid import BY_NAME, FEATURES, Answer, Output, Processor, Vendor, Version


@pytest.mark.parametrize(
    ("name", "leaf", "subleaf", "register", "bit"),
    [
        ("vmx", 0x1, 0, Output.ECX, 5),
        ("pcid", 0x1, 0, Output.ECX, 17),
        ("tsc-deadline", 0x1, 0, Output.ECX, 24),
        ("hypervisor", 0x1, 0, Output.ECX, 31),
        ("apic", 0x1, 0, Output.EDX, 9),
        ("invpcid", 0x7, 0, Output.EBX, 10),
        ("smap", 0x7, 0, Output.EBX, 20),
        ("rdpid", 0x7, 0, Output.ECX, 22),
        ("arch-capabilities", 0x7, 0, Output.EDX, 29),
        ("xsaves", 0xD, 1, Output.EAX, 3),
        ("nx", 0x80000001, 0, Output.EDX, 20),
        ("pdpe1gb", 0x80000001, 0, Output.EDX, 26),
        ("svm", 0x80000001, 0, Output.ECX, 2),
        ("invtsc", 0x80000007, 0, Output.EDX, 8),
        ("npt", 0x8000000A, 0, Output.EDX, 0),
        ("vgif", 0x8000000A, 0, Output.EDX, 16),
    ],
)
def test_a_feature_is_where_the_manual_says(name, leaf, subleaf, register, bit):
    feature = BY_NAME[name]
    assert (feature.leaf, feature.subleaf) == (leaf, subleaf)
    assert (feature.register, feature.bit) == (register, bit)


def test_no_two_features_share_a_name_or_a_bit():
    assert len(BY_NAME) == len(FEATURES)
    places = {(f.leaf, f.subleaf, f.register, f.bit) for f in FEATURES}
    assert len(places) == len(FEATURES)
    assert all(f.manual and f.name == f.name.lower() for f in FEATURES)


def test_a_feature_declared_twice_fails_at_import():
    with pytest.raises(TypeError, match="twice"):
        cpuid._declared_once([*FEATURES, FEATURES[3]])


def test_every_alias_names_a_feature_and_is_not_one():
    for alias, name in cpuid.ALIASES.items():
        assert name in BY_NAME
        assert alias not in BY_NAME


@given(st.sets(st.sampled_from(FEATURES)))
def test_words_and_features_are_inverse(features):
    words = cpuid.words(features)
    back = {
        feature
        for (leaf, subleaf), word in words.items()
        for feature in cpuid.features_in(leaf, subleaf, word)
    }
    assert back == features


@given(st.integers(0, 0x10E), st.integers(0, 0xFF), st.integers(0, 0xF))
def test_a_version_decodes_to_what_it_was_built_from(family, model, stepping):
    version = Version.build(family, model, stepping)
    assert version.family == family
    assert version.stepping == stepping
    # The extended model counts only in families 6 and 0xF and above.
    assert version.model == (model if family == 6 or family >= 0xF else model & 0xF)


def test_known_processors_have_their_signatures():
    assert Version.build(6, 106, 6) == 0x606A6
    assert Version.build(23, 49, 0) == 0x830F10
    assert (Version(0x800F12).family, Version(0x800F12).model) == (23, 1)


@pytest.mark.parametrize("bad", [(0x10F, 0, 0), (6, 0x100, 0), (6, 0, 16), (-1, 0, 0)])
def test_a_version_without_an_encoding_is_refused(bad):
    with pytest.raises(ValueError, match="no encoding"):
        Version.build(*bad)


@pytest.mark.parametrize("vendor", list(Vendor))
def test_a_vendor_string_survives_the_registers(vendor):
    assert cpuid.vendor_string(cpuid.vendor_registers(vendor.value, 7)) == vendor.value


def test_the_vendor_registers_are_intels():
    assert cpuid.vendor_registers("GenuineIntel", 0x16) == Answer(
        0x16, 0x756E6547, 0x6C65746E, 0x49656E69
    )


def test_a_hypervisor_signature_is_in_ebx_ecx_edx_order():
    answer = cpuid.signature_registers("abcdefghijkl", 0x40000000)
    text = b"".join(part.to_bytes(4, "little") for part in answer[1:])
    assert text == b"abcdefghijkl"


@pytest.mark.parametrize("text", ["x" * 13, "é"])
def test_a_vendor_string_that_does_not_fit_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  (UnicodeEncodeError is one)
        cpuid.vendor_registers(text)


def test_a_brand_string_ends_with_a_zero_and_is_at_most_47_long():
    leaves = cpuid.brand_registers("b" * 47)
    data = b"".join(part.to_bytes(4, "little") for leaf in leaves for part in leaf)
    assert data == b"b" * 47 + b"\0"
    with pytest.raises(ValueError, match="47"):
        cpuid.brand_registers("b" * 48)


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        (0, True),
        (0x7FFF_FFFF_FFFF, True),
        (0x8000_0000_0000, False),
        (0xFFFF_7FFF_FFFF_FFFF, False),
        (0xFFFF_8000_0000_0000, True),
        ((1 << 64) - 1, True),
    ],
)
def test_canonical_addresses_have_equal_upper_bits(address, canonical):
    assert Processor(Vendor.INTEL, frozenset()).is_canonical(address) is canonical


def test_the_reserved_bits_of_a_physical_address_start_at_its_width():
    processor = Processor(Vendor.AMD, frozenset(), physical_width=39)
    assert processor.physical_reserved == 0xFFFF_FF80_0000_0000
