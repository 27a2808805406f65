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
    pytest.param(vendor, cpus, pages, marks=pytest.mark.deep)
    for vendor in ("vmx", "svm")
    for cpus, pages in ((1, "2m"), (4, "4k"), (4, "1g"), (8, "2m"))
]


@pytest.mark.parametrize(
    ("vendor", "cpus", "pages"), [("vmx", 2, "4k"), ("vmx", 4, "2m"), ("svm", 2, "4k"), *MANY]
)
def test_the_example_prints_what_was_recorded(vendor, cpus, pages, tmp_path):
    outcome = on_bochs(shipped(vendor), vendor, cpus, f"pages={pages}", tmp_path)
    assert outcome.text == expected(vendor, cpus, pages)
