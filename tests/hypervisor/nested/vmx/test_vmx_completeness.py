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


def allowed_settings():
    """Every bit of the five words: whether it may be 0 and may be 1."""
    capabilities = models.named("intel").vmx
    for field in ("PIN_BASED_CONTROLS", "PRIMARY_CONTROLS", "EXIT_CONTROLS", "ENTRY_CONTROLS"):
        word = next(f for f in CONTROL_WORDS if f.name == field)
        for bit in range(32):
            yield word, bit, capabilities.controls[word]


@pytest.mark.parametrize(
    ("field", "bit", "capability"),
    [pytest.param(*r, id=f"{r[0].name}-{r[1]}") for r in allowed_settings()],
)
def test_a_setting_that_is_not_allowed_is_refused(lab, field, bit, capability):
    """The bit alone decides: everything else of the VMCS is as in an entry that succeeds."""
    mask, good = 1 << bit, lab.fields[field]
    if good & mask:
        if capability.must_be_one & mask:
            run = lab.run("cpuid", {field: good & ~mask})
            assert (run.entered, run.error) == (False, 7)
    elif not capability.may_be_one & mask:
        run = lab.run("cpuid", {field: good | mask})
        assert (run.entered, run.error) == (False, 7)


@pytest.mark.parametrize("bit", range(32))
def test_a_secondary_setting_that_is_not_allowed_is_refused(lab, bit):
    word = next(f for f in CONTROL_WORDS if f.name == "SECONDARY_CONTROLS")
    if lab.vcpu.model.vmx.controls[word].may_be_one >> bit & 1:
        return
    run = lab.run("cpuid", lab.secondary() | {word: 1 << bit})
    assert (run.entered, run.error) == (False, 7)
    run = lab.run("cpuid", {word: 1 << bit})
    assert run.entered, "without activation nobody looks"
