"""Every exit reason and every control that a model offers has a test here, or a stated reason."""

import ast
from pathlib import Path

import pytest

from undervisor.arch.vmx import checks
from undervisor.arch.vmx.controls import CONTROL_WORDS, VmFunctionControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.hypervisor import models
from undervisor.hypervisor.models.vmx_features import VMX_FEATURES, Kind
from undervisor.hypervisor.nested.vmx import reasons
from undervisor.hypervisor.nested.vmx.reasons import NOTHING_TO_DO, UNSUPPORTED

HERE = Path(__file__)
SOURCES = Path(reasons.__file__).parent


def names(folder, skipped):
    """Attributes, keyword arguments and strings that the Python files of a folder use."""
    found = set()
    for path in folder.glob("*.py"):
        if path.name == skipped:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


TESTED = names(HERE.parent, HERE.name)
USED = names(SOURCES, "reasons.py") | names(Path(checks.__file__).parent, "")


@pytest.mark.parametrize("reason", ExitReason, ids=lambda r: r.name)
def test_an_exit_reason_is_given_and_tested_or_has_a_reason(reason):
    if reason in UNSUPPORTED:
        assert len(UNSUPPORTED[reason]) > 10
        assert reason.name not in USED, "it is given after all"
        return
    assert reason.name in USED, "nothing gives it"
    assert reason.name in TESTED, "no test expects it"


def offered():
    """`(word, bit's name)` for each control that the widest model offers beyond the default."""
    has = models.named("intel").features
    for feature in VMX_FEATURES:
        if feature.field is None or feature.name not in has:
            continue
        if feature.kind is Kind.REPORTED:
            continue
        for name, bits in feature.layout.FIELDS.items():
            if bits.mask & feature.mask:
                yield feature.layout.__name__, name


@pytest.mark.parametrize(("word", "name"), sorted(set(offered())))
def test_a_control_is_acted_upon_and_tested(word, name):
    if word == VmFunctionControls.__name__:  # EPTP switching, by the field and VMFUNC
        assert {"VM_FUNCTION_CONTROLS", "VMFUNC"} <= USED & TESTED
        return
    assert name in USED or name in NOTHING_TO_DO, "nothing looks at it"
    assert name in TESTED, "no test sets it"


def test_every_control_word_is_looked_at():
    assert {word.field.name for word in CONTROL_WORDS.values()} >= {
        "PIN_BASED_CONTROLS",
        "PRIMARY_CONTROLS",
        "SECONDARY_CONTROLS",
        "EXIT_CONTROLS",
        "ENTRY_CONTROLS",
    }


CAPABILITIES = models.named("intel").vmx.controls
WORDS = {field.name: field for field in CAPABILITIES}


def forced_bits(must):
    """`(field, bit)` of the bits of four words that must be 1, or that must be 0."""
    for name in ("PIN_BASED_CONTROLS", "PRIMARY_CONTROLS", "EXIT_CONTROLS", "ENTRY_CONTROLS"):
        capability = CAPABILITIES[WORDS[name]]
        bits = capability.must_be_one if must else ~capability.may_be_one
        for bit in range(32):
            if bits >> bit & 1:
                yield pytest.param(WORDS[name], bit, id=f"{name}-{bit}")


@pytest.mark.parametrize(("field", "bit"), list(forced_bits(True)))
def test_a_control_that_must_be_1_is_refused_as_0(lab, field, bit):
    """The bit alone decides: everything else of the VMCS is as in an entry that succeeds."""
    run = lab.run("cpuid", {field: lab.fields[field] & ~(1 << bit)})
    assert (run.entered, run.result.error) == (False, 7)


@pytest.mark.parametrize(("field", "bit"), list(forced_bits(False)))
def test_a_control_that_must_be_0_is_refused_as_1(lab, field, bit):
    run = lab.run("cpuid", {field: lab.fields[field] | 1 << bit})
    assert (run.entered, run.result.error) == (False, 7)


SECONDARY = WORDS["SECONDARY_CONTROLS"]


@pytest.mark.parametrize(
    "bit", [b for b in range(32) if not CAPABILITIES[SECONDARY].may_be_one >> b & 1]
)
def test_a_secondary_control_that_must_be_0_is_refused_as_1(lab, bit):
    run = lab.run("cpuid", lab.secondary() | {SECONDARY: 1 << bit})
    assert (run.entered, run.result.error) == (False, 7)
    run = lab.run("cpuid", {SECONDARY: 1 << bit})
    assert run.entered, "without activation nobody looks"
