import time

import pytest

from undervisor.host.redact import Redactor

SECRETS = {
    "link/ether 52:54:00:ab:cd:ef brd": "52:54:00:ab:cd:ef",
    "root=UUID=5b8c2a1e-1111-2222-3333-444455556666 ro": "5b8c2a1e-1111-2222-3333-444455556666",
    "inet 10.1.2.3/24": "10.1.2.3",
    "inet6 fe80::5054:ff:fe12:3456/64": "fe80::5054:ff:fe12:3456",
    "Serial Number: PF2ABCDE": "PF2ABCDE",
    "-smbios type=1,serial=ABC123,uuid=x": "ABC123",
    "-object secret,id=s0,data=c2VjcmV0c2VjcmV0": "c2VjcmV0c2VjcmV0",
    "curl --password hunter22": "hunter22",
    "token=abcdef0123456789 quiet": "abcdef0123456789",
    "https://user:pa55word@host/x": "user:pa55word",
    "Authorization: Bearer abc.def-ghi_12345": "abc.def-ghi_12345",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345": "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "AKIAIOSFODNN7EXAMPLE": "AKIAIOSFODNN7EXAMPLE",
    "board asset tag: i-0123456789abcdef0": "i-0123456789abcdef0",
    "file=/home/alice/disk.qcow2": "alice",
    "hello myhost.example.org": "myhost",
    "Linux version 6.1.0 (me@buildbox) (gcc 12)": "me@buildbox",
    "Sequence Code:        0000000000012345": "0000000000012345",
}

KEPT = [
    "Linux version 5.15.0-101-generic",
    "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
    "0000:00:1f.2 12:34:56 127.0.0.1 ::1 0.0.0.0",
    "clock 12:34:56",
    "flags : fpu vme de pse",
    "-cpu host,+vmx -smp 4",
    "Serial Number: Not Specified",
    "kernel 1.2.3.4.5",
    "-device virtio-net,key=on",
    "x86/fpu: Supporting XSAVE feature 0x001: 'x87 floating point registers'",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_a_secret_is_removed(text, secret):
    redactor = Redactor(["myhost"])
    after = redactor.text(text)
    assert secret not in after
    assert "[removed-" in after
    assert sum(redactor.removed.values()) >= 1


@pytest.mark.parametrize("text", KEPT)
def test_what_a_reader_needs_stays(text):
    assert Redactor().text(text) == text


def test_the_same_secret_is_the_same_word_and_another_is_another():
    redactor = Redactor()
    after = redactor.text("10.0.0.1 10.0.0.2 10.0.0.1").split(" [")
    assert after[0].strip("[") == after[2].strip("[")
    assert after[0].strip("[") != after[1].strip("[")
    assert redactor.removed == {"address": 2}


def test_a_list_of_words_keeps_the_words_that_are_no_secrets():
    raw = b"qemu\0-object\0secret,id=a,data=aGVsbG8gd29ybGQ=\0-cpu\0host\0--password\0hunter22\0"
    after = Redactor().raw(raw)
    assert after.split(b"\0")[3:5] == [b"-cpu", b"host"]
    assert b"aGVsbG8" not in after
    assert b"hunter22" not in after


def test_redacting_twice_changes_nothing():
    redactor = Redactor()
    once = redactor.text("\n".join(SECRETS))
    assert redactor.text(once) == once


@pytest.mark.parametrize("piece", ["a:", "1.", "secret=", "-----BEGIN PRIVATE KEY-----", "ey", ":"])
def test_garbage_takes_bounded_time(piece):
    start = time.monotonic()
    Redactor().text(piece * (400_000 // len(piece)))
    assert time.monotonic() - start < 5
