import contextlib
import json
import types

import pytest

from undervisor.cli import exits
from undervisor.cli.main import main

TRACE = """cpus=2
 CPU 0/KVM-4121  [002]  1234.500010: kvm_exit: vcpu 0 reason VMRESUME rip 0x1000 info1 0x0
 CPU 0/KVM-4121  [002]  1234.500040: kvm_nested_vmenter: rip: 0x1000 vmcs: 0x1234000
 CPU 0/KVM-4121  [002]  1234.500050: kvm_entry: vcpu 0, rip 0xfff0
 CPU 0/KVM-4121  [002]  1234.500060: kvm_exit: vcpu 0 reason CPUID rip 0xfff0 info1 0x0
 CPU 0/KVM-4121  [002]  1234.500061: kvm_nested_vmexit: vcpu 0 reason CPUID rip 0xfff0
 CPU 0/KVM-4121  [002]  1234.500062: kvm_nested_vmexit_inject: reason: CPUID ext_inf1: 0x0
"""


def run(*words):
    with pytest.raises(SystemExit) as end:
        main(["exits", *map(str, words)])
    return end.value.code or 0


def test_a_trace_becomes_json(tmp_path, capsys):
    (tmp_path / "trace.txt").write_text(TRACE)
    assert run(tmp_path / "trace.txt", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["totals"] == {"l1": 1, "l2_to_l0": 0, "l2_to_l1": 1, "made_up": 0, "unknown": 0}


def test_a_trace_becomes_a_table(tmp_path, capsys):
    (tmp_path / "trace.txt").write_text(TRACE)
    assert run(tmp_path / "trace.txt") == 0
    assert "VMRESUME" in capsys.readouterr().out


def test_what_is_traced_live_ends_as_one_table(monkeypatch, capsys):
    """Also on another machine, and no nested event means that no L2 ran."""

    @contextlib.contextmanager
    def instance(host, folder, seconds):
        assert (host.name, folder, seconds) == ("there", "/tracing", 2.0)
        yield "/tracing/instances/x"

    lines = [line for line in TRACE.splitlines() if "nested" not in line]
    there = types.SimpleNamespace(name="there", close=lambda: None)
    monkeypatch.setattr(exits, "open_host", lambda **said: there)
    monkeypatch.setattr(exits.remote, "tracefs", lambda host: "/tracing")
    monkeypatch.setattr(exits.remote, "instance", instance)
    monkeypatch.setattr(exits.remote, "lines", lambda *_: (part for part in (lines[:2], lines[2:])))
    assert run("--host", "there", "--seconds", "2") == 0
    said = capsys.readouterr().out
    assert said.count("VMRESUME") == 1
    assert "unknown" not in said
    assert run("--host", "there", "--seconds", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["totals"]["l1"] == 2


@pytest.mark.parametrize("raw", [b"", b"tracing\0\0", b"\xff" * 100_000, b"hello\n"])
def test_a_file_without_events_is_bad_input(tmp_path, capsys, raw):
    (tmp_path / "trace.dat").write_bytes(raw)
    assert run(tmp_path / "trace.dat") == 2
    assert "no KVM event" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["/no/such"], ["--seconds", "0"], ["--seconds", "-1"], ["trace.txt", "--host", "there"]],
)
def test_bad_options_are_bad_input(words):
    assert run(*words) == 2
