"""Plans for recorded machines, and their application in throw-away roots."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.facts.kernel import modprobe_lines
from undervisor.host.facts.machine import gather
from undervisor.host.fixes import apply as applying
from undervisor.host.fixes.apply import JOURNAL, System, apply, undo, undo_plan
from undervisor.host.fixes.nested import OUR_FILE, plan_nested, plan_root
from undervisor.host.fixes.plan import Command, FileChange, Plan

HOSTS = Path(__file__).parent.parent.parent / "hosts"


def plan_for(name, on=True, **options):
    host = RecordedHost(str(HOSTS / name))
    return plan_nested(host, gather(host), on, **options)


def effective(root, module="kvm_intel"):
    """What modprobe's configuration in `root` gives the module, the last word of a name counts."""
    words = {}
    for line in modprobe_lines(LiveHost(str(root))):
        if line.verb == "options" and line.module == module:
            words |= dict(word.partition("=")[::2] for word in line.words)
    return words


def quiet(line):
    pass


@pytest.fixture
def root(tmp_path):
    """A root with configuration that contradicts itself."""
    folder = tmp_path / "root" / "etc" / "modprobe.d"
    folder.mkdir(parents=True)
    (folder / "kvm.conf").write_text("# by hand\noptions kvm_intel nested=1 ept=1\n")
    (folder / "zzz.conf").write_text("options kvm-intel nested=0\noptions kvm ignore_msrs=1\n")
    (folder / "other.conf").write_text("options snd index=1\n")
    return tmp_path / "root"


def tree(root):
    return {
        str(path.relative_to(root)): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "var/lib/undervisor" not in str(path)
    }


def test_the_module_is_unloaded_and_loaded_in_order():
    plan = plan_for("intel-nested-off")
    assert [c.argv for c in plan.commands] == [
        ("modprobe", "-r", "kvm_intel"),
        ("modprobe", "kvm_intel", "nested=1"),
    ]
    assert plan.commands[-1].rescue == ("modprobe", "kvm_intel")


def test_what_is_on_already_is_not_reloaded():
    assert plan_for("intel-bare-metal").commands == ()


def test_on_s390x_huge_pages_go_off_with_it():
    plan = plan_for("s390x-hpage")
    assert plan.commands[-1].argv == ("modprobe", "kvm", "nested=1", "hpage=0")
    assert "hpage=0" in plan.changes[0].after


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wsl2-nested-off", ".wslconfig"),
        ("container-without-device", "container"),
        ("amd-l1-host-model", "no svm"),
        ("intel-module-missing", "not part of this kernel"),
        ("arm64-bare-metal", "aarch64"),
        ("software-kvm", "no svm"),
        ("unreadable", "not a parameter"),
    ],
)
def test_a_machine_where_it_makes_no_sense_is_refused_with_the_reason(name, words):
    plan = plan_for(name)
    assert words in plan.refusal
    assert plan.empty


def test_running_guests_are_listed_and_refuse_the_reload():
    plan = plan_for("intel-l1-soft-lockups", on=False)
    assert "slow" not in plan.refusal  # it runs emulated and holds nothing
    host = RecordedHost(str(HOSTS / "intel-nested-off"))
    machine = gather(host)
    import dataclasses

    from undervisor.host.fact import Known
    from undervisor.host.facts.software import Guest

    guests = Known((Guest(12, "database", "host", True, True),))
    busy = dataclasses.replace(
        machine, software=dataclasses.replace(machine.software, guests=guests)
    )
    plan = plan_nested(host, busy, True)
    assert "database (pid 12)" in plan.refusal
    later = plan_nested(host, busy, True, now=False)
    assert not later.refusal
    assert later.restart
    assert later.changes


def test_a_built_in_module_needs_the_command_line_and_a_restart(tmp_path):
    folder = tmp_path / "machine"
    shutil.copytree(HOSTS / "intel-built-in-nested-off", folder)
    grub = folder / "files/etc/default/grub"
    grub.parent.mkdir(parents=True)
    grub.write_text('GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\n'
                    'GRUB_CMDLINE_LINUX="rw kvm-intel.nested=0 nosmt"\n')  # fmt: skip
    host = RecordedHost(str(folder))
    plan = plan_nested(host, gather(host), True)
    assert 'GRUB_CMDLINE_LINUX="rw nosmt kvm_intel.nested=1"' in plan.changes[0].after
    assert "GRUB_TIMEOUT=5" in plan.changes[0].after
    assert plan.restart


@pytest.mark.parametrize(
    ("files", "command", "words"),
    [
        ({"usr/sbin/grubby": "", "etc/default/grub": ""}, "grubby", ""),
        ({"etc/default/grub": "", "usr/sbin/update-grub": ""}, "update-grub",
         'GRUB_CMDLINE_LINUX="kvm_intel.nested=1"'),
        ({"etc/kernel/cmdline": "rw kvm-intel.nested=0 quiet\n", "usr/bin/kernel-install": ""},
         "kernel-install", "rw quiet kvm_intel.nested=1"),
    ],
)  # fmt: skip
def test_each_boot_loader_has_its_way(tmp_path, files, command, words):
    folder = tmp_path / "machine"
    shutil.copytree(HOSTS / "intel-built-in-nested-off", folder)
    for name, text in files.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_text(text)
    host = RecordedHost(str(folder))
    plan = plan_nested(host, gather(host), True)
    assert plan.commands[0].argv[0] == command
    assert words in "".join(change.after for change in plan.changes)
    assert plan.restart


def test_contrary_words_go_and_ours_is_the_last(root):
    system = System(str(root))
    before = tree(root)
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), system, quiet)
    assert effective(root) == {"ept": "1", "nested": "1"}
    assert effective(root, "kvm") == {"ignore_msrs": "1"}
    assert tree(root)["etc/modprobe.d/other.conf"] == before["etc/modprobe.d/other.conf"]
    assert "# by hand" in tree(root)["etc/modprobe.d/kvm.conf"]


def test_applying_twice_changes_nothing_the_second_time(root):
    system = System(str(root))
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), system, quiet)
    after = tree(root)
    again = plan_root(LiveHost(str(root)), "kvm_intel", True)
    assert again.empty
    apply(again, system, quiet)
    assert tree(root) == after


def test_undo_gives_back_every_file(root):
    system = System(str(root))
    before = tree(root)
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), system, quiet)
    apply(plan_root(LiveHost(str(root)), "kvm_intel", False), system, quiet)
    assert effective(root)["nested"] == "0"
    undo(system, quiet)
    assert tree(root) == before
    assert undo_plan(system).empty


def test_undo_refuses_where_somebody_changed_a_file_since(root):
    system = System(str(root))
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), system, quiet)
    (root / OUR_FILE.lstrip("/")).write_text("options kvm_intel nested=1 # mine\n")
    assert OUR_FILE in undo(system, quiet).refusal
    assert "mine" in (root / OUR_FILE.lstrip("/")).read_text()


def test_a_file_that_changed_since_the_plan_is_not_overwritten(root):
    plan = plan_root(LiveHost(str(root)), "kvm_intel", True)
    (root / "etc/modprobe.d/kvm.conf").write_text("options kvm_intel nested=0\n")
    with pytest.raises(BadInput, match="changed meanwhile"):
        apply(plan, System(str(root)), quiet)
    assert not (root / OUR_FILE.lstrip("/")).exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(40))
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new_state(root, monkeypatch, moment):
    """Every call that changes the disk is a moment; what modprobe sees is old or new, and
    applying again finishes the work, and undo gives the old files back."""
    before, old = tree(root), effective(root)["nested"]
    plan = plan_root(LiveHost(str(root)), "kvm_intel", True)
    count = 0

    def dying(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == moment:
                raise Killed
            count += 1
            return call(*args, **kwargs)

        return wrapped

    for name in ("open", "rename", "fsync", "unlink", "makedirs", "fchmod"):
        monkeypatch.setattr(applying.os, name, dying(getattr(os, name)))
    try:
        apply(plan, System(str(root)), quiet)
    except Killed:
        pass
    else:
        assert count <= moment
    monkeypatch.undo()
    assert effective(root)["nested"] in (old, "1")
    system = System(str(root))
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), system, quiet)
    assert effective(root)["nested"] == "1"
    undo(system, quiet)
    left = {name: text for name, text in tree(root).items() if "undervisor-new" not in name}
    assert left == before


def test_a_process_that_is_killed_for_real_leaves_the_old_or_the_new_state(root, tmp_path):
    script = (
        "import sys\nfrom undervisor.host.access.live import LiveHost\n"
        "from undervisor.host.fixes.apply import System, apply\n"
        "from undervisor.host.fixes.nested import plan_root\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    for on in (True, False):\n"
        f"        plan = plan_root(LiveHost({str(root)!r}), 'kvm_intel', on)\n"
        f"        apply(plan, System({str(root)!r}), lambda line: None)\n"
    )
    for wait in (0.0, 0.004, 0.009, 0.017, 0.023):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert effective(root)["nested"] in ("0", "1")
        assert effective(root)["ept"] == "1"
        assert effective(root, "kvm") == {"ignore_msrs": "1"}


def test_a_failing_command_is_rescued_and_told(root):
    (root / "x").mkdir()
    plan = Plan("t", commands=(Command(("false",), "why", rescue=("true",)),))
    said = []
    with pytest.raises(BadInput, match="false failed"):
        apply(plan, System("/"), said.append)
    assert said == ["rescue: true"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [{}]}', "[" * 99999, '{"files": 3}'])
def test_a_damaged_journal_is_bad_input(root, text):
    path = root / JOURNAL.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(BadInput, match="damaged"):
        undo_plan(System(str(root)))


def test_a_journal_that_climbs_out_is_refused(root, tmp_path):
    (tmp_path / "victim").write_text("keep")
    (root / "etc/out").symlink_to(tmp_path)
    system = System(str(root))
    entry = {"path": "/etc/out/victim", "before": None, "after": "keep", "after_it": []}
    path = root / JOURNAL.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 1, "files": [entry]}))
    with pytest.raises(BadInput, match="leads out"):
        undo(system, quiet)
    assert (tmp_path / "victim").read_text() == "keep"


def test_a_link_in_the_configuration_that_leads_out_is_not_followed(root, tmp_path):
    (tmp_path / "victim").write_text("keep")
    (root / OUR_FILE.lstrip("/")).symlink_to(tmp_path / "victim")
    change = FileChange(OUR_FILE, "keep", "new", "why")
    with pytest.raises(BadInput, match="leads out"):
        apply(Plan("t", (change,)), System(str(root)), quiet)
    assert (tmp_path / "victim").read_text() == "keep"


@pytest.mark.skipif(not shutil.which("modprobe", path="/usr/sbin:/sbin"), reason="needs kmod")
def test_the_real_modprobe_reads_it_as_meant(root):
    apply(plan_root(LiveHost(str(root)), "kvm_intel", True), System(str(root)), quiet)
    said = subprocess.run(
        [shutil.which("modprobe", path="/usr/sbin:/sbin"), "--showconfig", "-C",
         str(root / "etc/modprobe.d")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    options = [line for line in said.splitlines() if line.startswith("options kvm_intel ")]
    words = dict(word.partition("=")[::2] for line in options for word in line.split()[2:])
    assert words == {"ept": "1", "nested": "1"}
