"""Overrides: what users write after the model's name."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86.cpuid import BY_NAME, Vendor, Version
from undervisor.errors import BadInput
from undervisor.hypervisor import models
from undervisor.hypervisor.models.dependencies import missing
from undervisor.hypervisor.models.overrides import LONGEST, SPELLINGS
from undervisor.hypervisor.models.support import FOREIGN, SUPPORTED, UNSUPPORTED

NAMES = models.names()


def complaint(spec):
    with pytest.raises(BadInput) as caught:
        models.named(spec)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


@pytest.mark.parametrize(
    "spec",
    [
        "intel,-pcid",
        "intel,pcid=off",
        "intel,pcid=no",
        "intel,pcid=false",
        "intel, -pcid",
        "intel,-PCID",
    ],
)
def test_the_spellings_of_a_switch_mean_the_same(spec):
    assert models.named(spec).features == models.named("intel,-pcid").features


@pytest.mark.parametrize(
    "spec", ["intel-core2,+popcnt", "intel-core2,popcnt=on", "intel-core2,popcnt"]
)
def test_a_feature_can_be_added_to_a_smaller_model(spec):
    assert models.named(spec).features == models.named("intel-core2").features | {"popcnt"}


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("amd,-nrip_save", "nrip-save"),
        ("intel,-lzcnt", "abm"),
        ("intel,-sse4_2", "sse4.2"),
        ("intel,-lahf_lm", "lahf-lm"),
        ("intel,-xd", "nx"),
    ],
)
def test_other_spellings_of_a_name_are_known(spec, name):
    assert name not in models.named(spec).features


def test_every_other_spelling_leads_to_a_known_name():
    assert set(SPELLINGS.values()) <= SUPPORTED | UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("spec", "gone", "kept"),
    [
        ("intel,-xsave", "xsaves xsaveopt xgetbv1 vmx-xsaves", "sse2 vmx"),
        ("intel,-vmx-ept", "vmx-unrestricted-guest vmx-pml vmx-invept", "vmx-vpid"),
        ("intel,vmx-vpid=off", "vmx-invvpid vmx-invvpid-all-context", "vmx-ept"),
        ("intel,-vmx-true-ctls", "vmx-cr3-load-noexit vmx-entry-noload-debugctl", "vmx-ept"),
        ("intel,-vmx", "vmx-ept vmx-true-ctls", "pcid"),
        ("intel,-pcid", "invpcid vmx-invpcid-exit", "vmx-ept"),
        ("intel,-arch-capabilities", "rdctl-no mds-no", "spec-ctrl"),
        ("amd,-svm", "npt nrip-save vgif", "lm"),
        ("amd,-npt", "v-vmsave-vmload", "nrip-save svm"),
    ],
)
def test_what_depends_on_a_dropped_feature_goes_with_it(spec, gone, kept):
    features = models.named(spec).features
    assert not set(gone.split()) & features
    assert set(kept.split()) <= features


def test_switching_off_what_is_not_there_changes_nothing():
    assert models.named("intel,-avx2,-svm,-ht").features == models.named("intel").features


def test_phys_bits_is_the_physical_width():
    model = models.named("intel,phys-bits=39")
    assert model.cpuid(0x80000008, 0, models.CpuidState()).eax & 0xFF == 39
    assert model.processor.physical_reserved == (1 << 64) - (1 << 39)
    assert model.facts.physical_address_width == 39


@pytest.mark.parametrize(
    ("option", "place", "value"),
    [("family=15", "family", 15), ("model=0x1a", "model", 0x1A), ("stepping=3", "stepping", 3)],
)
def test_the_version_can_be_chosen(option, place, value):
    model = models.named(f"intel,{option}")
    version = Version(model.cpuid(1, 0, models.CpuidState()).eax)
    assert getattr(version, place) == value


def test_the_brand_string_can_be_chosen():
    model = models.named("amd,model-id=My Processor,-npt")
    assert model.identity.brand == "My Processor"
    first = model.cpuid(0x80000002, 0, models.CpuidState())
    assert b"".join(part.to_bytes(4, "little") for part in first) == b"My Processor\0\0\0\0"


def test_a_feature_in_a_higher_leaf_raises_the_limit():
    model = models.named("amd-opteron,+smep")
    state = models.CpuidState()
    assert model.cpuid(0, 0, state).eax == 7
    assert model.cpuid(7, 0, state).ebx == 1 << 7


def test_the_specification_stays_with_the_model():
    model = models.named("intel,-pcid")
    assert model.spec == "intel,-pcid"
    assert model.name == "intel"


@pytest.mark.parametrize("name", sorted(UNSUPPORTED | FOREIGN))
def test_what_nobody_can_do_is_refused_with_its_reason(name):
    text = complaint(f"intel,+{name}")
    assert name in text
    assert (UNSUPPORTED | FOREIGN)[name] in text


@pytest.mark.qemu
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64")
def test_every_feature_that_qemu_names_is_known():
    command = ["qemu-system-x86_64", "-cpu", "help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    names = text.split("Recognized CPUID flags:")[1].split()
    assert len(names) > 200
    for name in names:
        assert models.named(f"intel,-{name}").vendor is Vendor.INTEL


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("intle", ["unknown CPU model 'intle'", "intel"]),
        ("", ["unknown CPU model ''"]),
        ("intel,+pcidd", ["unknown CPU feature 'pcidd'", "pcid"]),
        ("intel,-vmx-eptt", ["unknown CPU feature 'vmx-eptt'", "vmx-ept"]),
        ("intel,+svm", ["svm", "AuthenticAMD"]),
        ("amd,+vmx", ["vmx", "GenuineIntel"]),
        ("amd,+vmx-ept", ["vmx-ept", "GenuineIntel"]),
        ("intel,-vmx,+vmx-ept", ["vmx-ept needs", "vmx", "switched off"]),
        ("intel,+xsaves,-xsave", ["xsaves needs xsave", "switched off"]),
        ("intel,-pcid,+pcid", ["pcid", "both on and off"]),
        ("intel-core2,+vmx-ept-1gb", ["vmx-ept-1gb needs vmx-ept", "add +vmx-ept"]),
        ("amd-opteron,+v-vmsave-vmload", ["v-vmsave-vmload needs npt", "add +npt"]),
        ("intel,phys-bits=52", ["phys-bits='52'", "32 to 40"]),
        ("intel,phys-bits=", ["phys-bits=''"]),
        ("intel,phys-bits=-1", ["phys-bits='-1'"]),
        ("intel,phys-bits=²", ["phys-bits"]),
        ("intel,family=0x10f", ["family='0x10f'", "0 to 270"]),
        ("intel,model=99999999", ["model='99999999'"]),
        ("intel,stepping=16", ["stepping='16'", "0 to 15"]),
        ("intel,model-id=" + "x" * 48, ["model-id", "47"]),
        ("intel,model-id=a\nb", ["model-id"]),
        ("intel,pcid=maybe", ["'pcid=maybe'", "=on or =off"]),
        ("intel,+pcid=on", ["sign and a value"]),
        ("intel,", ["empty item"]),
        ("intel,+", ["unknown CPU feature ''"]),
        ("intel,+osxsave", ["osxsave", "mirrors"]),
        ("intel,+" + "x" * 200, ["unknown CPU feature", "..."]),
        ("intel,+a\nb", ["unknown CPU feature"]),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_is_near(spec, parts):
    text = complaint(spec)
    for part in parts:
        assert part in text


def test_an_endless_specification_is_refused_without_being_read():
    assert str(LONGEST) in complaint("intel" + ",+pcid" * LONGEST)


@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.sampled_from("+-"), st.sampled_from(sorted(SUPPORTED))), max_size=12),
)
def test_overrides_give_a_consistent_model_or_one_line(name, switches):
    spec = ",".join([name, *(sign + feature for sign, feature in switches)])
    model = model_or_one_line(spec)
    if model is None:
        return
    assert missing(model.features) == {}
    assert model.features <= SUPPORTED
    for sign, feature in switches:
        assert model.has(feature) == (sign == "+")
    state = models.CpuidState()
    assert cpuid_limits_reach(model, state)
    assert model.msrs().keys() == model.msr_table.keys()


def model_or_one_line(spec):
    """The model, or None after a refusal that is one line long."""
    refusals = []
    try:
        return models.named(spec)
    except BadInput as refusal:
        refusals.append(str(refusal))
    assert "\n" not in refusals[0]
    return None


def cpuid_limits_reach(model, state):
    for feature in (BY_NAME[name] for name in model.features if name in BY_NAME):
        answer = model.cpuid(feature.leaf, feature.subleaf, state)
        if feature.leaf > model.cpuid(feature.leaf & 0x80000000, 0, state).eax:
            return False
        if not answer[feature.register] & feature.mask:
            return False
    return True


@given(st.text(max_size=60))
def test_any_text_after_the_name_is_a_model_or_one_line(text):
    model = model_or_one_line("amd," + text)
    assert model is None or model.name == "amd"
