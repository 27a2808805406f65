"""A session of broken entries on machines that are wrong, die or hang."""

from types import SimpleNamespace

import pytest

from undervisor.conformance.entries import session as module
from undervisor.conformance.entries.session import Result, Session
from undervisor.conformance.entries.trial import How, NotApplicable, Seen, Trial
from undervisor.errors import TimedOut
from undervisor.guest.probe.client import ProbeDied, ProbeSilent
from undervisor.targets import Abilities, End
from undervisor.targets import How as Ended

REFUSED, ENTERED = Seen(How.FAIL_VALID, 7), Seen(How.ENTERED, 18)
ABORT = Seen(How.ABORT, 1)


class Machine:
    """What a target starts: `does` maps a rule to what its broken entry does."""

    def __init__(self, does, job):
        self.does, self.cpus, self.entered = does, job.cpus, []
        self.gone = False

    def wait(self, timeout=None):
        if not self.gone:
            raise TimedOut("runs")
        return End(Ended.GUEST_DIED, self.gone)

    def __exit__(self, *_):
        self.gone = self.gone or "stopped"


class Target:
    name = "a target"

    def __init__(self, does, most_cpus=1):
        self.does, self.machines = does, []
        self.abilities = Abilities(most_cpus=most_cpus)

    def start(self, job):
        self.machines.append(Machine(self.does, job))
        return self.machines[-1]


class FakeProbe:
    def __init__(self, machine):
        self.machine = machine

    def wait_for_hello(self, timeout):
        pass

    def start_aps(self, numbers):
        assert len(numbers) < self.machine.cpus


class Entries:
    """A rule's name says its trial; a batch is a list of what to do."""

    rules = tuple("abcdef")

    def __init__(self, probe, processor):
        self.machine, self.processor = probe.machine, processor
        self.runner = SimpleNamespace(run=self.run)

    def trial(self, rule):
        if rule == "f":
            return NotApplicable("f", "it has no f")
        return Trial(rule, "long", {}, ABORT if rule == "e" else REFUSED)

    def unbroken(self, trial, batch):
        return self.ask(batch, f"unbroken {trial.rule}", ENTERED)

    def broken(self, trial, batch):
        return self.ask(batch, trial.rule, REFUSED)

    def ask(self, batch, name, usual):
        batch.requests.append(name)
        return lambda: self.machine.does.get(name, usual)

    def run(self, batch, timeout):
        for name in batch.requests:
            self.machine.entered.append(name)
            match self.machine.does.get(name):
                case "hangs":
                    raise ProbeSilent("no answer")
                case str(words):
                    self.machine.gone = words
                    raise ProbeDied("gone")

    def abort_indicator(self):
        return 1 if self.processor and self.machine.does.get("indicator") else 0


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setitem(module.VENDORS, "vmx", Entries)
    monkeypatch.setattr(module, "Probe", FakeProbe)
    monkeypatch.setattr(module, "_END_TIME", 0.0)


def run(does, rules="abcd", **options):
    target = Target(does, **options)
    with Session(target, "vmx") as session:
        rows = {row.rule: row for row in session.run(rules)}
    assert [machine.gone for machine in target.machines if not machine.gone] == []
    return rows, target.machines


def test_what_agrees_takes_one_machine():
    rows, machines = run({}, "abcdf")
    assert len(machines) == 1
    assert {row.result for rule, row in rows.items() if rule != "f"} == {Result.AGREES}
    assert (rows["f"].result, rows["f"].why) == (Result.NOT_APPLICABLE, "it has no f")


def test_nothing_is_believed_behind_an_entry_that_should_have_failed():
    rows, machines = run({"b": ENTERED})
    assert rows["b"].result is Result.DIFFERS
    assert rows["b"].seen == ENTERED
    assert len(machines) == 2
    assert machines[1].entered == ["unbroken c", "c", "unbroken d", "d"]


def test_the_entry_that_kills_the_machine_is_found():
    rows, machines = run({"b": "triple fault"})
    assert {r: row.result for r, row in rows.items()} == {
        "a": Result.AGREES, "b": Result.DIFFERS, "c": Result.AGREES, "d": Result.AGREES,
    }  # fmt: skip
    assert rows["b"].seen == Seen(How.DIED)
    assert rows["b"].seen.words == "triple fault"
    assert len(machines) == 3  # the batch, one by one, the rest


def test_the_entry_that_hangs_the_machine_is_found():
    rows, _ = run({"d": "hangs"})
    assert rows["d"].seen == Seen(How.SILENT)
    assert [rows[rule].result for rule in "abc"] == [Result.AGREES] * 3


def test_another_failure_than_the_rule_s_is_a_difference():
    rows, _ = run({"a": Seen(How.FAIL_VALID, 8), "c": Seen(How.FAILED_ENTRY, 33)})
    assert rows["a"].result is rows["c"].result is Result.DIFFERS


@pytest.mark.parametrize("before", [REFUSED, "triple fault"])
def test_an_unbroken_state_that_is_not_entered_says_nothing_of_the_rule(before):
    rows, _ = run({"unbroken b": before})
    assert rows["b"].result is Result.NOT_RUN
    assert "'long' is not entered" in rows["b"].why
    assert rows["c"].result is Result.AGREES


def test_an_abort_that_ends_the_machine_is_read_from_its_end():
    rows, machines = run({"e": "VMX abort 1: no such MSR"}, "ae")
    assert rows["e"].result is Result.AGREES
    assert len(machines) == 2


def test_an_abort_is_seen_by_the_other_processor():
    rows, machines = run({"e": "hangs", "indicator": 1}, "e", most_cpus=2)
    assert rows["e"].result is Result.AGREES
    assert machines[-1].cpus == 2


def test_a_processor_that_only_stops_has_not_aborted_as_the_manual_says():
    rows, _ = run({"e": "hangs"}, "e", most_cpus=2)
    assert rows["e"].result is Result.DIFFERS
    assert rows["e"].seen == Seen(How.SILENT)


def test_the_qualification_counts_and_the_words_do_not():
    failure = Seen(How.FAILED_ENTRY, 33, 3)
    assert failure != Seen(How.FAILED_ENTRY, 33)
    assert failure == Seen(How.FAILED_ENTRY, 33, 3, "more words")
    assert str(failure) == "VM-entry failure, exit reason 33, qualification 3"
