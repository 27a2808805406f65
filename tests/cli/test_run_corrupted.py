"""Random corruptions of an example image: whatever happens, it has a name, and it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def outcomes(vendor, first, count):
    done = subprocess.run(
        [sys.executable, HERE / "corrupt.py", vendor, str(first), str(count)],
        capture_output=True,
        text=True,
        timeout=60 + 6 * count,
        check=True,
    )
    found = json.loads(done.stdout)
    assert sum(found.values()) == count
    assert not [name for name in found if name.startswith("BUG")], found
    return found


@pytest.mark.parametrize("vendor", ["svm", "vmx"])
def test_a_few_corrupted_images_end_in_a_way_that_has_a_name(vendor):
    assert outcomes(vendor, 0, 20)


@pytest.mark.deep
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("vendor", ["svm", "vmx"])
def test_a_thousand_corrupted_images_end_in_a_way_that_has_a_name(vendor, part):
    assert outcomes(vendor, 1000 + 125 * part, 125)
