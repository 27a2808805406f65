"""Every recorded machine gives its expected findings, no more and no less."""

import json
from pathlib import Path

import pytest

from undervisor.host.access.recorded import RecordedHost
from undervisor.host.checks.engine import CHECKS, examine
from undervisor.host.checks.finding import KINDS, Layer, Level
from undervisor.host.facts.machine import gather

HOSTS = Path(__file__).parent.parent.parent / "hosts"
NAMES = sorted(path.name for path in HOSTS.iterdir() if path.is_dir())


def examined(name):
    host = RecordedHost(str(HOSTS / name))
    try:
        return examine(gather(host), with_security=True)
    finally:
        host.close()


@pytest.fixture(scope="module")
def everything():
    return {name: examined(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_gives_its_findings_no_more_and_no_less(name):
    expected = json.loads((HOSTS / name / "expected.json").read_text())
    examination = examined(name)
    found = [f.kind.id for f in examination.findings if f.kind.layer is not Layer.SECURITY]
    security = [f.kind.id for f in examination.findings if f.kind.layer is Layer.SECURITY]
    assert sorted(found) == expected["findings"]
    assert sorted(security) == expected["security"]
    assert examination.as_json()["verdict"] == expected["verdict"]
    assert examination.as_json()["cause"] == expected["cause"]


def test_there_are_at_least_two_dozen_machines():
    assert len(NAMES) >= 24


def test_every_kind_of_finding_is_found_on_some_machine(everything):
    found = {finding.kind.id for e in everything.values() for finding in e.findings}
    checked = {
        kind.id for kind in KINDS.values() if kind.layer not in (Layer.MIGRATION, Layer.LIVE)
    }
    missing = {kind for kind in checked if not kind.startswith("CVE-")} - found
    assert missing == KINDS_WITHOUT_A_MACHINE


KINDS_WITHOUT_A_MACHINE = {
    "wsl1",
    "ppc64-nesting",
    "architecture-unchecked",
    "nx-off",
    "nested-unknown",
    "device-missing",
    "domain-host-model",
    "domain-disables-extension",
    "domain-emulated",
    "libvirt-without-kvm",
    "guest-without-extension",
}
"""Found by tests of their own, next to their check."""


def test_a_bad_finding_always_says_why_and_what_to_do(everything):
    for name, examination in everything.items():
        for finding in examination.findings:
            if finding.kind.level in (Level.FAIL, Level.WARN, Level.UNKNOWN):
                assert finding.evidence, f"{name}: {finding.kind.id} has no evidence"
                assert finding.remedy, f"{name}: {finding.kind.id} has no remedy"
                assert "{" not in finding.remedy.replace("{required}", ""), finding.remedy


def test_the_layers_come_in_order(everything):
    for examination in everything.values():
        layers = [finding.kind.layer for finding in examination.findings]
        assert layers == sorted(layers)


def test_the_checks_are_all_run():
    assert len(CHECKS) == len(set(CHECKS)) == 7
