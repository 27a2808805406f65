"""The SVM example on QEMU's TCG: the L0 that is not ours."""

import re
import shutil
import zlib

import pytest
from example_machines import (
    FAILED_CHECK,
    FAILED_OPTION,
    FAILED_SUPPORT,
    PASSED,
    expected,
    on_qemu,
    shipped,
)

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
]
SVM = shipped("svm")


@pytest.mark.parametrize(
    ("cpus", "pages"), [(1, "2m"), (2, "4k"), (4, "2m"), (4, "4k"), (4, "1g"), (8, "2m")]
)
def test_the_svm_example_prints_what_was_recorded(cpus, pages, tmp_path):
    outcome = on_qemu(SVM, cpus, f"pages={pages}", tmp_path)
    assert outcome.text == expected("svm", cpus, pages)
    assert outcome.status == PASSED


@pytest.mark.parametrize("pages", ["2m", "1g"])
def test_an_l1_that_emulates_the_local_apic_starts_the_processors_of_its_l2(pages, tmp_path):
    outcome = on_qemu(SVM, 3, f"pages={pages} apic=trap", tmp_path)
    text = expected("svm", 3, "2m-trap")
    assert outcome.text == (text if pages == "2m" else text.replace("2 MiB", "1 GiB"))
    assert outcome.status == PASSED


def test_an_init_that_is_not_redirected_is_noticed(tmp_path):
    outcome = on_qemu(SVM, 2, "init=sx", tmp_path)
    assert outcome.text.endswith("cpu 1: its INIT did not become an exit to L1\n")
    assert outcome.status == FAILED_CHECK


def checksum(seed):
    """The workload's CRC-32, by another implementation of both its halves."""
    data = bytearray()
    for _ in range(32768):
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        data.append(seed >> 24)
    return zlib.crc32(data)


def test_each_processor_computed_its_own_right_checksum(tmp_path):
    outcome = on_qemu(SVM, 4, "", tmp_path)
    found = [int(crc, 16) for crc in re.findall(r"crc ([0-9a-f]{8})", outcome.text)]
    assert found == [checksum(index + 1) for index in range(4)]


def test_two_mib_pages_are_the_default(tmp_path):
    assert on_qemu(SVM, 1, "", tmp_path).text == expected("svm", 1, "2m")


def test_without_acpi_the_processors_are_found_through_fw_cfg(tmp_path):
    outcome = on_qemu(SVM, 2, "pages=4k", tmp_path, machine="pc,acpi=off")
    assert outcome.text == expected("svm", 2, "4k")
    assert outcome.status == PASSED


@pytest.mark.parametrize(
    ("vendor", "cpu", "words", "status", "line"),
    [
        ("vmx", "EPYC,+svm", "", FAILED_SUPPORT, "this processor has no VMX"),
        ("svm", "qemu64,-svm", "", FAILED_SUPPORT, "this processor has no SVM"),
        ("svm", "EPYC,-npt", "", FAILED_SUPPORT, "this processor has no nested paging"),
        (
            "svm",
            "EPYC,-pdpe1gb",
            "pages=1g",
            FAILED_SUPPORT,
            "this processor has no pages of 1 GiB",
        ),
        ("svm", "EPYC,+svm", "pages=3m", FAILED_OPTION, 'unknown option at "pages=3m"'),
        ("svm", "EPYC,+svm", "pages=2m init=exit", FAILED_OPTION, 'unknown option at "init=exit"'),
        ("svm", "EPYC,+svm", "apic=x2", FAILED_SUPPORT, "this processor has no x2APIC mode"),
        ("svm", "EPYC,+svm", "apic=trap apic=x2", FAILED_OPTION, "exclude each other"),
        ("svm", "EPYC,+svm", "apic=trap init=sx", FAILED_OPTION, "exclude each other"),
    ],
)
def test_what_is_missing_or_wrong_is_said(vendor, cpu, words, status, line, tmp_path):
    outcome = on_qemu(shipped(vendor), 1, words, tmp_path, cpu=cpu)
    assert line in outcome.text
    assert outcome.status == status
