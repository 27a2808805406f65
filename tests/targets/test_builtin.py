"""The built-in target: an image, a byte stream, and how it ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from undervisor.errors import BadInput, SiliconDied, TimedOut
from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.image import Image
from undervisor.guest.placement import Segment
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import program
from undervisor.targets import How, Job
from undervisor.targets.builtin import BuiltinTarget

BASE = 0x100000
HEADER = ".code32\n.long 0x1badb002, 3, -(0x1badb002 + 3)\nstart:\n"
PRINT = "mov $0x3f8, %dx; mov $65, %al; out %al, %dx; mov $10, %al; out %al, %dx;"
MEMORY = 32 << 20


def job(body, **more):
    code = assemble(HEADER + body, BASE)
    elf = write_elf([Segment(BASE, code.bytes, len(code))], code.labels["start"])
    return Job(Image.parse(elf, "a test"), memory=MEMORY, **more)


@pytest.fixture(scope="module")
def target():
    return BuiltinTarget("amd")


def test_a_guest_that_ends_its_run_gives_its_status(target):
    with target.start(job(PRINT + "mov $0xf4, %dx; mov $4, %al; out %al, %dx")) as running:
        assert running.receive(20) == b"A\n"
        end = running.wait(20)
    assert (end.how, end.status) == (How.FINISHED, 9)


def test_a_guest_that_dies_leaves_its_registers(target):
    with target.start(job("lidt none; ud2; none: .word 0; .long 0")) as running:
        end = running.wait(20)
    assert end.how is How.GUEST_DIED
    assert "triple fault" in end.text
    assert "rip " in end.report


def test_a_guest_that_waits_for_what_cannot_come_is_idle(target):
    with target.start(job("cli; 1: hlt; jmp 1b")) as running:
        assert running.wait(20).how is How.IDLE


def test_the_end_of_the_machine_is_the_end_of_the_stream(target):
    with target.start(job("mov $0xf4, %dx; out %al, %dx")) as running:
        with pytest.raises(EOFError):
            running.receive(20)
        assert running.wait(20).how is How.FINISHED


def test_waiting_has_a_limit_and_the_machine_runs_on(target):
    with target.start(job(PRINT + "1: jmp 1b")) as running:
        with pytest.raises(TimedOut):
            running.wait(0.3)
        running.stop()
        assert running.wait(20).how is How.STOPPED


def test_a_crash_is_how_it_ended_and_nothing_else(target):
    with target.start(job(PRINT + "1: jmp 1b")) as running:
        assert running.receive(20) == b"A\n"
        os.kill(running.pid, signal.SIGSEGV)
        end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "SIGSEGV" in end.text


def test_leaving_early_ends_the_machine(target):
    with target.start(job("1: jmp 1b")) as running:
        pid = running.pid
    assert is_gone(pid)


def test_an_image_that_does_not_fit_is_refused_before_anything_starts(target):
    with pytest.raises(BadInput, match="not in RAM"):
        target.start(Job(job("nop").image, memory=1 << 20))


def test_it_says_what_its_model_can_do():
    assert BuiltinTarget("intel").abilities.vendors == {"vmx"}
    assert BuiltinTarget("amd").abilities.vendors == {"svm"}
    assert BuiltinTarget("amd,-svm").abilities.vendors == frozenset()


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_the_probe_answers_on_it(cpu):
    image = Image.parse(program().elf, "probe")
    with BuiltinTarget(cpu).start(Job(image, 2, MEMORY)) as running:
        probe = Probe(running, 20)
        probe.wait_for_hello()
        batch = Batch()
        answer = batch.cpuid(0)
        probe.run(batch)
        assert answer.value is not None
        assert probe.start_aps([1]) == 2


def test_two_machines_run_at_the_same_time():
    body = (
        PRINT + "1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 1b; mov $0xf4, %dx; out %al, %dx"
    )
    with (
        BuiltinTarget("amd").start(job(body)) as one,
        BuiltinTarget("intel").start(job(body)) as two,
    ):
        assert one.receive(20) == two.receive(20) == b"A\n"
        two.send(b"x")
        assert two.wait(20).how is How.FINISHED
        one.send(b"x")
        assert one.wait(20).how is How.FINISHED


class TestCopies:
    ECHO = (
        PRINT
        + "1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 1b; mov $0x3f8, %dx; in %dx, %al;"
        + "incl 0x500; add 0x500, %al; out %al, %dx; jmp 1b"
    )

    def test_of_a_job_with_a_prompt_begin_at_the_prompt(self, target):
        asked = job(self.ECHO, prompt=True)
        for _ in range(2):
            with target.start(asked) as running:
                assert running.receive(20) == b"A\n"
                running.send(b"a")
                assert running.receive(20) == b"b"

    def test_share_no_memory(self, target):
        asked = job(self.ECHO, prompt=True)
        with target.start(asked) as one, target.start(asked) as two:
            assert one.receive(20) == two.receive(20) == b"A\n"
            for answer in (b"b", b"c", b"d"):
                one.send(b"a")
                assert one.receive(20) == answer
            two.send(b"a")
            assert two.receive(20) == b"b"

    def test_of_a_guest_that_ends_before_any_prompt_end_as_it_did(self, target):
        ends = job(PRINT + "mov $0xf4, %dx; mov $4, %al; out %al, %dx", prompt=True)
        for _ in range(2):
            with target.start(ends) as running:
                assert running.receive(20) == b"A\n"
                assert running.wait(20).status == 9

    def test_die_with_the_process_that_they_are_copies_of(self, target):
        with target.start(job("1: jmp 1b")) as running:
            template = running._template.pid
            os.kill(template, signal.SIGKILL)
            assert running.wait(20).how is How.TARGET_DIED

    def test_of_a_dead_template_do_not_start_and_say_so(self):
        target, asked = BuiltinTarget("amd"), job("1: jmp 1b")
        with target.start(asked) as running:
            os.kill(running._template.pid, signal.SIGKILL)
            running.wait(20)
        with pytest.raises(SiliconDied, match="SIGKILL"):
            target.start(asked)

    def test_end_with_their_target(self):
        target = BuiltinTarget("amd")
        with target.start(job("1: jmp 1b")) as running:
            pid = running._template.pid
        del target, running
        assert is_gone(pid)


class TestWhereTheyComeFrom:
    def test_is_no_import_of_the_users_script(self, tmp_path):
        script = tmp_path / "script.py"  # without `if __name__ == "__main__"`, as people write
        script.write_text(
            "from undervisor.conformance.runner import lab_on\n"
            "from undervisor.targets.builtin import BuiltinTarget\n"
            "with lab_on(BuiltinTarget('amd'), 'svm') as lab:\n"
            "    print(lab.l1.cpuid(0).fault)\n"
        )
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)

    def test_is_started_again_where_it_is_dead(self):
        target, asked = BuiltinTarget("amd"), job("1: jmp 1b")
        with target.start(asked) as running:
            template = running._template.pid
            os.kill(parent_of(template), signal.SIGKILL)
            assert running.wait(20).how is How.TARGET_DIED
        with BuiltinTarget("amd").start(asked) as running, pytest.raises(TimedOut):
            running.wait(0.1)

    def test_ends_with_the_process_that_it_is_for(self):
        script = (
            "from undervisor.targets import builtin, Job\n"
            "from undervisor.guest.image import Image\n"
            "from undervisor.guest.probe.program import program\n"
            "job = Job(Image.parse(program().elf, 'probe'), memory=32 << 20)\n"
            "running = builtin.BuiltinTarget('amd').start(job)\n"
            "print(running._template.pid, flush=True)\n"
            "input()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            template = int(process.stdout.readline())
            pids = [template, parent_of(template)]
            process.kill()
        for pid in pids:
            assert is_gone(pid)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_gone(pid, limit=20):
    deadline = time.monotonic() + limit
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()
