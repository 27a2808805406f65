"""What a test says about a machine, and the words in which it is told that it was wrong."""

from importlib import resources

import pytest
from tiny_hypervisors import hypervisor

from undervisor.api import ExpectationFailed, Vm, What
from undervisor.errors import GuestDied, TimedOut

EXAMPLES = resources.files("undervisor") / "data" / "examples"
MEMORY = 32 << 20


def tiny(name, cpu="amd"):
    return Vm(hypervisor(name), cpu=cpu, memory=MEMORY)


@pytest.fixture
def example():
    return Vm(EXAMPLES / "vmx.elf", cpu="intel", cpus=2)


def test_what_is_expected_is_waited_for_and_not_found_twice(example):
    example.expect("processors 2")
    example.expect(b"cpu 0:")
    with pytest.raises(ExpectationFailed, match="'cpu 0:' was not printed: the guest ended"):
        example.expect("cpu 0:")


def test_text_that_came_together_with_what_was_waited_for_is_found_as_well():
    vm = tiny("says")
    vm.run()
    vm.expect("hel")
    vm.expect("lo")


def test_a_text_that_does_not_come_is_told_with_the_last_that_was_printed():
    with pytest.raises(ExpectationFailed, match=r"0\.2 s have passed.*\n.*'hello"):
        tiny("hangs").expect("goodbye", timeout=0.2)


def test_a_guest_that_printed_nothing_is_told_so():
    with pytest.raises(ExpectationFailed, match="nothing at all"):
        tiny("svm").expect("anything")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("dies", GuestDied, "triple fault"),
        ("waits", GuestDied, "every processor waits"),
        ("hangs", TimedOut, "still runs"),
    ],
)
def test_an_end_that_the_guest_did_not_ask_for_is_an_error(name, error, words):
    with pytest.raises(error, match=words):
        tiny(name).run(0.3, check=True)


def test_a_run_that_the_guest_ended_is_no_error():
    assert tiny("says").run(10, check=True).status == 7


def test_an_event_that_does_not_come_is_an_error_if_that_is_wanted(example):
    with pytest.raises(ExpectationFailed, match="level=2, reason=xsetbv did not come: the guest"):
        example.run_until(level=2, reason="xsetbv", check=True)


def test_exits_are_kept_and_counted(example):
    example.run(60)
    entries = example.exits(level=1, to=2, vcpu=1)
    assert len(entries) == example.count(level=1, to=2, vcpu=1) > 0
    assert {t.reason for t in entries} == {"VMLAUNCH", "VMRESUME"}
    assert example.count() == sum(example.counts().values()) >= len(example.exits())
    assert example.count(level=2, reason="cpuid") == len(example.exits(level=2, reason="CPUID"))


def test_the_number_of_exits_is_asserted(example):
    example.run(60)
    example.assert_exits(reason="cpuid", to=1)
    with pytest.raises(ExpectationFailed) as failed:
        example.assert_exits(reason="xsetbv")
    text = str(failed.value)
    assert text.startswith("0 exits with level=2, reason=xsetbv, not at least 1; there were ")
    assert "CPUID L2->L1 (" in text
    with pytest.raises(ExpectationFailed, match="not 1 to 2"):
        example.assert_exits(to=1, at_most=2)


def test_processors_that_entered_no_l2_are_named(example):
    example.run_until(to=2, vcpu=0)
    example.assert_entered_l2([0])
    with pytest.raises(ExpectationFailed, match="no L2 was entered on vCPU 1"):
        example.assert_entered_l2([0, 1])


# -- entries that fail -------------------------------------------------------------------------


def test_a_good_run_has_no_failed_entries(example):
    assert example.run(60).status == 1
    example.assert_no_failed_entries()


def test_every_rule_that_vmrun_found_broken_is_told():
    vm = tiny("svm")
    vm.run(10)
    [failed] = vm.history.failed
    assert {"svm.asid.zero", "svm.intercept.vmrun", "svm.efer.svme"} <= set(failed.rules)
    with pytest.raises(ExpectationFailed) as error:
        vm.assert_no_failed_entries()
    text = str(error.value)
    assert text.startswith("a VM entry failed\nVMRUN on vCPU 0 at rip 0x1000")
    assert "svm.asid.zero: The guest's ASID must not be 0" in text
    assert "GUEST_ASID = 0x0" in text
    assert "→ " in text
    assert "APM, Canonicalization and Consistency Checks" in text


def test_vmlaunch_without_a_vmcs_is_a_failed_entry():
    vm = tiny("vmx", "intel")
    vm.run(10)
    with pytest.raises(ExpectationFailed, match="VMfailInvalid: there was no current VMCS"):
        vm.assert_no_failed_entries()


def test_invalid_guest_state_is_told_with_its_rule_and_value(example):
    example.run_until(level=2, to=1, reason="cpuid", check=True)
    example.l2()["rflags"] = 0  # bit 1 must be 1
    example.l2()["cr3"] = 1 << 60
    example.run(60)
    failed = example.history.failed[0]
    assert failed.how.startswith("exit reason 0x80000021: ENTRY_FAILURE_INVALID_GUEST_STATE")
    assert {"vmx.guest.rflags.bit-1", "vmx.guest.cr3.width"} <= set(failed.rules)
    assert "GUEST_RFLAGS = 0x0" in str(failed)


def test_run_until_finds_serial_output_that_is_already_there():
    vm = tiny("says")
    vm.run(10)
    assert vm.run_until(serial="ello").what is What.SERIAL
