"""Both examples on Bochs, the only emulator that has both vendors' extensions."""

import shutil
from pathlib import Path

import pytest
from example_machines import expected, on_bochs, shipped

pytestmark = [
    pytest.mark.bochs,
    pytest.mark.skipif(
        not shutil.which("bochs-bin") or not Path("/usr/share/bochs/BIOS-bochs-latest").exists(),
        reason="no bochs, or no BIOS for it",
    ),
]
MANY = [
    (vendor, cpus, pages)
    for vendor in ("vmx", "svm")
    for cpus, pages in ((1, "2m"), (2, "4k"), (4, "2m"), (4, "4k"), (4, "1g"), (8, "2m"))
]


@pytest.mark.parametrize(("vendor", "cpus", "pages"), MANY)
def test_the_example_prints_what_was_recorded(vendor, cpus, pages):
    text = on_bochs(shipped(vendor), vendor, cpus, f"pages={pages}")
    assert text == expected(vendor, cpus, pages)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_an_l1_that_emulates_the_local_apic_starts_the_processors_of_its_l2(vendor):
    text = on_bochs(shipped(vendor), vendor, 3, "pages=2m apic=trap")
    assert text == expected(vendor, 3, "2m-trap")


def test_the_processors_can_be_started_in_x2apic_mode():
    text = on_bochs(shipped("vmx"), "vmx", 2, "pages=4k apic=x2")
    assert text == expected("vmx", 2, "4k")


@pytest.mark.deep
def test_an_init_for_l2_exits_though_bochs_never_takes_it_back():
    """Bochs 2.7 leaves the INIT pending, so that each entry exits again."""
    text = on_bochs(shipped("vmx"), "vmx", 2, "init=exit")
    *reports, _, _ = expected("vmx", 2, "2m-init").splitlines()
    assert text.splitlines()[: len(reports)] == reports
