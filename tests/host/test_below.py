"""KVM, TCG, another, nothing or unknown: from recorded machines and from contradictions."""

import dataclasses
from pathlib import Path

import pytest

from undervisor.host.access.protocol import Timing
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.below import Below, below, guest_answer
from undervisor.host.fact import Known, Unknown
from undervisor.host.facts.machine import gather
from undervisor.host.facts.software import Guest

HOSTS = Path(__file__).parent.parent / "hosts"


def machine(name):
    return gather(RecordedHost(str(HOSTS / name)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intel-bare-metal", Below.NOTHING),
        ("intel-l1-passthrough", Below.KVM),
        ("software-kvm", Below.KVM),
        ("tcg-l1", Below.TCG),
        ("recorded-tcg-svm", Below.TCG),
        ("recorded-l2-kvm", Below.KVM),
        ("vmware-l1", Below.OTHER),
        ("wsl2-nested-off", Below.OTHER),
        ("hidden-hypervisor", Below.UNKNOWN),
        ("unreadable", Below.UNKNOWN),
        ("s390x-lpar", Below.NOTHING),
        ("s390x-guest-without-sie", Below.KVM),
    ],
)
def test_a_machine_is_told(name, expected):
    answer = below(machine(name))
    assert answer.below is expected
    assert answer.evidence


def timed(name, cpuid, plain):
    it = machine(name)
    timing = Known(Timing(cpuid, plain))
    return dataclasses.replace(it, place=dataclasses.replace(it.place, timing=timing))


def test_a_copied_signature_is_given_away_by_the_timing():
    assert below(timed("intel-l1-passthrough", 120, 40)).below is Below.UNKNOWN
    assert below(timed("tcg-l1", 60_000, 60)).below is Below.UNKNOWN


def test_without_a_measurement_the_signature_counts():
    it = machine("intel-l1-passthrough")
    place = dataclasses.replace(it.place, timing=Unknown("timing", "a shell measures no ticks"))
    assert below(dataclasses.replace(it, place=place)).below is Below.KVM


def test_a_real_l1_says_that_its_l2_holds_a_kvm_machine():
    guests = machine("recorded-l1-with-l2").software.guests.value
    assert [(g.name, guest_answer(g).below) for g in guests] == [("inner", Below.KVM)]


@pytest.mark.parametrize(
    ("wants", "holds", "expected"),
    [
        (True, True, Below.KVM),
        (False, True, Below.KVM),
        (True, False, Below.TCG),
        (False, False, Below.TCG),
        (True, None, Below.UNKNOWN),
        (False, None, Below.TCG),
    ],
)
def test_a_running_guest_is_told_from_its_hypervisor(wants, holds, expected):
    assert guest_answer(Guest(7, "g", "host", wants, holds)).below is expected
