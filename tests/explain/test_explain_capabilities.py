"""Capabilities from saved texts, and what differs between two processors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.bits import Register
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR, VmxMsr
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.errors import BadInput
from undervisor.explain.capabilities import CapabilitySet, from_msrs
from undervisor.explain.capability_texts import load, parse
from undervisor.explain.comparison import compare, cpu_option, libvirt_lines, qemu_switches
from undervisor.explain.features import (
    SHORT,
    SVM_FEATURES,
    VMX_FEATURES,
    Setting,
    control_capability,
    setting,
)

MSRS = CURRENT_PROCESSOR.to_msrs()


def test_json_comes_back_as_it_was():
    found = CapabilitySet("x", [MSRS, {**MSRS, 0x48B: 1}], physical_width=46, linear_width=57)
    again = parse(json.dumps(found.as_json()), "y")
    assert again == found


@pytest.mark.parametrize(
    "line",
    [
        "0x48b: 0x{:x}",
        "48B={:x}",
        "IA32_VMX_PROCBASED_CTLS2 = 0x{:X}",
        "rdmsr 0x48b\n{:x}",
        "$ sudo rdmsr -a 0x48b\n{:x}",
        "HM: MSR_IA32_VMX_PROCBASED_CTLS2     = {:#x}",
        "MSR[0x48b] = {:#018x}",
        "VMX_PROCBASED_CTLS2 {:016x}",
    ],
)
def test_an_msr_is_read_however_it_is_written(line):
    assert parse(line.format(0x1F_7CFF_0000_0000), "f").msrs == {0x48B: 0x1F_7CFF_0000_0000}


def test_rdmsr_of_all_processors_gives_each_its_own():
    text = "rdmsr -a 0x480\nda040000000004\nda040000000004\nrdmsr -a 0x48b\n378ef00000000\n1\n"
    found = parse(text, "f")
    assert [cpu[0x48B] for cpu in found.cpus] == [0x3_78EF_0000_0000, 1]
    assert found.differing() == {0x48B: {0x3_78EF_0000_0000: [0], 1: [1]}}


def vmxcap(msrs):
    """The text of vmxcap for the controls that have a name in the manual."""
    lines = ["Basic VMX Information", f"  Hex: {msrs[0x480]:#x}"]
    titles = {
        0x481: "pin-based controls",
        0x482: "primary processor-based controls",
        0x48B: "secondary processor-based controls",
        0x483: "VM-Exit controls",
        0x484: "VM-Entry controls",
    }
    for word in CONTROL_WORDS.values():
        if word.msr not in titles:
            continue
        lines.append(titles[word.msr])
        plain, true = msrs[word.msr], msrs.get(word.true_msr, 0)
        for bits in word.layout.FIELDS.values():
            zero, one = not plain >> bits.lsb & 1, plain >> 32 >> bits.lsb & 1
            true_zero, true_one = not true >> bits.lsb & 1, true >> 32 >> bits.lsb & 1
            if word.true_msr and true_zero and true_one and one and not zero:
                text = "default"
            elif zero and not one:
                text = "no"
            else:
                text = "forced" if one and not zero else "yes"
            lines.append(f"  {bits.about:<40} {text}")
    return "\n".join(lines)


def test_vmxcaps_words_give_the_same_controls():
    found = parse(vmxcap(MSRS), "f")
    for word in CONTROL_WORDS.values():
        if word.msr in found.msrs:
            ours, theirs = control_capability(word, MSRS), control_capability(word, found.msrs)
            named = word.layout.DECLARED
            assert ours.may_be_one & named == theirs.may_be_one & named, word.field.name
            assert ours.must_be_one & named == theirs.must_be_one & named, word.field.name
    assert found.notes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "hello",
        '{"cpus": [{"0x480": "zebra"}]}',
        "0x3a: 5",
        "{" * 100_000,
        '{"a":' * 3000,
    ],
)
def test_a_text_without_capabilities_is_refused(text):
    with pytest.raises(BadInput):
        parse(text, "f")


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse(text, "f")
    except BadInput:
        return
    assert found.vendor or found.physical_width


def test_a_file_that_is_no_file_is_refused(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "none"), "a\0b"):
        with pytest.raises(BadInput):
            load(path)


def test_every_bit_of_every_capability_msr_has_the_manuals_name():
    for feature in (*VMX_FEATURES, *SVM_FEATURES):
        assert feature.manual
    layouts = {word.layout for word in CONTROL_WORDS.values()}
    assert all(issubclass(layout, Register) for layout in layouts)
    named = {(f.msr, f.bits.lsb) for f in VMX_FEATURES}
    for word in CONTROL_WORDS.values():
        for bits in word.layout.FIELDS.values():
            assert (word.msr, bits.lsb) in named


def test_qemu_names_are_qemus_own_and_mean_one_bit_each():
    names = [f.qemu for f in VMX_FEATURES if f.qemu]
    assert all(name.startswith("vmx-") for name in names)
    # QEMU itself has this name twice: for INVEPT and for INVVPID.
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"vmx-invept-single-context"}


def test_the_short_names_are_of_all_control_words():
    assert set(SHORT.values()) == set(CONTROL_WORDS)


def test_default1_controls_are_told_from_forced_ones():
    feature = next(f for f in VMX_FEATURES if f.qemu == "vmx-cr3-load-noexit")
    assert setting(feature, MSRS) is Setting.DEFAULT
    old = {k: v for k, v in MSRS.items() if k not in (0x48D, 0x48E, 0x48F, 0x490)}
    assert setting(feature, old) is Setting.FORCED
    assert setting(feature, {}) is Setting.UNKNOWN


def test_the_two_control_values_give_the_lost_controls_with_xsaves_first():
    first = from_msrs("host", {0x48B: 0x1F_7CFF_0000_0000})
    second = from_msrs("guest", {0x48B: 0x3_78EF_0000_0000})
    comparison = compare(first, second)
    assert [one.feature.bits.lsb for one in comparison.lost] == [20, 4, 10, 18, 19]
    assert comparison.lost[0].feature.manual == "Enable XSAVES/XRSTORS"
    assert "#UD" in comparison.lost[0].consequence.happens
    assert "-xsaves" in comparison.lost[0].consequence.remedy
    assert comparison.gained == []
    assert "vmx-xsaves=on" in cpu_option(qemu_switches(comparison))
    assert "<feature policy='disable' name='vmx-xsaves'/>" in libvirt_lines(
        qemu_switches(comparison, common=True)
    )


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_what_is_lost_is_what_arithmetic_says(mine, other):
    comparison = compare(from_msrs("a", {0x48B: mine << 32}), from_msrs("b", {0x48B: other << 32}))
    named = CONTROL_WORDS[SHORT["secondary"]].layout.DECLARED
    assert sum(1 << one.feature.bits.lsb for one in comparison.lost) == mine & ~other & named
    assert sum(1 << one.feature.bits.lsb for one in comparison.gained) == other & ~mine & named


def test_a_set_equals_itself():
    found = from_msrs("a", MSRS)
    assert compare(found, found).is_equal


def test_what_one_does_not_report_is_not_compared():
    comparison = compare(from_msrs("a", MSRS), from_msrs("b", {0x480: MSRS[0x480]}))
    assert comparison.lost == []
    assert "Secondary processor-based VM-execution controls" in comparison.unknown


@pytest.mark.parametrize(("mine", "other", "word"), [(39, 40, "off-by-one"), (46, 40, "reserved")])
def test_address_widths_that_differ_stand_out_with_a_remedy(mine, other, word):
    a, b = from_msrs("a", MSRS), from_msrs("b", MSRS)
    a.physical_width, b.physical_width = mine, other
    (width,) = compare(a, b).widths
    assert word in width.happens
    assert "phys-bits" in width.remedy


def test_svm_leaves_are_compared_by_feature():
    a = CapabilitySet("a", svm=(1, 0x8000, 0, 0x1_BCFF))
    b = CapabilitySet("b", svm=(1, 0x10, 0, 0x0000_000B))
    comparison = compare(a, b)
    names = {one.feature.qemu for one in comparison.lost}
    assert {"vgif", "flushbyasid", "vmcb-clean", "avic"} <= names
    assert "npt" not in names
    assert "vgif=on" in cpu_option(qemu_switches(comparison))


def test_capabilities_for_the_rules_have_the_given_widths():
    found = from_msrs("a", MSRS)
    found.physical_width = 39
    assert found.vmx().physical_address_width == 39
    assert CapabilitySet("b", [{0x48B: 1}]).vmx() is None
    assert VmxMsr.IA32_VMX_BASIC in found.msrs
