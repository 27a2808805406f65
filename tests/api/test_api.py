"""A machine as a library: stop where one likes, look into both levels, hold exceptions of L2."""

import pytest

from undervisor.api import Decision, NotThere, Vm, What
from undervisor.arch.x86.events import Vector
from undervisor.errors import BadInput
from undervisor.guest.asm import assemble
from undervisor.guest.loops import Loop
from undervisor.hypervisor import models
from undervisor.hypervisor.verdict import Ending

CPUID = b"\x0f\xa2"


@pytest.fixture
def vm(example):
    path, cpu = example
    return Vm(path, cpu=cpu, cpus=2)


def l2_vm(vendor, body, rounds=1):
    """A machine whose L2 runs `body` once."""
    cpu = "intel" if vendor == "vmx" else "amd"
    loop = Loop(body, 1, rounds, vendor)
    return Vm(loop.elf(models.named(cpu).vmx), cpu=cpu, memory=32 << 20)


# -- running -----------------------------------------------------------------------------------


def test_it_runs_to_the_first_entry_of_l2_and_on_to_the_end(vm):
    event = vm.run_until(to=2)
    assert event.what is What.TRANSITION
    assert (event.transition.level, event.transition.to) == (1, 2)
    assert vm.l2().is_running
    assert not vm.l1().is_running
    outcome = vm.run(60)
    assert (outcome.ending, outcome.status) == (Ending.GUEST, 1)
    assert vm.serial.endswith(b"passed\n")


def test_it_stops_at_a_reason_where_that_exit_was(vm):
    event = vm.run_until(level=2, to=1, reason="cpuid")
    assert "CPUID" in event.transition.reason
    l2 = vm.l2()
    assert not l2.is_running
    assert l2["rip"] == event.transition.rip
    assert l2.read_gva(l2["rip"], 2) == CPUID


def test_it_stops_at_a_predicate(vm):
    seen = []

    def third(transition):
        seen.append(transition)
        return len(seen) == 3

    event = vm.run_until(third)
    assert event.transition is seen[2]
    assert len(seen) == 3


def test_it_stops_at_serial_output_and_at_the_next_one_after_that(vm):
    assert vm.run_until(serial="cpu 0:").what is What.SERIAL
    assert b"cpu 1:" not in vm.serial
    assert vm.run_until(serial=b"cpu 1:").what is What.SERIAL


def test_stopping_changes_nothing_of_what_the_guest_does(example):
    path, cpu = example
    whole, pieces = Vm(path, cpu=cpu), Vm(path, cpu=cpu)
    whole.run(60)
    while pieces.run_until(to=2, timeout=60).what is not What.END:
        pass
    assert pieces.serial == whole.serial
    assert pieces.machine.now() == whole.machine.now()
    assert pieces.machine.exits == whole.machine.exits


def test_a_run_that_ends_before_the_event_says_how(vm):
    event = vm.run_until(reason="no such reason")
    assert event.what is What.END
    assert event.outcome.status == 1


def test_until_nothing_is_refused(vm):
    with pytest.raises(ValueError, match="until what"):
        vm.run_until()


def test_what_is_sent_reaches_the_guest():
    echo = "1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 1b; mov $0x3f8, %dx; in %dx, %al"
    end = "; inc %al; out %al, %dx; mov $0xf4, %dx; out %al, %dx; 2: hlt; jmp 2b"
    vm = Vm(assemble(".code16\n" + echo + end, 0x7C00).bytes, raw=0x7C00, memory=1 << 20)
    vm.send(b"A")
    assert vm.run(20).status == ord("B") << 1 | 1
    assert vm.serial == b"B"


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="cannot read"):
        Vm(tmp_path / "nothing")


# -- registers ---------------------------------------------------------------------------------


def test_every_register_of_l2_can_be_read_at_its_exit(vendor):
    vm = l2_vm(vendor, _marked(vendor))
    vm.run_until(level=2, to=1)
    l2 = vm.l2()
    assert (l2["r12"], l2["rsi"], l2["rax"]) == (0x1234, 0x5678, 0x9ABC)
    assert l2["cr3"] == l2["cr3"] & -4096 != 0
    assert set(l2.registers()) >= {"rax", "r15", "rip", "rsp", "rflags", "cr0", "cr4", "efer"}


def _marked(vendor):
    leave = "cpuid" if vendor == "vmx" else "vmmcall"
    return f"mov $0x1234, %r12d; mov $0x5678, %esi; mov $0x9abc, %eax; {leave}"


def test_a_register_written_into_the_running_l2_is_what_it_goes_on_with(vendor):
    body = "1: mov $0x80, %edx; out %al, %dx; mov %rbx, %rax; out %al, $0xe0; out %al, %dx"
    vm = l2_vm(vendor, body)
    vm.run_until(level=2, to=2, when=lambda t: "0x80" in t.detail)
    vm.l2()["rbx"] = 0x42
    event = vm.run_until(level=2, when=lambda t: "port 0xe0" in t.detail)
    assert event.what is What.TRANSITION
    assert vm.l2()["rax"] == 0x42


def test_rip_written_into_the_suspended_l2_is_where_it_goes_on(vendor):
    leave = "cpuid" if vendor == "vmx" else "vmmcall"
    vm = l2_vm(vendor, f"{leave}; out %al, $0xe0; 1: jmp 1b; 2: out %al, $0xe1; jmp 1b")
    vm.run_until(level=2, to=1)
    l2 = vm.l2()
    l2["rip"] += 4  # over OUT 0xe0 and the endless loop, less the length that L1 adds
    event = vm.run_until(level=2, when=lambda t: "port 0xe" in t.detail)
    assert "port 0xe1" in event.transition.detail


def test_l1_can_be_read_while_l2_runs(vm):
    vm.run_until(to=2)
    l1 = vm.l1()
    assert l1["rip"] != vm.l2()["rip"]
    assert l1["cr3"]
    assert l1.read_gva(l1["rip"], 4) == vm.read_hpa(l1["rip"], 4)


def test_a_register_that_nobody_holds_is_said_to_be_unknown(vm):
    vm.run_until(to=2)
    with pytest.raises(NotThere, match="not saved by hardware"):
        vm.l1()["r12"]


def test_an_unknown_register_name_is_a_key_error(vm):
    with pytest.raises(KeyError):
        vm.l1()["ebx"]


def test_l2_is_not_there_before_it_was_entered(vm):
    assert not vm.l2(1).exists
    with pytest.raises(NotThere, match="no L2"):
        vm.l2(1)["rip"]


def test_other_vcpus_can_be_looked_at_without_disturbing_the_run(vm):
    vm.run_until(to=2, vcpu=1)
    before = vm.current
    stacks = [vm.l1(index)["rsp"] for index in range(2)]
    assert len(set(stacks)) == 2
    assert vm.current == before
    assert vm.run(60).status == 1


# -- memory ------------------------------------------------------------------------------------


def test_l2_memory_is_found_by_every_kind_of_address(vm):
    vm.run_until(level=2, to=1, reason="cpuid")
    l2 = vm.l2()
    gpa = l2.to_gpa(l2["rip"])
    hpa = l2.to_hpa(gpa)
    assert l2.read_gva(l2["rip"], 2) == l2.read_gpa(gpa, 2) == vm.read_hpa(hpa, 2) == CPUID


def test_reading_leaves_no_mark_in_the_page_tables(vm):
    vm.run_until(level=2, to=1, reason="cpuid")
    memory = vm.machine.memory
    l2 = vm.l2()
    before = memory.read(0, 8 << 20)
    for gva in (l2["rip"], l2["rsp"], 0x40_0000, 0x7FF000):
        l2.read_gva(gva, 8)
    assert memory.read(0, 8 << 20) == before


def test_code_written_into_l2_is_what_it_executes(vendor):
    leave = "cpuid" if vendor == "vmx" else "vmmcall"
    vm = l2_vm(vendor, f"{leave}; .fill 64, 1, 0x90; 1: jmp 1b")
    vm.run_until(level=2, to=1)
    l2 = vm.l2()
    l2.write_gva(l2["rip"] + 8, b"\xe6\xe1")  # OUT 0xe1, AL
    event = vm.run_until(level=2, when=lambda t: "port 0xe1" in t.detail)
    assert event.what is What.TRANSITION


def test_an_address_that_nothing_maps_is_said_not_to_be_there(vm):
    vm.run_until(to=2)
    with pytest.raises(NotThere, match="not mapped"):
        vm.l2().to_gpa(1 << 46)


def test_what_l1s_nested_tables_do_not_map_is_not_there_for_l2(vendor):
    vm = l2_vm(vendor, _marked(vendor))
    vm.run_until(to=2)
    with pytest.raises(NotThere, match=r"0x7000000000"):
        vm.l2().to_hpa(0x70_0000_0000)


# -- exceptions --------------------------------------------------------------------------------

FAULTS = "ud2; out %al, $0xe1"


def test_an_exception_of_l2_is_seen_with_l2_as_it_was(vendor):
    vm = l2_vm(vendor, FAULTS)
    seen = []

    def on_exception(exception):
        seen.append((exception.vector, exception.error_code, exception.world["rip"]))
        code = exception.world.read_gva(exception.world["rip"], 2)
        assert code == b"\x0f\x0b"
        exception.world["rip"] += 2
        return Decision.SWALLOW

    vm.intercept([Vector.UD], on_exception)
    event = vm.run_until(level=2, when=lambda t: "port 0xe1" in t.detail)
    assert event.what is What.TRANSITION
    assert [vector for vector, _, _ in seen] == [Vector.UD]


def test_an_exception_that_is_passed_on_does_what_it_always_does(vendor):
    alone, watched = l2_vm(vendor, FAULTS), l2_vm(vendor, FAULTS)
    seen = []

    def on_exception(exception):
        seen.append(exception.vector)
        return Decision.PASS

    watched.intercept([Vector.UD], on_exception)
    ends = [vm.run(20) for vm in (alone, watched)]
    assert ends[0].ending is ends[1].ending
    assert ends[0].status == ends[1].status
    assert seen == [Vector.UD]


def test_a_page_fault_comes_with_its_address_and_can_be_repaired(vendor):
    vm = l2_vm(vendor, "mov $0x12345678000, %rbx; mov (%rbx), %rax; out %al, $0xe1")
    seen = []

    def on_exception(exception):
        seen.append((exception.address, exception.error_code))
        exception.world["rbx"] = 0x100000
        return Decision.SWALLOW

    vm.intercept([Vector.PF], on_exception)
    event = vm.run_until(level=2, when=lambda t: "port 0xe1" in t.detail)
    assert event.what is What.TRANSITION
    assert seen == [(0x123_4567_8000, 0)]


def test_instructions_that_only_the_silicon_lacks_are_no_exceptions():
    vm = l2_vm("vmx", "vmcall")
    seen = []
    vm.intercept([Vector.UD], lambda exception: seen.append(exception) or Decision.PASS)
    vm.run(20)
    assert seen == []


def test_exceptions_of_l1_are_not_shown(vm):
    seen = []

    def on_exception(exception):
        seen.append(exception.world.is_running)
        return Decision.PASS

    vm.intercept([Vector.UD, Vector.GP, Vector.PF], on_exception)
    assert vm.run(60).status == 1
    assert all(seen)


@pytest.mark.parametrize("vector", [Vector.NMI, Vector.BP, Vector.OF, 32])
def test_vectors_that_cannot_be_watched_are_refused(vm, vector):
    with pytest.raises(ValueError, match="cannot be watched"):
        vm.intercept([vector], lambda exception: Decision.PASS)
