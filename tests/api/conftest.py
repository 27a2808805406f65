"""The example images, which the tests of this folder stop, look into and disturb."""

from importlib import resources

import pytest

VENDORS = {"svm": "amd", "vmx": "intel"}


@pytest.fixture(params=sorted(VENDORS))
def vendor(request):
    return request.param


@pytest.fixture
def example(vendor):
    """`(path, CPU model)` of a vendor's example."""
    return resources.files("undervisor") / "data" / "examples" / f"{vendor}.elf", VENDORS[vendor]
