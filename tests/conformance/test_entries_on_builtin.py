"""Every rule of VM entry and VMRUN, broken by the probe on the built-in L0."""

import pytest

from undervisor.arch.svm.boundary import MODES as SVM_MODES
from undervisor.arch.svm.checks import RULES as SVM_RULES
from undervisor.arch.vmx.boundary import MODES as VMX_MODES
from undervisor.arch.vmx.checks import RULES as VMX_RULES
from undervisor.conformance.entries import comparison
from undervisor.conformance.entries.comparison import column, recorded
from undervisor.conformance.entries.session import MEMORY, Result, Session
from undervisor.conformance.entries.svm.processor import read_capabilities as read_svm
from undervisor.conformance.entries.trial import How, Seen, Trial
from undervisor.conformance.entries.vmx.processor import known_fields
from undervisor.conformance.entries.vmx.processor import read_capabilities as read_vmx
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Probe
from undervisor.guest.probe.l1 import l1_state
from undervisor.guest.probe.program import program
from undervisor.guest.probe.svm_setup import svm_on
from undervisor.guest.probe.vmx_setup import vmx_on
from undervisor.hypervisor import models
from undervisor.targets import Job, catalogue

EVERY = [rule.id for rule in (*VMX_RULES, *SVM_RULES)]
ADDRESS_SPACE = "vmx.host.address-space."
FROM_32_BITS = [ADDRESS_SPACE + name for name in ("pcide", "rip-high", "host-outside-ia32e")]


@pytest.fixture(scope="module")
def builtin():
    return column("builtin")


def test_every_rule_has_an_answer(builtin):
    assert list(builtin.cells) == EVERY


def test_every_broken_entry_ends_as_its_rule_says(builtin):
    wrong = {
        rule: str(cell)
        for rule, cell in builtin.cells.items()
        if cell.result in (Result.DIFFERS, Result.NOT_RUN)
    }
    assert not wrong


def test_what_cannot_be_broken_says_why(builtin):
    for rule, cell in builtin.cells.items():
        assert bool(cell.why) == (cell.result is Result.NOT_APPLICABLE), rule


def test_most_rules_can_be_broken_on_the_models(builtin):
    assert builtin.count("vmx", Result.AGREES) >= 291
    assert builtin.count("svm", Result.AGREES) >= 44


def test_the_record_has_what_is_found_now(builtin):
    (then,) = (c for c in recorded() if c.target == "builtin")
    assert then.cells == builtin.cells


def test_only_an_abort_takes_a_machine_of_its_own(builtin):
    aborts = sum(rule.startswith("vmx.msr-store.") for rule in EVERY)
    assert builtin.boots == len(comparison.CPUS["builtin"]) + aborts


@pytest.mark.parametrize(
    ("vendor", "cpu", "modes"), [("vmx", "intel", VMX_MODES), ("svm", "amd", SVM_MODES)]
)
def test_every_valid_state_of_the_generators_is_entered(vendor, cpu, modes):
    with Session(catalogue.named("builtin", cpu), vendor) as session:
        for mode in modes:
            trial = Trial("", mode, {}, Seen(How.ENTERED))
            assert session._ask(lambda e, b, t=trial: e.unbroken(t, b)).entered, mode


def test_a_32_bit_host_is_refused_as_the_rules_say():
    with Session(catalogue.named("builtin", "intel"), "vmx") as session:
        rows = list(session.run(FROM_32_BITS))
    assert [(row.rule, row.result) for row in rows] == [(r, Result.AGREES) for r in FROM_32_BITS]


def on_probe(cpu, work):
    job = Job(Image.parse(program().elf, "probe"), memory=MEMORY)
    with catalogue.named("builtin", cpu).start(job) as running:
        probe = Probe(running)
        probe.wait_for_hello()
        return work(probe)


@pytest.mark.parametrize("cpu", ["intel", "intel-westmere", "intel-core2", "intel,phys-bits=36"])
def test_the_probe_reads_a_model_s_vmx_capabilities(cpu):
    model = models.named(cpu)
    found = on_probe(cpu, read_vmx)
    assert found.processor == model.facts
    assert found.to_msrs() | {0x3A: 0} == model.vmx.to_msrs() | {0x3A: 0}


@pytest.mark.parametrize("cpu", ["intel", "intel-core2"])
def test_the_probe_finds_a_model_s_vmcs_fields(cpu):
    def ask(probe):
        vmx_on(probe, 0x600000, 0x601000)
        return known_fields(probe, 0x602000)

    read_only = 1 << 10  # SDM 3C "Field Encoding in VMCS": the area of VM-exit information
    fields = {int(f) for f in models.named(cpu).vmcs_fields if f & 0xC00 != read_only}
    assert on_probe(cpu, ask) == fields


@pytest.mark.parametrize("cpu", ["amd", "amd-opteron,-nx", "amd,phys-bits=36"])
def test_the_probe_reads_a_model_s_svm_capabilities(cpu):
    def ask(probe):
        svm_on(probe, 0x600000)
        return read_svm(probe, l1_state(probe))

    model, found = models.named(cpu), on_probe(cpu, ask)
    assert found.physical_width == model.physical_width
    assert found.cr4 & ~0x3 == model.cr4_supported & ~0x3  # VME and PVI: every SVM processor
    assert found.long_mode is True
    assert bool(found.features & 1) == model.has("npt")
    assert bool(found.efer >> 11 & 1) == model.has("nx")
