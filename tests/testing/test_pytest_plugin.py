"""The pytest plugin as somebody's own suite uses it: what passes, what fails, what is attached."""

import multiprocessing.forkserver
import os
import re
import subprocess
import sys

import pytest
from tiny_hypervisors import BODIES, hypervisor

import undervisor.api
from undervisor.testing import fixture, remote, report

pytest_plugins = ["pytester"]

# What the suites that run inside this process import is forgotten after each, but for this: one
# server of machines serves them all, and a library in Rust can be loaded only once.
KEPT = (undervisor.api, multiprocessing.forkserver, fixture, remote, report)

EXAMPLES = """
    from importlib import resources
    EXAMPLES = resources.files("undervisor") / "data" / "examples"
"""


@pytest.fixture
def suite(pytester):
    """`suite(source, *options)`: run a suite that has the tiny hypervisors beside it."""
    for name in BODIES:
        (pytester.path / f"{name}.elf").write_bytes(hypervisor(name))

    def run(source, *options):
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    return run


def attached(result, title):
    """The text of a report's section."""
    text = result.stdout.str()
    found = re.search(
        rf"-+ undervisor: {re.escape(title)} -+\n(.*?)(?:\n[-=_]{{9,}}|\Z)", text, re.S
    )
    assert found, text
    return found[1]


# -- what passes -------------------------------------------------------------------------------


def test_a_hypervisor_is_booted_run_and_looked_into(suite):
    result = suite(
        EXAMPLES
        + """
    def test_it(undervisor):
        vm = undervisor.boot(EXAMPLES / "vmx.elf", cpu="intel", cpus=2)
        event = vm.run_until(level=2, to=1, reason="cpuid")
        l1, l2 = vm.l1(), vm.l2()
        assert l2["rip"] == event.transition.rip
        assert l2.read_gva(l2["rip"], 2) == b"\\x0f\\xa2"
        hpa = l2.to_hpa(l2.to_gpa(l2["rip"]))
        assert vm.read_hpa(hpa, 2) == l2.read_gpa(l2.to_gpa(l2["rip"]), 2)
        assert l1.is_running and not l2.is_running and l2.exists
        assert l1.registers()["rip"] == l1["rip"] != l2["rip"]
        vm.expect("cpu 1:")
        assert vm.run().status == 1
        assert vm.serial.endswith(b"passed\\n")
        vm.assert_no_failed_entries()
        vm.assert_entered_l2([0, 1])
        vm.assert_exits(level=2, to=1, reason="cpuid", at_least=2)
        assert vm.now > 0
    """
    )
    result.assert_outcomes(passed=1)


def test_memory_and_registers_are_written(suite):
    result = suite("""
    def test_it(undervisor):
        vm = undervisor.boot("hangs.elf", cpu="amd")
        vm.expect("hello")
        vm.write_hpa(0x300000, b"abc")
        assert vm.l1().read_gpa(0x300000, 3) == b"abc"
        vm.l1().write_gpa(0x300001, b"B")
        assert vm.read_hpa(0x300000, 3) == b"aBc"
        vm.l1()["rbx"] = 0x1234
        assert vm.l1()["rbx"] == 0x1234
        vm.l1()["rip"] += 2
        vm.write_hpa(vm.l1()["rip"], bytes.fromhex("b003e6f4"))
        assert vm.run().status == 7
    """)
    result.assert_outcomes(passed=1)


def test_predicates_and_exceptions_are_decided_in_the_test(suite):
    result = suite(
        EXAMPLES
        + """
    from undervisor.api import Decision
    def test_it(undervisor):
        vm = undervisor.boot(EXAMPLES / "svm.elf", cpu="amd")
        seen, raised = [], []
        def third(transition):
            seen.append(vm.l1()["rip"])
            return len(seen) == 3
        vm.run_until(third, to=2)
        assert len(seen) == 3
        def on_exception(exception):
            raised.append((exception.vector, exception.world["rip"]))
            return Decision.PASS
        vm.intercept([6], on_exception)
        assert vm.run().status == 1
        assert raised and all(vector == 6 for vector, _ in raised)
    """
    )
    result.assert_outcomes(passed=1)


def test_a_death_that_the_test_wants_to_see_is_an_outcome(suite):
    result = suite("""
    from undervisor.api import Outcome
    def test_it(undervisor):
        vm = undervisor.boot("dies.elf", cpu="amd")
        outcome = vm.run(check=False)
        assert outcome.ending.name == "TRIPLE_FAULT"
        vm = undervisor.boot("hangs.elf", cpu="amd")
        assert vm.run(0.2, check=False).ending.name == "TIMEOUT"
        vm.send("x")
        assert vm.run(0.2, check=False).ending.name == "TIMEOUT"
    """)
    result.assert_outcomes(passed=1)


# -- what fails, and what is attached ----------------------------------------------------------


def test_a_failed_entry_is_attached_with_its_rules_registers_and_trace(suite):
    result = suite(
        """
    def test_it(undervisor):
        vm = undervisor.boot("svm.elf", cpu="amd")
        vm.run()
        vm.assert_no_failed_entries()
    """,
        "--undervisor-last=2",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*ExpectationFailed: a VM entry failed", "E*svm.asid.zero:*"])
    text = attached(result, "svm.elf on amd, 1 cpu")
    parts = re.findall(r"^-- (.*) --$", text, re.M)
    assert parts == [
        "VM entries that failed",
        "registers",
        "the last 2 transitions",
        "no serial output",
    ]
    assert text.startswith("the guest ended the run")
    assert "svm.intercept.vmrun: " in text
    assert re.search(r"L1 on vCPU 0:\n +rax ", text)
    assert re.search(r"L1 -> L0 -> L1  VMRUN  .*#VMEXIT\(INVALID\)", text)


def test_the_failure_is_shown_in_the_test_not_inside_of_us(suite):
    result = suite("""
    def test_it(undervisor):
        vm = undervisor.boot("says.elf", cpu="amd")
        vm.expect("goodbye")
    """)
    result.stdout.fnmatch_lines(['>*vm.expect("goodbye")', "E*'goodbye' was not printed*"])
    result.stdout.no_fnmatch_line("*remote.py:*")


ENDS = {
    "dies": "GuestDied: triple fault",
    "waits": "GuestDied: every processor waits",
    "hangs": "TimedOut: the time limit of the test, 1 s, has passed",
    "floods": "TimedOut: the time limit of the test, 1 s, has passed",
}


def test_an_end_that_the_guest_did_not_ask_for_fails_in_words(suite):
    result = suite(
        """
    import pytest
    @pytest.mark.parametrize("name", ["dies", "waits", "hangs", "floods", "says"])
    def test_it(undervisor, name):
        undervisor.boot(f"{name}.elf", cpu="amd").run()
    """,
        "--undervisor-timeout=1",
    )
    result.assert_outcomes(failed=4, passed=1)
    for name, words in ENDS.items():
        result.stdout.fnmatch_lines([f"E*{words}*"])
        assert "-- registers --\nL1 on vCPU 0:" in attached(result, f"{name}.elf on amd, 1 cpu")


def test_a_crash_of_the_processor_library_is_a_failure_with_the_trace(suite):
    result = suite(
        EXAMPLES
        + """
    import os, signal
    def test_it(undervisor):
        vm = undervisor.boot(EXAMPLES / "vmx.elf", cpus=2)
        vm.run_until(level=2, reason="cpuid")
        os.kill(vm.pid, signal.SIGSEGV)
        vm.run()
    def test_the_next(undervisor):
        assert undervisor.boot("says.elf", cpu="amd").run().status == 7
    """
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["E*SiliconDied: the machine's process died: SIGSEGV*"])
    text = attached(result, "vmx.elf on intel, 2 cpus")
    assert "lost: the machine is gone" in text
    assert re.search(r"-- the last \d+ transitions --", text)
    assert re.search(r" VMWRITE .*\n +\.\.\. \d+ more \.\.\.\n.* VMWRITE ", text)
    assert "processors 2" in text


def test_a_crash_while_the_guest_runs_is_a_failure_too(suite):
    result = suite("""
    import os, signal, threading
    def test_it(undervisor):
        vm = undervisor.boot("hangs.elf", cpu="amd")
        threading.Timer(0.3, os.kill, (vm.pid, signal.SIGBUS)).start()
        vm.run()
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*SiliconDied: the machine's process died: SIGBUS*"])


def test_a_process_that_does_not_answer_is_ended_at_the_limit(suite, monkeypatch):
    monkeypatch.setattr(remote, "GRACE", 0.5)
    result = suite(
        """
    import os, signal
    def test_it(undervisor):
        vm = undervisor.boot("hangs.elf", cpu="amd")
        os.kill(vm.pid, signal.SIGSTOP)
        vm.run()
    """,
        "--undervisor-timeout=1",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*TimedOut: the time limit of the test*"])


def test_what_a_callback_raises_is_the_failure(suite):
    result = suite(
        EXAMPLES
        + """
    def test_it(undervisor):
        vm = undervisor.boot(EXAMPLES / "vmx.elf")
        def when(transition):
            assert transition.reason == "something else"
        vm.run_until(when)
    """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*AssertionError: assert *== 'something else'"])


def test_what_cannot_be_booted_is_told(suite):
    result = suite("""
    import pytest
    @pytest.mark.parametrize("image, options", [
        ("nothing.elf", {}), ("says.elf", {"cpu": "z80"}), ("says.elf", {"cpus": 99}), (b"?", {}),
    ])
    def test_it(undervisor, image, options):
        undervisor.boot(image, **options)
    """)
    result.assert_outcomes(failed=4)
    for words in ("cannot read /*nothing.elf", "*z80*", "99 processors*", "*image*"):
        result.stdout.fnmatch_lines([f"E*BadInput: {words}*"])


def test_everything_goes_to_files_where_that_is_asked(suite, pytester):
    result = suite(
        EXAMPLES
        + """
    def test_bad(undervisor):
        undervisor.boot("says.elf", cpu="amd").run()
        vm = undervisor.boot(EXAMPLES / "vmx.elf", cpus=2)
        vm.run()
        assert len(vm.exits()) == 0
    def test_good(undervisor):
        undervisor.boot("says.elf", cpu="amd").run()
    """,
        "--undervisor-trace=traces",
        "--undervisor-last=3",
        "--junit-xml=results.xml",
        "--show-capture=no",
    )
    result.assert_outcomes(failed=1, passed=1)
    folder = pytester.path / "traces"
    module = "test_everything_goes_to_files_where_that_is_asked.py"
    names = {path.name.removeprefix(f"{module}.") for path in folder.iterdir()}
    assert names == {
        "test_bad.report.txt",
        "test_bad.trace.txt",
        "test_bad.1.report.txt",
        "test_bad.1.trace.txt",
        "test_good.trace.txt",
    }
    trace = (folder / f"{module}.test_bad.1.trace.txt").read_text().splitlines()
    report = (folder / f"{module}.test_bad.1.report.txt").read_text()
    assert len(trace) > 1000
    assert trace[0] in report
    assert trace[-1] in report
    assert report.startswith("vmx.elf on intel, 2 cpus\nthe guest ended the run")
    assert attached(result, "vmx.elf on intel, 2 cpus").count("vCPU 0  L1") < 20
    assert "-- registers --" in (pytester.path / "results.xml").read_text()


def test_nothing_is_left_behind(suite, pytester):
    suite("""
    def test_it(undervisor):
        undervisor.boot("hangs.elf", cpu="amd").expect("hello")
        vm = undervisor.boot("says.elf", cpu="amd")
        with open("left", "w") as file:
            for vm in undervisor.vms:
                assert vm._folder.exists()
                print(vm._folder, vm.pid, file=file)
        vm.expect("goodbye")
    """).assert_outcomes(failed=1)
    lines = (pytester.path / "left").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        folder, pid = line.split()
        assert not os.path.exists(folder)
        assert not os.path.exists(f"/proc/{pid}")


# -- which machines ----------------------------------------------------------------------------

SHOWS = """
    def test_it(undervisor):
        vm = undervisor.boot("says.elf")
        print(vm.boot)
"""


def test_the_marker_says_what_the_machines_are_like(suite):
    result = suite(
        """
    import pytest
    @pytest.mark.undervisor(cpu="amd", cpus=3, memory=64 << 20, timeout=5)
    def test_it(undervisor):
        vm = undervisor.boot("says.elf")
        assert (vm.boot.cpu, vm.boot.cpus, vm.boot.memory) == ("amd", 3, 64 << 20)
        assert vm.run().status == 7
    """,
        "--strict-markers",
        "-v",
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*::test_it PASSED*"])


def test_a_list_in_the_marker_makes_a_test_of_each(suite):
    result = suite(
        """
    import pytest
    @pytest.mark.undervisor(cpu=["intel", "amd"])
    class TestThem:
        @pytest.mark.undervisor(cpus=[1, 2])
        def test_it(self, undervisor):
            vm = undervisor.boot("says.elf")
            assert vm.run().status == 7
    """,
        "-v",
    )
    result.assert_outcomes(passed=4)
    for name in ("intel-1cpu", "intel-2cpus", "amd-1cpu", "amd-2cpus"):
        result.stdout.fnmatch_lines([f"*::test_it?{name}? PASSED*"])


def test_models_come_from_the_command_line_or_the_ini_file(suite, pytester):
    pytester.makeini("[pytest]\nundervisor_cpu = amd\nundervisor_timeout = 7\n")
    result = suite(SHOWS, "-s")
    result.stdout.fnmatch_lines(["*says.elf on amd, 1 cpu"])
    options = ("--undervisor-cpu=intel", "--undervisor-cpu=intel-haswell")
    result = suite(SHOWS, "-s", "-v", *options)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*says.elf on intel, 1 cpu", "*says.elf on intel-haswell, 1 cpu"])


def test_a_wrong_marker_is_told(suite):
    result = suite("""
    import pytest
    @pytest.mark.undervisor(cpu="amd", speed=3)
    def test_it(undervisor):
        pass
    """)
    result.stdout.fnmatch_lines(["*undervisor takes cpu, cpus, memory, timeout by name, not speed"])
    assert result.ret != 0


# -- who does not use it -----------------------------------------------------------------------


def test_a_suite_without_the_fixture_imports_nothing_of_ours(pytester):
    pytester.makepyfile("""
    import sys
    def test_it():
        ours = {name for name in sys.modules if name.startswith("undervisor")}
        assert ours == {"undervisor", "undervisor.pytest_plugin"}
        assert not {"unicorn", "llvmlite", "iced_x86"} & set(sys.modules)
    """)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_plugin_is_installed_under_its_name():
    words = [sys.executable, "-m", "pytest", "--help", "-p", "no:undervisor"]
    without = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    with_it = subprocess.run(words[:-2], capture_output=True, text=True, check=True).stdout
    assert "--undervisor-cpu" in with_it
    assert "--undervisor-cpu" not in without
