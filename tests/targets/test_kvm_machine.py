"""A machine on KVM, with a stand-in for the kernel: what is set up, exits, ends, the L2 rule."""

import contextlib
import signal
import time

import pytest
from kvm_standin import LEAVES, VMX, StandIn, echo, in_l2, says, sleeper

from undervisor.arch import kvm
from undervisor.arch.kvm import Capability, Exit, MpState, Request
from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.arch.x86.msr import Msr
from undervisor.errors import BadInput
from undervisor.explain.diagnosis import first_with_findings
from undervisor.explain.recognise import read
from undervisor.targets import End, How
from undervisor.targets.kvm import registers as registers_module
from undervisor.targets.kvm.device import facts, opened
from undervisor.targets.kvm.machine import Machine
from undervisor.targets.kvm.vcpu import KICK
from undervisor.targets.kvm.words import Described

PROTECTED = BootState(BootMode.PROTECTED32, eip=0x100010, eax=0x2BADB002, ebx=0x9000, esp=0x7000)
MEMORY = 2 << 20


@pytest.fixture(autouse=True)
def _kicks():
    before = signal.signal(KICK, lambda number, frame: None)
    yield
    signal.signal(KICK, before)


class Run:
    """A machine that runs, and what came out of it."""

    def __init__(self, kernel, cpus=1, boot=PROTECTED, pieces=(), memory=MEMORY):
        self.kernel, self.output, self.ends = kernel, bytearray(), 0
        self.machine = Machine(
            kernel, Described(cpus, memory, boot), list(pieces), self.output.extend, self._ended
        )

    def _ended(self):
        self.ends += 1

    def until_it_ends(self, seconds=20):
        deadline = time.monotonic() + seconds
        while self.machine.end is None:
            assert time.monotonic() < deadline, "the machine does not end"
            self.machine.board.tend()
            time.sleep(0.002)
        self.machine.board.tend()
        assert self.ends == 1
        return self.machine.end

    def finish(self):
        self.machine.finish(End(How.STOPPED, "the test is over"))
        for vcpu, thread in zip(self.machine.vm.vcpus, self.machine._threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)


@contextlib.contextmanager
def running(*guests, cpus=1, boot=PROTECTED, pieces=(), memory=MEMORY, **more):
    run = Run(StandIn(*guests, **more), cpus, boot, pieces, memory)
    run.machine.start()
    try:
        yield run
    finally:
        run.finish()


def end_of(guest, **more):
    with running(guest, **more) as run:
        return run.until_it_ends(), bytes(run.output), run


# -- what is set up ----------------------------------------------------------------------------


def test_each_processor_has_its_own_apic_id():
    with running(sleeper, sleeper, sleeper, cpus=3) as run:
        for index, cpu in enumerate(run.kernel.cpus):
            assert cpu.cpuid[1, 0][1] == index << 24 | 3 << 16 | LEAVES[1][4] & 0xFFFF
            assert cpu.cpuid[0xB, 0][3] == cpu.cpuid[0xB, 1][3] == index
            assert cpu.cpuid[0x8000001E, 0][0] == index
            assert cpu.cpuid[0, 0] == LEAVES[0][3:]


@pytest.mark.parametrize("there", [0, 1])
def test_the_tsc_deadline_timer_is_offered_where_kvm_has_it(there):
    with running(sleeper, capabilities={Capability.TSC_DEADLINE_TIMER: there}) as run:
        assert run.kernel.cpus[0].cpuid[1, 0][2] >> 24 & 1 == there


def test_memory_is_write_back_as_firmware_leaves_it():
    assert registers_module.FIRMWARE_MSRS == {Msr.MTRR_DEF_TYPE: 0xC06}
    with running(sleeper, sleeper, cpus=2) as run:
        assert [cpu.msrs for cpu in run.kernel.cpus] == [registers_module.FIRMWARE_MSRS] * 2


def segment(cpu, name):
    at = kvm.SREGS_SEGMENTS.index(name) * kvm.SEGMENT.size
    return kvm.SEGMENT.unpack_from(cpu.sregs, at)


def test_an_image_starts_in_flat_protected_mode():
    with running(sleeper) as run:
        cpu = run.kernel.cpus[0]
        assert segment(cpu, "cs") == (0, 0xFFFFFFFF, 8, 0xB, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        for name in ("ds", "es", "fs", "gs", "ss"):
            assert segment(cpu, name) == (0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        assert registers_module.controls(cpu.sregs)["cr0"] == 1
        wanted = {"rip": 0x100010, "rax": 0x2BADB002, "rbx": 0x9000, "rsp": 0x7000, "rflags": 2}
        assert {name: value for name, value in cpu.regs.items() if value} == wanted


def test_a_boot_sector_starts_in_real_mode():
    boot = BootState(BootMode.REAL, eip=0x10, cs=0x7C0, edx=0x80)
    with running(sleeper, boot=boot) as run:
        cpu = run.kernel.cpus[0]
        assert segment(cpu, "cs")[:4] == (0x7C00, 0xFFFF, 0x7C0, 0xB)
        assert segment(cpu, "ds")[:4] == (0, 0xFFFF, 0, 3)
        assert registers_module.controls(cpu.sregs)["cr0"] == 0
        assert (cpu.regs["rip"], cpu.regs["rdx"]) == (0x10, 0x80)


def test_a_descriptor_table_of_the_loader_is_in_gdtr():
    boot = BootState(BootMode.PROTECTED32, eip=0x100000, gdt=(0x5000, 0x1F))
    with running(sleeper, boot=boot) as run:
        at = registers_module.TABLES_AT
        assert kvm.TABLE.unpack_from(run.kernel.cpus[0].sregs, at) == (0x5000, 0x1F)


def test_ram_beyond_the_device_hole_is_above_4_gib():
    with running(sleeper, memory=(3 << 30) + (1 << 20)) as run:
        (low, low_size, address), (high, high_size, other) = run.kernel.slots.values()
        assert (low, low_size, high, high_size) == (0, 3 << 30, 4 << 30, 1 << 20)
        assert other - address == 3 << 30
        run.machine.vm.write(4 << 30, b"there")
        with pytest.raises(BadInput, match="not in RAM"):
            run.machine.vm.write((3 << 30) - 1, b"xx")


def test_more_processors_than_kvm_has_are_refused():
    with pytest.raises(BadInput, match="1 to 2"):
        Run(StandIn(sleeper, capabilities={Capability.MAX_VCPUS: 2}), cpus=3)


# -- what KVM says of itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaves", "vendors"),
    [
        (LEAVES, ("svm",)),
        ([*LEAVES[:1], (1, 0, 0, 0, 0, VMX, 0)], ("vmx",)),
        # On AMD the capability NESTED_STATE is there with nested=0: the flag decides.
        (LEAVES[:4], ()),
    ],
)
def test_the_cpuid_for_guests_tells_whether_nesting_is_on(leaves, vendors):
    assert facts(StandIn(leaves=leaves)).vendors == vendors


def test_a_device_of_another_version_is_refused():
    with pytest.raises(BadInput, match="version 11, not 12"):
        opened(StandIn(version=11))


@pytest.mark.parametrize(
    ("number", "hint"), [(13, "group kvm"), (2, "load kvm_intel"), (16, "another hypervisor")]
)
def test_a_device_that_does_not_open_says_what_to_do(number, hint):
    class Closed(StandIn):
        def open(self):
            raise OSError(number, "no")

    with pytest.raises(BadInput) as refused:
        facts(Closed())
    assert hint in refused.value.hint


# -- exits -------------------------------------------------------------------------------------


def test_a_guest_prints_and_gives_its_status():
    end, output, _ = end_of(says(b"hello", 4))
    assert (end, output) == (End(How.FINISHED, "write to the debug exit port", 9), b"hello")


def test_gathered_output_comes_before_the_exit_after_it():
    def guest(cpu):
        for turn in range(5):  # the ring wraps around
            cpu.gathered(0x3F8, bytes([0x41 + turn]) * 100)
            yield cpu.inp(0x3FD)
        cpu.gathered(0x3F8, b"end")
        yield cpu.out(0xF4, b"\0")

    _, output, _ = end_of(guest)
    assert output == b"A" * 100 + b"B" * 100 + b"C" * 100 + b"D" * 100 + b"E" * 100 + b"end"


def test_gathered_output_of_a_guest_that_never_exits_is_shown():
    def guest(cpu):
        cpu.gathered(0x3F8, b"looping")
        while True:
            yield "until kicked"

    with running(guest) as run:
        deadline = time.monotonic() + 20
        while run.output != b"looping":
            assert time.monotonic() < deadline
            run.machine.board.tend()


def test_input_wakes_a_guest_that_polls_for_it():
    with running(echo) as run:
        time.sleep(0.05)
        run.machine.board.feed(b"abc.")
        run.until_it_ends()
    assert run.output == b"abc."


def test_a_string_input_takes_what_is_there():
    seen = []

    def guest(cpu):
        yield cpu.out(0x3FA, b"\xc7")
        while not (yield cpu.inp(0x3FD))[0] & 1:
            pass
        seen.append((yield cpu.inp(0x3F8, count=14)))
        yield cpu.out(0xF4, b"\0")

    with running(guest) as run:
        run.machine.board.feed(bytes(range(40)))
        run.until_it_ends()
    assert seen == [bytes(range(14))]


def test_input_interrupts_through_the_controllers_in_the_kernel():
    def guest(cpu):
        yield cpu.out(0x3F9, b"\x01")
        while not (yield cpu.inp(0x3FD))[0] & 1:
            pass
        yield cpu.inp(0x3F8)
        yield cpu.out(0xF4, b"\0")

    with running(guest) as run:
        run.machine.board.feed(b"x")
        run.until_it_ends()
    assert run.kernel.lines == [(4, 1), (4, 0)]


def test_what_is_not_there_reads_as_all_ones():
    seen = []

    def guest(cpu):
        seen.append((yield cpu.inp(0x80)))
        seen.append((yield cpu.inp(0x80, size=4)))
        seen.append((yield cpu.mmio_read(0xD0000000)))
        yield cpu.out(0xF4, b"\0")

    end_of(guest)
    assert seen == [b"\xff", b"\xff" * 4, b"\xff" * 4]


def test_the_word_at_the_shutdown_port_and_a_reset_end_the_run():
    def shutdown(cpu):
        for byte in b"Shutdown":
            yield cpu.out(0x8900, bytes([byte]))

    def reset(cpu):
        yield cpu.out(0x64, b"\xfe")

    assert end_of(shutdown)[0] == End(How.FINISHED, "shutdown port")
    assert end_of(reset)[0] == End(How.FINISHED, "reset")


def test_a_start_up_that_interrupts_nothing_goes_on():
    def guest(cpu):
        yield "again"
        yield cpu.out(0xF4, b"\0")

    assert end_of(guest)[0].how is How.FINISHED


# -- ends --------------------------------------------------------------------------------------


def test_a_triple_fault_leaves_the_registers():
    def guest(cpu):
        cpu.regs |= {"rip": 0x1234567, "rax": 0xABCD}
        yield cpu.ends(Exit.SHUTDOWN)

    end, _, _ = end_of(guest)
    assert (end.how, end.text) == (How.GUEST_DIED, "triple fault on vCPU 0")
    assert "L1 on vCPU 0" in end.report
    assert "RAX=000000000000abcd" in end.report
    assert "RIP=0000000001234567" in end.report


def observations(report):
    return [o.id for o in first_with_findings(read(report.encode()), None).dump.observations]


def test_an_internal_error_is_in_words_and_in_lines_that_explain_reads():
    def guest(cpu):
        cpu.regs |= {"rip": 0xB0000}
        yield cpu.ends(Exit.INTERNAL_ERROR, kvm.EXIT_INTERNAL_ERROR, 1, 2, 7, 8, *[0] * 14)

    end, _, _ = end_of(guest)
    assert end.how is How.TARGET_DIED
    assert "suberror 1: KVM_INTERNAL_ERROR_EMULATION" in end.text
    assert "extra data[1]: 0x0000000000000008" in end.report
    assert "extra data[2]" not in end.report
    assert {"kvm.suberror-1", "guest.rip-place"} <= set(observations(end.report))


def test_an_entry_that_the_hardware_refuses_is_in_lines_that_explain_reads():
    def guest(cpu):
        yield cpu.ends(Exit.FAIL_ENTRY, kvm.EXIT_FAIL_ENTRY, 0x80000021, 3)

    end, _, _ = end_of(guest)
    assert end.how is How.TARGET_DIED
    assert "0x80000021" in end.text
    assert first_with_findings(read(end.report.encode()), None).dump.failure.reason == 0x80000021


def test_an_exit_that_nobody_expects_ends_the_run():
    def guest(cpu):
        yield cpu.ends(Exit.SYSTEM_EVENT)

    end, _, _ = end_of(guest)
    assert end.how is How.TARGET_DIED
    assert end.text == "KVM came back with exit reason 24, which is not expected"


def test_a_run_that_kvm_refuses_ends_it():
    def guest(cpu):
        yield "fails"

    end, _, _ = end_of(guest)
    assert end == End(How.TARGET_DIED, "vCPU 0: KVM_RUN failed: Bad address")


def test_our_own_mistake_is_no_guest_that_hangs():
    def guest(cpu):
        raise LookupError("a mistake")
        yield

    end, _, _ = end_of(guest)
    assert (end.how, end.text) == (How.TARGET_DIED, "the thread of vCPU 0 died")
    assert "LookupError: a mistake" in end.report


@pytest.mark.parametrize(
    ("flags", "state", "l2", "idle"),
    [
        (0x2, MpState.HALTED, False, True),
        (0x202, MpState.HALTED, False, False),
        (0x2, MpState.RUNNABLE, False, False),
        (0x2, MpState.HALTED, True, False),
    ],
)
def test_a_machine_waits_for_ever_where_no_processor_can_be_woken(flags, state, l2, idle):
    def guest(cpu):
        cpu.regs["rflags"], cpu.mp, cpu.l2 = flags, state, l2
        while True:
            yield "until kicked"

    with running(guest, sleeper, cpus=2) as run:
        run.machine.look_for_life()
        assert (run.machine.end is not None) is idle
        if idle:
            assert run.machine.end.how is How.IDLE


# -- the rule about L2's state -----------------------------------------------------------------


@pytest.mark.parametrize("tells", [0, 1])
def test_registers_are_not_written_while_the_state_is_l2s(tells):
    capabilities = {Capability.X86_GUEST_MODE: tells}
    with running(in_l2, capabilities=capabilities) as run:
        assert run.machine.ask(0, lambda vcpu: vcpu.in_l2)
        with pytest.raises(BadInput, match="L2's registers, not L1's"):
            run.machine.ask(0, lambda vcpu: vcpu.set_general({"rax": 1}))
        run.finish()
    assert run.kernel.cpus[0].writes == 0
    assert "exits carried L2's state, and no register was written" in run.machine.end.report


def test_what_does_not_change_is_not_written():
    with running(sleeper) as run:
        run.machine.ask(0, lambda vcpu: vcpu.set_general({"rax": 0x2BADB002}))
        assert run.kernel.cpus[0].writes == 0
        run.machine.ask(0, lambda vcpu: vcpu.set_general({"rax": 5}))
        assert run.kernel.cpus[0].writes == 1
        assert run.kernel.cpus[0].regs["rax"] == 5
        assert run.kernel.cpus[0].regs["rbx"] == 0x9000
        with pytest.raises(BadInput, match="'xyz'"):
            run.machine.ask(0, lambda vcpu: vcpu.set_general({"xyz": 5}))


def test_no_exit_makes_us_write_registers():
    _, _, run = end_of(says(b"a longer text " * 20))
    assert run.kernel.cpus[0].runs > 200
    assert run.kernel.cpus[0].writes == 0


def test_a_machine_that_saw_no_l2_says_nothing_of_it():
    assert end_of(says(b"x"))[0].report == ""


# -- what is asked -----------------------------------------------------------------------------


def test_nested_state_is_taken_and_given():
    with running(sleeper) as run:
        blob = run.machine.ask(0, lambda vcpu: vcpu.nested_state())
        assert blob == run.kernel.cpus[0].nested
        other = blob[:8] + b"\x00\x10\x41" + blob[11:]
        run.machine.ask(0, lambda vcpu: vcpu.set_nested_state(other))
        assert run.kernel.cpus[0].nested == other
        with pytest.raises(BadInput, match="Invalid argument"):
            run.machine.ask(0, lambda vcpu: vcpu.set_nested_state(other[:100]))


def test_without_the_capability_there_is_no_nested_state():
    with (
        running(sleeper, capabilities={Capability.NESTED_STATE: 0}) as run,
        pytest.raises(BadInput, match="KVM_CAP_NESTED_STATE"),
    ):
        run.machine.ask(0, lambda vcpu: vcpu.nested_state())


def test_a_processor_that_is_not_there_cannot_be_asked():
    with running(sleeper) as run, pytest.raises(BadInput, match="no vCPU 1"):
        run.machine.ask(1, lambda vcpu: vcpu.index)


def test_interruptions_from_outside_are_signals_to_each_processor(monkeypatch):
    with running(sleeper, sleeper, cpus=2) as run:
        for vcpu in run.machine.vm.vcpus:
            run.machine.ask(vcpu.index, lambda one: one.index)  # its thread is known now
        sent = []
        monkeypatch.setattr(signal, "pthread_kill", lambda thread, number: sent.append(thread))
        run.machine.interrupt()
        assert sent == [vcpu.thread for vcpu in run.machine.vm.vcpus]
        monkeypatch.undo()


def test_the_image_is_in_ram():
    with running(sleeper, pieces=[(0x1000, b"one"), (MEMORY - 3, b"two")]) as run:
        assert run.machine.vm._ram[0x1000:0x1003] == b"one"
        assert run.machine.vm._ram[MEMORY - 3 :] == b"two"


def test_without_gathering_nothing_is_registered():
    with running(says(b"x"), capabilities={Capability.COALESCED_PIO: 0}) as run:
        run.until_it_ends()
    assert Request.REGISTER_COALESCED_MMIO not in run.kernel.asked
    assert run.output == b"x"
