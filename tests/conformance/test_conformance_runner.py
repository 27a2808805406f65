"""The runner: every end of a test is a verdict within its time, and the next test runs."""

import threading
import time

import conformance_targets as machines
import pytest
from conformance_targets import Misbehaving

from undervisor.conformance import runner, suite
from undervisor.conformance.expect import Broken, Lacking
from undervisor.conformance.prelude import Earlier, TestsProbe
from undervisor.conformance.runner import Verdict, run_all, run_test
from undervisor.conformance.suite import GuestTest, Need
from undervisor.errors import BadInput
from undervisor.guest.probe.client import Batch
from undervisor.targets import End, How
from undervisor.targets.builtin import BuiltinTarget

LIMIT = 1.0
ASPECTS = (
    "instructions",
    "controls",
    "entry",
    "control_registers",
    "exits",
    "events",
    "paging",
    "tlb",
    "timers",
    "apic",
    "msr",
    "processors",
    "state",
)


def made(function, **more):
    return GuestTest("vmx.here.it", "vmx", "here", "A claim.", ("SDM: X",), function, **more)


def nothing(lab):
    pass


@pytest.fixture(scope="module")
def builtin():
    return BuiltinTarget("intel")


class TestTargetsThatMisbehave:
    @pytest.mark.parametrize(
        ("script", "end", "verdict", "words"),
        [
            (machines.is_silent, None, Verdict.TIMED_OUT, "no answer in"),
            (machines.says_hello_and_hangs, None, Verdict.TIMED_OUT, "no answer in"),
            (machines.trickles, None, Verdict.TIMED_OUT, "no answer in"),
            (machines.sends_half_a_message, None, Verdict.TIMED_OUT, "no answer in"),
            (machines.floods, None, Verdict.GUEST_DIED, "rubbish"),
            (machines.speaks_rubbish, None, Verdict.GUEST_DIED, "no bootable device"),
            (machines.starts_again, None, Verdict.GUEST_DIED, "started again"),
            (
                machines.dies_at_once,
                End(How.TARGET_DIED, "it died of SIGSEGV", report="last words"),
                Verdict.TARGET_DIED,
                "SIGSEGV",
            ),
            (
                machines.dies_at_the_first_request,
                End(How.GUEST_DIED, "a triple fault", report="RIP 0"),
                Verdict.GUEST_DIED,
                "a triple fault",
            ),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_is_said_within_the_limit(self, script, end, verdict, words):
        target = Misbehaving(script, end or End(How.STOPPED, ""))
        begin = time.monotonic()
        result = run_test(made(nothing, seconds=LIMIT), target)
        assert time.monotonic() - begin < LIMIT + 3
        assert result.verdict is verdict
        assert words in result.message
        assert result.details == (end.report if end else "")

    def test_and_the_next_test_runs(self, builtin):
        class Changing(Misbehaving):
            def start(self, job):
                return builtin.start(job) if self.started else super().start(job)

        target = Changing(machines.is_silent, at_once=1)
        results = run_all([made(nothing, seconds=LIMIT), made(nothing)], target)
        assert [result.verdict for result in results] == [Verdict.TIMED_OUT, Verdict.PASSED]

    def test_a_target_that_cannot_start_is_said(self):
        class Absent(Misbehaving):
            def start(self, job):
                raise BadInput("no such program", hint="apt install it")

        result = run_test(made(nothing), Absent(machines.is_silent))
        assert (result.verdict, result.message) == (Verdict.TARGET_DIED, "no such program")
        assert result.details == "apt install it"


class TestVerdicts:
    @pytest.mark.parametrize(
        ("raised", "verdict"),
        [
            (Broken("EXITINFO1: 1, must be 2"), Verdict.FAILED),
            (Lacking("no such control"), Verdict.SKIPPED),
            (ZeroDivisionError("oh"), Verdict.ERROR),
        ],
    )
    def test_what_a_test_raises_decides(self, builtin, raised, verdict):
        def raises(lab):
            raise raised

        result = run_test(made(raises), builtin)
        assert result.verdict is verdict
        assert str(raised) in result.message
        assert ("Traceback" in result.details) == (verdict is Verdict.ERROR)

    def test_a_triple_fault_of_l1_is_the_guests_death(self, builtin):
        def dies(lab):
            lab.call("push $0; push $0; lidt (%rsp); ud2")

        result = run_test(made(dies), builtin)
        assert result.verdict is Verdict.GUEST_DIED
        assert "triple fault" in result.message

    def test_a_value_that_is_not_there_fails_the_test(self, builtin):
        def reads(lab):
            return lab.l1.rdmsr(0x12345678).value

        result = run_test(made(reads), builtin)
        assert result.verdict is Verdict.FAILED
        assert "exception 13" in result.message

    def test_a_guest_that_never_ends_times_out(self, builtin):
        result = run_test(made(lambda lab: lab.call("1: jmp 1b"), seconds=LIMIT), builtin)
        assert result.verdict is Verdict.TIMED_OUT

    def test_the_time_of_a_slow_target_is_longer(self):
        target = Misbehaving(machines.is_silent, patience=2.0)
        result = run_test(made(nothing, seconds=0.3), target)
        assert 0.6 <= result.seconds < 3
        assert "limit 0.6 s" in result.message


class TestSkips:
    def test_a_vendor_that_the_target_lacks(self, builtin):
        result = run_test(GuestTest("svm.a.b", "svm", "a", "t", ("r",), nothing), builtin)
        assert (result.verdict, result.message) == (Verdict.SKIPPED, "the target has no svm")

    def test_processors_that_the_target_lacks(self, builtin):
        result = run_test(made(nothing, cpus=9), builtin)
        assert result.message == "needs 9 processors, the target has at most 8"

    def test_a_need_that_the_machine_does_not_meet(self, builtin):
        need = Need("a unicorn", lambda lab: False)
        result = run_test(made(nothing, needs=(need,)), builtin)
        assert (result.verdict, result.message) == (
            Verdict.SKIPPED,
            "the processor has not a unicorn",
        )


def test_results_come_in_the_order_of_the_tests(builtin):
    def slow(lab):
        time.sleep(0.5)

    tests = [made(slow), made(nothing), made(nothing)]
    seen = []
    results = run_all(tests, builtin, jobs=2, seen=seen.append)
    assert [r.test for r in results] == tests
    assert len(seen) == 3


def test_an_interrupt_leaves_no_machine_running():
    target = Misbehaving(machines.is_silent, at_once=3)

    def interrupted(result):
        raise KeyboardInterrupt

    quick = made(nothing, seconds=0.2)
    slow = made(nothing, seconds=25)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all([quick, slow, slow, slow, slow], target, jobs=3, seen=interrupted)
    assert time.monotonic() - begin < 8
    for machine in target.started:
        machine.thread.join(5)
        assert not machine.thread.is_alive()
    assert threading.active_count() < 20


def test_a_run_to_the_first_failure_ends_there(builtin):
    def fails(lab):
        raise Broken("wrong")

    tests = [made(nothing), made(fails), *[made(nothing)] * 50]
    results = run_all(tests, builtin, jobs=1, to_the_first=True)
    assert 2 <= len(results) < 10
    assert results[1].verdict is Verdict.FAILED


class TestSelection:
    def test_part_of_a_name(self):
        chosen = suite.select(["vmx.exits.cpuid"])
        assert chosen
        assert all(test.id.startswith("vmx.exits.cpuid") for test in chosen)

    def test_a_pattern(self):
        assert {t.vendor for t in suite.select(["svm.*"])} == {"svm"}

    def test_what_matches_nothing_is_told(self):
        with pytest.raises(BadInput, match="no test matches 'nonsense'"):
            suite.select(["vmx.", "nonsense"])

    def test_all_without_a_pattern(self):
        assert suite.select() == suite.all_tests()


class TestDeclarations:
    def test_every_test_names_its_sections_and_claims_something(self):
        for test in suite.all_tests():
            assert all(ref.startswith(("SDM: ", "APM: ")) for ref in test.refs), test.id
            assert test.title.endswith("."), test.id

    def test_no_two_tests_have_the_same_name(self):
        names = [test.id for test in suite.all_tests()]
        assert len(names) == len(set(names))

    def test_the_vendors_have_the_same_aspects(self):
        for test in suite.all_tests():
            assert test.aspect.startswith(ASPECTS), test.id
        for aspect in ASPECTS:
            mine = [t for t in suite.all_tests() if t.aspect.startswith(aspect)]
            assert {t.vendor for t in mine} == {"vmx", "svm"}, aspect

    def test_there_are_enough_of_both(self):
        tests = suite.all_tests()
        for vendor in suite.VENDORS:
            assert sum(test.vendor == vendor for test in tests) >= 80
        assert len(tests) >= 160

    def test_a_test_without_a_claim_is_refused(self):
        with pytest.raises(TypeError, match="names its sections"):
            suite.guest_test("SDM: X")(type(self).test_a_test_without_a_claim_is_refused)


class TestTheLabsOfCopies:
    """The third test on a target of copies begins where the second one's lab was on."""

    @pytest.mark.parametrize(
        ("cpu", "vendor", "code"), [("intel", "vmx", "vmcall"), ("amd", "svm", "vmmcall")]
    )
    def test_are_on_at_once_and_like_the_first(self, cpu, vendor, code):
        target, earlier, sent = BuiltinTarget(cpu), Earlier(), []

        def looks(lab):
            sent.append(len(lab.probe.sent) - len(earlier.preludes.get(vendor, b"")))
            lab.run(f"mov $5, %ebx; {code}").ends()

        test = GuestTest(f"{vendor}.here.it", vendor, "here", "t", ("r",), looks)
        results = [run_test(test, target, earlier) for _ in range(4)]
        assert [(r.verdict, r.message) for r in results] == [(Verdict.PASSED, "")] * 4
        assert sent[0] > 0
        assert sent[1:] == [0, 0, 0]

    def test_that_ask_for_something_else_are_an_error(self):
        target, earlier = BuiltinTarget("intel"), Earlier()
        for _ in range(2):
            assert run_test(made(nothing), target, earlier).verdict is Verdict.PASSED
        prelude = earlier.preludes["vmx"]
        with target.start(runner._job(1, prelude)) as running:
            probe = TestsProbe(running, time.monotonic() + 20, prelude)
            probe.wait_for_hello()
            other = Batch()
            other.fill(0x600000, 8)
            with pytest.raises(AssertionError, match="asks for other things"):
                probe.run(other)
