"""The documents about the silicon and the CPU models agree with the code."""

from pathlib import Path

from undervisor.hypervisor import machine
from undervisor.hypervisor.models.document import page
from undervisor.silicon import glue, library

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_page_of_the_cpu_models_is_up_to_date():
    how = "run: python -m undervisor.hypervisor.models.document docs/cpu-models.md"
    assert (DOCS / "cpu-models.md").read_text() == page(), how


def test_the_page_of_the_silicon_names_the_release_and_the_costs():
    text = (DOCS / "silicon.md").read_text()
    assert "Unicorn " + ".".join(map(str, library.KNOWN_VERSION)) in text
    assert f"counts {machine.BLOCK_NS} ns, an exit {machine.EXIT_NS} ns" in text


def test_the_page_of_the_silicon_names_every_redirected_instruction():
    text = (DOCS / "silicon.md").read_text()
    names = {name.rstrip("bwl").upper() if name[-1] in "bwl" else name.upper()
             for name in glue.REDIRECTED}  # fmt: skip
    assert [name for name in sorted(names) if name not in text] == []
