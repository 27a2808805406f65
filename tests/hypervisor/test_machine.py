"""The machine as its user sees it: input and output, models, memory, and how a run ends."""

import pytest
from small_guests import build, run

from undervisor.errors import BadInput
from undervisor.hypervisor.machine import MAX_CPUS, Machine
from undervisor.hypervisor.models.overrides import named
from undervisor.hypervisor.verdict import Ending

ECHO = """
 jmp over
handler:
 push rax
 push rdx
 mov edx, 0x3f8
 in al, dx
 inc al
 out dx, al
 mov al, 0x20
 out 0x20, al
 inc r15
 pop rdx
 pop rax
 iretq
over:
 mov al, 0x11; out 0x20, al
 mov al, 0x20; out 0x21, al
 mov al, 4; out 0x21, al
 mov al, 1; out 0x21, al
 mov al, 0xef; out 0x21, al
 mov edx, 0x3f9; mov al, 1; out dx, al
 xor r15d, r15d
1: sti
 hlt
 cmp r15d, 3
 jb 1b
"""


class Typed:
    """Input that comes a byte at a time, to those that wait as long as it takes."""

    def __init__(self, text, takes=0.0):
        self.left = list(text)
        self.takes = takes
        self.waits = []

    @property
    def open(self):
        return bool(self.left)

    def poll(self):
        return b""

    def wait(self, seconds=None):
        self.waits.append(seconds)
        if seconds is not None and seconds < self.takes:
            return b""
        return bytes([self.left.pop(0)])


def test_a_machine_in_which_everybody_waits_waits_for_input():
    source = Typed(b"abc", takes=1e9)
    result = run(ECHO, vectors={0x24: "handler"}, source=source)
    assert result.outcome.ending is Ending.GUEST
    assert result.output == b"bcd"
    assert source.waits.count(None) == 3


TICKING = ECHO.replace("mov al, 0xef; out 0x21, al", "mov al, 0xee; out 0x21, al").replace(
    "xor r15d, r15d",
    "xor r15d, r15d; mov al, 0x34; out 0x43, al; xor eax, eax; out 0x40, al; out 0x40, al",
)
TICK = "tick: push rax; mov al, 0x20; out 0x20, al; pop rax; iretq"


def test_an_idle_guest_that_has_a_timer_waits_for_input_as_long_as_for_the_timer():
    source = Typed(b"abc", takes=0.02)
    code = f"jmp begin; {TICK}; begin: {TICKING}"
    result = run(code, vectors={0x20: "tick", 0x24: "handler"}, source=source)
    assert result.output == b"bcd"
    waits = [seconds for seconds in source.waits if seconds]
    assert all(0.02 < seconds <= 65536 / 1193182 for seconds in waits)


def test_a_busy_guest_is_interrupted_by_input():
    code = ECHO.replace("hlt", "nop; nop")
    result = run(code, vectors={0x24: "handler"}, source=Typed(b"abc"))
    assert result.outcome.ending is Ending.GUEST
    assert result.output == b"bcd"


def test_a_machine_whose_input_has_ended_is_idle():
    result = run(ECHO, vectors={0x24: "handler"}, source=Typed(b"a"))
    assert result.outcome.ending is Ending.IDLE
    assert result.output == b"b"


def test_the_debug_console_is_there_when_somebody_listens():
    heard = []
    result = run("in al, 0xe9; mov ebx, eax; mov al, 'x'; out 0xe9, al", console=heard.append)
    assert b"".join(heard) == b"x"
    assert result.rbx & 0xFF == 0xE9
    assert run("in al, 0xe9; mov ebx, eax").rbx & 0xFF == 0xFF


@pytest.mark.parametrize("cpus", [0, -1, MAX_CPUS + 1])
def test_an_impossible_number_of_processors_is_refused(cpus):
    with pytest.raises(ValueError, match="1 to 8"):
        build(cpus=cpus)


def test_an_impossible_amount_of_memory_is_refused():
    with pytest.raises(BadInput, match="memory"):
        Machine(named("intel"), memory_size=12345)


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_a_machine_can_run_another_image_when_one_has_ended(cpu):
    machine = build(cpu)
    assert run("mov ebx, 1", machine=machine).rbx == 1
    assert run("mov ecx, 2", machine=machine).rcx == 2
    assert machine.vcpus[0].state.q[3] == 0


def test_the_end_of_a_run_has_the_status_that_qemu_would_give():
    assert run("mov eax, 5; out 0xf4, al").outcome.status == 11


def test_a_triple_fault_shows_the_registers_at_it():
    result = run("mov r12, 0x123456; lidt [none]; ud2; none: .word 0; .quad 0")
    assert result.outcome.ending is Ending.TRIPLE_FAULT
    assert "r12 0000000000123456" in result.outcome.text


def test_cr2_is_the_guests_own_across_a_stop():
    machine = build()
    result = run("mov eax, 0x1234; mov cr2, rax; cpuid; mov rbx, cr2", machine=machine)
    assert result.rbx == 0x1234
    assert result.vcpu.state.cr2 == 0x1234


def test_what_a_busy_guest_has_printed_is_seen():
    class Ended:
        open = True

        def poll(self):
            return b""

        def wait(self, seconds=None):
            if machine.output:
                machine.request_stop()
            return b""

    machine = build(source=Ended())
    code = "mov edx, 0x3f9; mov al, 1; out dx, al; dec edx; mov al, '$'; out dx, al; 1: jmp 1b"
    result = run(code, machine=machine, timeout=30)
    assert (result.outcome.ending, result.output) == (Ending.STOPPED, b"$")
