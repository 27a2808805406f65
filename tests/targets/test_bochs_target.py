"""Bochs as a target: both ways to start, both vendors, and how it ended."""

import shutil

import pytest
import target_guests as guests
from target_guests import PRINT, job, probe_job, probe_on

from undervisor.arch.x86.boot import BootMode
from undervisor.errors import BadInput, UndervisorError
from undervisor.guest.asm import assemble
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Batch
from undervisor.targets import How, Job
from undervisor.targets.bochs import BIOS, BochsTarget, Firmware, gathered

pytestmark = [
    pytest.mark.bochs,
    pytest.mark.skipif(
        not (shutil.which("bochs-bin") and BIOS.exists()), reason="no bochs or no BIOS for it"
    ),
]


@pytest.mark.parametrize("firmware", Firmware)
@pytest.mark.parametrize(
    ("body", "how", "text"),
    [
        (guests.SHUTDOWN, How.FINISHED, "shutdown port"),
        (guests.TRIPLE_FAULT, How.GUEST_DIED, "triple fault"),
    ],
)
def test_every_end_of_a_guest_is_told_from_the_others(firmware, body, how, text):
    with BochsTarget("amd", firmware).start(job(PRINT + body)) as running:
        assert guests.read_all(running) == b"A\n"
        end = running.wait(20)
    assert end.how is how
    assert text in end.text


def test_a_power_off_by_acpi_is_the_guests_own_end():
    body = PRINT + "mov $0xb004, %dx; mov $0x2000, %ax; out %ax, %dx; 1: jmp 1b"
    with BochsTarget("amd", Firmware.BIOS).start(job(body)) as running:
        end = running.wait(20)
    assert end.how is How.FINISHED
    assert "power-off" in end.text


def test_msrs_that_its_cpuid_promises_and_it_lacks_fault_or_read_as_zero():
    for faults in (True, False):
        with BochsTarget("intel", absent_msrs_fault=faults).start(probe_job()) as running:
            batch = Batch()
            capabilities = batch.rdmsr(0x345)
            probe_on(running).run(batch)
        assert (capabilities.fault is not None) == faults


def test_a_reset_ends_the_run_and_starts_nothing_again():
    with BochsTarget("intel").start(job(PRINT + guests.RESET)) as running:
        assert guests.read_all(running) == b"A\n"
        assert running.wait(20).how is How.FINISHED


def test_the_place_where_a_guest_died_is_in_the_report():
    with BochsTarget("intel").start(job(guests.TRIPLE_FAULT)) as running:
        report = running.wait(20).report
    assert "ud2" in report
    assert "====" not in report


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize(
    ("cpu", "run", "reason"), [("intel", guests.vmx_l2, 18), ("amd", guests.svm_l2, 0x81)]
)
def test_an_l2_runs_on_each_processor(cpu, run, reason, cpus):
    with BochsTarget(cpu).start(probe_job(cpus)) as running:
        probe = probe_on(running)
        assert probe.start_aps(range(1, cpus)) == cpus
        for processor in range(cpus):
            assert run(probe, processor) == (reason, 42)


def test_a_flat_binary_starts_in_real_mode():
    code = assemble(
        f".code16\nmov %cs, %ax; test %ax, %ax; jnz .; mov %cr0, %eax; test $1, %al; jnz .;"
        f"{PRINT}{guests.SHUTDOWN}",
        0x7C00,
    )
    image = Image.raw(code.bytes, "a test", 0x7C00, BootMode.REAL)
    with BochsTarget("intel").start(Job(image, memory=guests.MEMORY)) as running:
        assert guests.read_all(running) == b"A\n"
        assert running.wait(20).how is How.FINISHED


def test_its_abilities_are_what_its_processors_say():
    assert BochsTarget("intel").abilities.vendors == {"vmx"}
    assert BochsTarget("amd").abilities.vendors == {"svm"}
    assert BochsTarget("athlon64_venice").abilities.vendors == frozenset()


def test_a_model_that_it_does_not_know_is_told():
    with pytest.raises(UndervisorError, match="no CPU model nonsense"):
        _ = BochsTarget("nonsense").abilities


@pytest.mark.parametrize("name", ["a model", "x, count=9", "x\nromimage: file=y", ""])
def test_a_name_cannot_change_the_configuration(name):
    with pytest.raises(BadInput, match="no CPU model"):
        BochsTarget(name)


@pytest.mark.parametrize(("cpus", "memory"), [(9, 32 << 20), (0, 32 << 20), (1, 4096 << 20)])
def test_what_it_does_not_have_is_refused(cpus, memory):
    with pytest.raises(BadInput):
        BochsTarget("amd").start(Job(probe_job().image, cpus, memory))


def test_pieces_are_joined_over_the_smallest_gaps():
    pieces = [(0x9000, b"a"), (0x9002, b"b"), (0x100000, b"c"), (0x100001, b"d"), (0x800000, b"e")]
    joined = gathered(reversed(pieces), 3)
    assert joined == [(0x9000, b"a\0b"), (0x100000, b"cd"), (0x800000, b"e")]
    assert gathered(pieces, 9) == pieces
