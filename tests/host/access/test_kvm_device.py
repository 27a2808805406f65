import dataclasses
import errno
import fcntl
import os
import struct

import pytest

from undervisor.arch.kvm import Capability, Request
from undervisor.host.access import kvm_device
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.fact import Absent, Denied, Known, Unknown


def answering(monkeypatch, leaves, version=12, state=4224):
    """A KVM that answers the three questions."""

    def ioctl(number, request, argument):
        if request == Request.GET_API_VERSION:
            return version
        if request == Request.CHECK_EXTENSION:
            assert argument == Capability.NESTED_STATE
            return state
        assert request == Request.GET_SUPPORTED_CPUID
        struct.pack_into("<I", argument, 0, len(leaves))
        for place, (leaf, ecx) in enumerate(leaves.items()):
            struct.pack_into("<7I", argument, 8 + 40 * place, leaf, 0, 0, 0, 0, ecx, 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize(
    ("leaves", "vmx", "svm"),
    [({1: 1 << 5}, True, False), ({1: 0, 0x80000001: 1 << 2}, False, True), ({}, False, False)],
)
def test_the_offer_is_read(monkeypatch, leaves, vmx, svm):
    answering(monkeypatch, leaves)
    offer = kvm_device.ask("/dev/null").value
    assert dataclasses.astuple(offer) == (12, 4224, vmx, svm)


def test_what_is_not_kvm_is_unknown():
    assert isinstance(kvm_device.ask("/dev/null"), Unknown)


def test_a_missing_device_is_absent(tmp_path):
    assert isinstance(kvm_device.ask(str(tmp_path / "kvm")), Absent)


def test_a_closed_device_is_denied(monkeypatch):
    """As a stand-in for `open`: root may open everything."""

    def refuse(path, flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    assert isinstance(kvm_device.ask("/dev/kvm"), Denied)


def test_too_many_leaves_are_cut(monkeypatch):
    answering(monkeypatch, {})

    def lying(number, request, argument):
        if request == Request.GET_SUPPORTED_CPUID:
            struct.pack_into("<I", argument, 0, 0xFFFFFFFF)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", lying)
    assert kvm_device.ask("/dev/null") == Known(KvmOffer(0, 0, False, False), "/dev/null")
