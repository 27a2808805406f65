"""The documents of the conformance suite agree with it."""

import re
from pathlib import Path

from undervisor.conformance.catches import CATCHES
from undervisor.conformance.document import page
from undervisor.conformance.suite import all_tests
from undervisor.hypervisor.quirks.catalogue import CATALOGUE

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_catalogue_is_up_to_date():
    how = "run: python -m undervisor.conformance.document docs/guest-tests-catalogue.md"
    assert (DOCS / "guest-tests-catalogue.md").read_text() == page(), how


def test_every_test_is_in_the_catalogue():
    text = page()
    for test in all_tests():
        assert f"`{test.id.rpartition('.')[2].split('[')[0]}`" in text


def test_every_quirk_names_tests_that_there_are_and_words():
    known = {test.id for test in all_tests()}
    assert set(CATCHES) == set(CATALOGUE)
    for quirk, catches in CATCHES.items():
        assert catches, quirk
        for catch in catches:
            assert catch.test in known, quirk
            assert catch.words, quirk


def test_the_methods_of_the_guide_exist():
    from undervisor.conformance.svm.lab import SvmLab
    from undervisor.conformance.vmx.lab import VmxLab

    text = (DOCS / "guest-tests.md").read_text()
    for name in set(re.findall(r"\blab\.([a-z_0-9]+)", text)):
        assert any(hasattr(kind, name) for kind in (VmxLab, SvmLab)) or name in ("l1", "places")
