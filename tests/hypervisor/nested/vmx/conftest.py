"""One L1 for the tests of a module; a test that ruins it makes its own."""

import pytest
from vmx_lab import Lab


@pytest.fixture(scope="module")
def lab():
    return Lab()
