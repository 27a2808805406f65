import pytest

from undervisor.host.checks.cves import CVES, Status, status
from undervisor.host.facts.version import Flavour, Version, flavour, parse_version

BY_ID = {cve.id: cve for cve in CVES}


@pytest.mark.parametrize(
    ("cve", "release", "expected"),
    [
        ("CVE-2026-45987", "6.6.139", Status.VULNERABLE),
        ("CVE-2026-45987", "6.6.140", Status.FIXED),
        ("CVE-2026-45987", "6.12.85", Status.VULNERABLE),
        ("CVE-2026-45987", "6.18.27", Status.FIXED),
        ("CVE-2026-45987", "7.0.3", Status.VULNERABLE),
        ("CVE-2026-45987", "7.1-rc1", Status.FIXED),
        ("CVE-2026-45987", "6.1.200", Status.VULNERABLE),
        ("CVE-2026-45987", "5.7.19", Status.NOT_AFFECTED),
        ("CVE-2026-45987", "6.11.0", Status.VULNERABLE),
        ("CVE-2026-46131", "7.1-rc2", Status.VULNERABLE),
        ("CVE-2026-46131", "7.1-rc3", Status.FIXED),
        ("CVE-2024-50115", "5.10.228", Status.VULNERABLE),
        ("CVE-2024-50115", "5.10.229", Status.FIXED),
        ("CVE-2024-50115", "3.1.0", Status.NOT_AFFECTED),
        ("CVE-2023-30456", "6.2.7", Status.VULNERABLE),
        ("CVE-2023-30456", "6.1.20", Status.UNKNOWN),
        ("CVE-2021-3653", "5.10.70", Status.FIXED),
        ("CVE-2021-3653", "5.10.59", Status.VULNERABLE),
        ("CVE-2021-3656", "4.12.1", Status.NOT_AFFECTED),
        ("CVE-2022-2196", "6.1.20", Status.UNKNOWN),
        ("CVE-2021-3653", "5.13", Status.VULNERABLE),
        ("CVE-2021-3653", "5.14", Status.FIXED),
        ("CVE-2021-3653", "5.14.0-427.el9_4.x86_64", Status.FIXED),
    ],
)
def test_a_release_is_judged_by_its_branch(cve, release, expected):
    assert status(BY_ID[cve], parse_version(release), flavour(release)) is expected


DISTRIBUTIONS = [
    "5.15.0-101-generic",
    "6.1.0-18-amd64",
    "5.14.0-427.13.1.el9_4.x86_64",
    "6.8.12-2-pve",
    "5.10.205-195.807.amzn2.x86_64",
    "6.4.0-150600.23.25-default",
    "6.6.30-edge",
    "4.18.0-553.el8_10.x86_64",
    "6.18.1+",
]


@pytest.mark.parametrize("release", DISTRIBUTIONS)
@pytest.mark.parametrize("cve", CVES, ids=lambda cve: cve.id)
def test_a_distribution_kernel_is_never_called_vulnerable(cve, release):
    assert status(cve, parse_version(release), flavour(release)) in (Status.FIXED, Status.UNKNOWN)


@pytest.mark.parametrize("cve", CVES, ids=lambda cve: cve.id)
def test_the_data_holds_together(cve):
    fixed = parse_version(cve.fixed)
    assert parse_version(cve.since) < fixed
    for version in cve.branches.values():
        assert parse_version(cve.since) < version < fixed
        assert status(cve, version, Flavour.UPSTREAM) is Status.FIXED
        before = Version(version.major, version.minor, version.patch - 1)
        assert status(cve, before, Flavour.UPSTREAM) is not Status.FIXED


@pytest.mark.parametrize("release", ["6.8.12", "6.9", "7.1-rc3"])
def test_a_kernel_org_release_is_recognized(release):
    assert flavour(release) is Flavour.UPSTREAM


def test_a_release_candidate_sorts_before_its_release():
    words = ["6.9", "7.0-rc1", "7.0-rc10", "7.0", "7.0.1", "7.1-rc1"]
    assert sorted(words, key=parse_version) == words
