"""The catalogue: every row makes its target, and only the wanted module is imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.targets import catalogue

PROGRAMS = {"qemu": "qemu-system-x86_64", "bochs": "bochs-bin"}


@pytest.mark.parametrize("name", ["builtin", "qemu", "bochs"])
def test_a_name_makes_a_target_with_its_default_model(name):
    if not shutil.which(PROGRAMS.get(name, sys.executable)):
        pytest.skip(f"no {PROGRAMS[name]}")
    for cpu in catalogue.default_cpus(name):
        assert catalogue.named(name, cpu).name == f"{name} ({cpu})"
    assert catalogue.named(name).name == f"{name} ({catalogue.default_cpus(name)[0]})"


def test_quirks_are_of_the_built_in_l0_only():
    assert catalogue.named("builtin", "amd", []).name == "builtin (amd)"
    with pytest.raises(BadInput, match="qemu has no quirks"):
        catalogue.named("qemu", "amd", ["anything"])


def test_a_name_that_is_none_is_told_with_those_that_are():
    with pytest.raises(BadInput, match="'xen'") as caught:
        catalogue.named("xen")
    assert {"builtin", "qemu", "bochs"} <= set(caught.value.hint.replace(",", "").split())


def test_nobody_pays_for_targets_that_were_not_asked_for():
    program = """if True:
        import sys
        from undervisor.targets import catalogue
        catalogue.default_cpus("bochs")
        names = {name.rpartition(".")[2] for name in sys.modules if "undervisor.targets." in name}
        assert names == {"catalogue"}, names
        assert "unicorn" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_target_has_its_row_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert set(catalogue.ROWS) <= rows
