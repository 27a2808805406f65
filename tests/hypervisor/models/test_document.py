"""The generated page about CPU models."""

from undervisor.arch.x86.cpuid import Vendor
from undervisor.arch.x86.msr import MSRS
from undervisor.hypervisor import models
from undervisor.hypervisor.models.document import manual_name, page
from undervisor.hypervisor.models.support import STORED_ONLY, SUPPORTED, UNSUPPORTED


def test_the_page_has_a_row_for_every_model_and_feature():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    named = [row.split("`")[1] for row in rows]
    assert sorted(named) == sorted([*models.names(), *SUPPORTED, *UNSUPPORTED])


def test_every_row_has_as_many_cells_as_its_header():
    width = 0
    for line in page().splitlines():
        if line.startswith("|"):
            width = width or line.count("|")
            assert line.count("|") == width, line
        else:
            width = 0


def test_a_feature_goes_by_the_manuals_name():
    assert manual_name("vmx-ept") == "Enable EPT"
    assert manual_name("popcnt") == "POPCNT"
    assert manual_name("mds-no") == "IA32_ARCH_CAPABILITIES bit 5"


def test_registers_that_only_store_exist_and_are_named():
    assert "| IA32_DEBUGCTL (0x1d9) |" in page()
    assert "| SYSCFG (0xc0010010) |" in page()
    known = MSRS[Vendor.INTEL].keys() | MSRS[Vendor.AMD].keys()
    assert STORED_ONLY.keys() <= known
