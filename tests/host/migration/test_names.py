"""QEMU's names of VMX controls are told twice, for two layers; they must be the same."""

import pytest

from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.explain.features import VMX_FEATURES
from undervisor.host.migration.capabilities import _NAMES, _WORDS

TOLD = {
    (msr, feature.bits.lsb): feature.qemu
    for feature in VMX_FEATURES
    if feature.word is not None and feature.qemu
    for msr in (feature.word.msr,)
}
OURS = {
    (int(msr), bit): f"vmx-{name}" for word, msr in _WORDS for bit, name in _NAMES[word].items()
}


@pytest.mark.parametrize("key", sorted(set(OURS) | {k for k in TOLD if k[0] in dict(OURS)}))
def test_a_control_has_one_name(key):
    assert OURS[key] == TOLD[key]


def test_no_control_of_the_five_words_is_left_out():
    words = {int(msr) for _, msr in _WORDS}
    assert words <= {word.msr for word in CONTROL_WORDS.values()}
    assert {key for key in TOLD if key[0] in words} == set(OURS)
