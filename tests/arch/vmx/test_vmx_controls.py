import pytest

from undervisor.arch.bits import Register
from undervisor.arch.vmx import controls
from undervisor.arch.vmx.controls import CONTROL_WORDS, ExitControls, PrimaryControls
from undervisor.arch.vmx.fields import FieldArea, VmcsField

LAYOUTS = [
    value
    for value in vars(controls).values()
    if isinstance(value, type) and issubclass(value, Register) and value is not Register
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_has_the_manuals_name(layout):
    assert [name for name, bits in layout.FIELDS.items() if not bits.about] == []


@pytest.mark.parametrize("word", CONTROL_WORDS.values(), ids=lambda word: word.field.name)
def test_a_control_word_is_as_wide_as_its_field(word):
    assert word.field.area is FieldArea.CONTROL
    assert word.field.bits == word.layout.WIDTH


def test_capability_msrs_are_not_shared():
    msrs = [m for word in CONTROL_WORDS.values() for m in (word.msr, word.true_msr) if m]
    assert len(msrs) == len(set(msrs))


def test_only_words_with_a_default1_class_have_a_true_msr():
    for word in CONTROL_WORDS.values():
        assert bool(word.default1) == (word.true_msr is not None)


def test_the_debug_controls_are_in_the_default1_class():
    word = CONTROL_WORDS[VmcsField.EXIT_CONTROLS]
    assert word.default1 & ExitControls.save_debug_controls
    assert CONTROL_WORDS[VmcsField.PRIMARY_CONTROLS].default1 & PrimaryControls.cr3_load_exiting
