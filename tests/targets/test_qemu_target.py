"""QEMU as a target: an image, a byte stream, and how it ended."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import target_guests as guests
from target_guests import PRINT, job, probe_job, probe_on

from undervisor.arch.x86.boot import BootMode
from undervisor.errors import BadInput, UndervisorError
from undervisor.guest.asm import assemble
from undervisor.guest.image import Image, Module
from undervisor.targets import How, Job, qemu
from undervisor.targets.kvm import device
from undervisor.targets.qemu import QemuTarget

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
]
POWER_OFF = "mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx; 1: jmp 1b"


@pytest.fixture(scope="module")
def target():
    return QemuTarget()


@pytest.mark.parametrize(
    ("body", "how", "status", "text"),
    [
        (guests.DEBUG_EXIT, How.FINISHED, 9, "debug exit"),
        ("mov $0xf4, %dx; xor %al, %al; out %al, %dx", How.FINISHED, 1, "debug exit"),
        (POWER_OFF, How.FINISHED, 0, "power-off"),
        (guests.RESET, How.FINISHED, 0, "reset"),
        (guests.TRIPLE_FAULT, How.GUEST_DIED, 0, "triple fault"),
    ],
)
def test_every_end_of_a_guest_is_told_from_the_others(target, body, how, status, text):
    with target.start(job(PRINT + body)) as running:
        assert guests.read_all(running) == b"A\n"
        end = running.wait(20)
    assert (end.how, end.status) == (how, status)
    assert text in end.text


def test_a_qemu_that_is_killed_is_a_target_that_died(target):
    with target.start(job(PRINT + "1: jmp 1b")) as running:
        assert running.receive(20).startswith(b"A")
        os.kill(running.pid, signal.SIGKILL)
        assert guests.read_all(running) in (b"", b"\n")
        end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "SIGKILL" in end.text


def test_a_qemu_that_somebody_asks_to_end_is_a_target_that_died(target):
    with target.start(job(PRINT + "1: jmp 1b")) as running:
        assert running.receive(20).startswith(b"A")
        os.kill(running.pid, signal.SIGTERM)
        end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "from outside" in end.text


@pytest.mark.parametrize("cpus", [1, 4])
def test_an_l2_runs_on_each_processor(target, cpus):
    with target.start(probe_job(cpus)) as running:
        probe = probe_on(running)
        assert probe.start_aps(range(1, cpus)) == cpus
        for processor in range(cpus):
            assert guests.svm_l2(probe, processor) == (0x81, 42)


def test_the_command_line_and_modules_are_what_other_targets_give(target):
    body = """
        mov 16(%ebx), %esi; call tell   # the command line
        mov 24(%ebx), %eax
        mov 8(%eax), %esi; call tell    # the first module's
        mov (%eax), %esi; call tell     # and its content
        mov $0xf4, %dx; out %al, %dx
    tell: lodsb; mov $0x3f8, %dx; out %al, %dx; test %al, %al; jnz tell; ret
    """
    modules = (Module("one,1", b"first\0", "a,b"), Module("two", b"second\0"))
    with target.start(job("mov $0x90000, %esp;" + body, append="a, b", modules=modules)) as running:
        words = guests.read_all(running).split(b"\0")
    assert words[0].endswith(b" a, b")
    assert words[1:] == [b"one,1 a,b", b"first", b""]


def test_what_its_loader_does_not_take_starts_from_a_rom(target):
    flat = assemble(f".code32\n{PRINT}{guests.DEBUG_EXIT}").bytes
    image = Image.raw(flat, "a test", guests.BASE, BootMode.PROTECTED32)
    for started in (Job(image, memory=guests.MEMORY), job(PRINT + guests.DEBUG_EXIT, bits=64)):
        with target.start(started) as running:
            assert guests.read_all(running) == b"A\n"
            assert running.wait(20).status == 9


def test_its_abilities_are_what_its_processor_says(target):
    assert target.abilities.vendors == {"svm"}
    assert {"svm", "npt", "lm"} <= target.abilities.features
    without = QemuTarget("qemu64,-svm").abilities
    assert without.vendors == frozenset()
    assert "lm" in without.features


def test_a_model_that_it_does_not_know_is_told_in_its_words():
    with pytest.raises(UndervisorError, match="unable to find CPU model 'nonsense'"):
        _ = QemuTarget("nonsense").abilities


def test_vmx_is_refused_on_its_emulation():
    with pytest.raises(BadInput, match="not Intel's VMX"):
        QemuTarget("intel")


def test_a_kvm_in_software_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setattr(qemu, "SOFTWARE_KVM", tmp_path)
    with pytest.raises(BadInput, match="kvm_pvm"):
        QemuTarget("amd", "kvm")


def test_a_kvm_without_nesting_is_refused(tmp_path, monkeypatch):
    found = SimpleNamespace(vendors=())
    monkeypatch.setattr(qemu, "SOFTWARE_KVM", tmp_path / "none")
    monkeypatch.setattr(device, "facts", lambda kernel: found)
    with pytest.raises(BadInput, match="neither VMX nor SVM"):
        QemuTarget("amd", "kvm")


def test_a_kvm_that_nests_is_used_with_the_hosts_processor(tmp_path, monkeypatch):
    """The program that is started is none that could touch the device."""
    found = SimpleNamespace(vendors=("vmx",))
    monkeypatch.setattr(qemu, "SOFTWARE_KVM", tmp_path / "none")
    monkeypatch.setattr(device, "facts", lambda kernel: found)
    binary = guests.stand_in(tmp_path, "print(*sys.argv, flush=True); os._exit(1)")
    with QemuTarget("intel", "kvm", binary).start(probe_job(2)) as running:
        words = running.wait(20).report
    assert "-accel kvm -cpu host -smp 2" in words


def test_an_accelerator_that_is_none_is_refused():
    with pytest.raises(BadInput, match="'warp'"):
        QemuTarget("amd", "warp")


def test_too_many_processors_are_refused(target):
    with pytest.raises(BadInput, match="9 processors"):
        target.start(probe_job(9))


def test_an_image_that_does_not_fit_is_refused_before_anything_starts(target):
    with pytest.raises(BadInput, match="not in RAM"):
        target.start(Job(probe_job().image, memory=1 << 20))
