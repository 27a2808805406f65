"""Logs that name a failed check in words or numbers of their own."""

import re
import shutil
from pathlib import Path

import pytest

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain import diagnose, read
from undervisor.explain.diagnosis import ALL_RULES
from undervisor.explain.formats import bochs, virtualbox

SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")


def test_every_rule_that_a_row_for_bochs_names_exists():
    for _, names in bochs.ROWS:
        for name in names.split():
            whole = [name.replace("{r}", register.lower()) for register in SEGMENTS]
            assert any(f"vmx.{one}" in ALL_RULES for one in whole), name


def test_every_rule_that_a_number_of_virtualbox_means_exists():
    assert set(virtualbox.HM_ERRORS) == set(range(502, 626)) - {622}
    for number in virtualbox.HM_ERRORS:
        rules = virtualbox.rules_of(number)
        assert rules
        assert set(rules) <= set(ALL_RULES), number


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        (570, "vmx.guest.gs.limit-vm86"),
        (517, "vmx.guest.cs.reserved-low"),
        (535, "vmx.guest.ds.readable"),
        (551, "vmx.guest.gs.reserved-low"),
        (606, "vmx.guest.link.aligned"),
    ],
)
def test_a_number_of_virtualbox_means_its_rule(number, rule):
    assert virtualbox.rules_of(number)[0] == rule


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("VMFAIL: VMLAUNCH with non-clear VMCS!", "non-clear"),
        ("VMFAIL: VMRESUME with non-launched VMCS!", "non-launched"),
        ("VMFAIL: VMLAUNCH with invalid VMCS ptr !", "VMfailInvalid"),
        ("VMFAIL: VMLAUNCH with interrupts blocked by MOV_SS !", "blocked by MOV SS"),
    ],
)
def test_a_failure_before_the_checks_gets_its_number(message, sentence):
    from undervisor.explain.diagnosis import failure_sentence

    (dump,) = read(f"00012e[CPU0  ] {message}\n".encode())
    diagnosis = diagnose(dump)
    assert sentence in failure_sentence(diagnosis.failure)
    assert not diagnosis.is_clean


def test_the_last_failure_in_a_log_counts():
    (dump,) = read(
        b"e[CPU0] VMFAIL: VMCS host CS selector 0\ne[CPU0] VMFAIL: VMCS host SS selector 0\n"
    )
    assert dump.named == ["vmx.host.ss.null"]


BINARY = shutil.which("bochs-bin") or shutil.which("bochs")
OTHER = re.compile(
    r"VMREAD|VMWRITE|VMPTRLD|VMCLEAR|VMLEAR|VMCALL|VMLAUNCH|VMRESUME|physical address !|to SMM"
)


@pytest.mark.bochs
@pytest.mark.skipif(not BINARY, reason="no bochs")
def test_every_message_in_the_installed_bochs_is_known():
    texts = re.findall(rb"(?:VMFAIL|VMENTER FAIL): ([ -~]{5,200})", Path(BINARY).read_bytes())
    if not texts:
        pytest.skip("this bochs has no VMX")
    assert len(texts) > 120
    unknown = []
    for raw in texts:
        text = raw.decode()
        filled = text.replace("%s", "DS").replace("%c", "A").replace("%d", "3")
        if "BASE non canonical" in filled:
            filled = filled.replace("DS", "FS")
        if not bochs.rules_of(filled) and not OTHER.search(text.replace("VMREAD bitmap", "")):
            unknown.append(text)
    assert unknown == []


QEMU = shutil.which("qemu-system-x86_64")


@pytest.mark.qemu
@pytest.mark.skipif(not QEMU, reason="no qemu-system-x86_64")
def test_the_registers_that_the_installed_qemu_prints_are_read():
    import subprocess

    done = subprocess.run(
        [QEMU, "-display", "none", "-nodefaults", "-monitor", "stdio", "-S"],
        input=b"info registers\nquit\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    text = b"KVM: entry failed, hardware error 0x80000021\n" + done.stdout
    (dump,) = read(text)
    assert dump.state[F.GUEST_CS_SELECTOR] == 0xF000
    assert dump.state[F.GUEST_CS_BASE] == 0xFFFF_0000
    assert dump.state[F.GUEST_RIP] == 0xFFF0
    assert dump.state[F.GUEST_TR_ACCESS_RIGHTS] == 0x8B
    assert dump.state[F.GUEST_IDTR_LIMIT] == 0xFFFF
    assert diagnose(dump).broken == []
