"""Every example of the guides is produced by the command that the documentation gives for it."""

import json
import re
import shlex

import pytest
from guide_examples import EXAMPLES, READ_ONLY, fragments, mapping, produce, says, somewhere
from lxml import etree
from machines import machine

from undervisor.cli.main import main
from undervisor.domains.cpu_features import VMX_NAMES
from undervisor.domains.schema import FILES, FOLDER, violations
from undervisor.host.fact import Absent, Known

ROWS = mapping()
KNOWN = ("vmx", "svm", "invtsc", "spec-ctrl", "amd-stibp", "xsave", *VMX_NAMES.values())


@pytest.fixture
def recording(tmp_path):
    return machine(tmp_path / "host", cores=8, known=KNOWN)


def test_the_table_and_the_examples_are_the_same_set():
    assert set(ROWS) == set(EXAMPLES) - READ_ONLY


@pytest.mark.parametrize("name", [n for n in ROWS if EXAMPLES[n].suffix == ".xml"])
def test_the_command_writes_the_xml(name, recording, capsys):
    text = produce(ROWS[name], recording, capsys)
    for wanted in fragments(EXAMPLES[name]):
        assert somewhere(etree.fromstring(text), wanted), text


@pytest.mark.parametrize("name", [n for n in ROWS if EXAMPLES[n].suffix == ".txt"])
def test_the_command_writes_the_command_line(name, recording, capsys):
    text = produce(ROWS[name], recording, capsys)
    wanted = shlex.split(EXAMPLES[name].read_text())
    # The extension is named even where -cpu host has it anyway.
    assert says(shlex.split(text.replace("\\\n", " ")), wanted) == []


@pytest.mark.parametrize("name", [n for n in ROWS if EXAMPLES[n].suffix == ".xml"])
def test_libvirts_schema_accepts_it(name, recording, capsys):
    text = produce(ROWS[name], recording, capsys)
    fact = violations(text, "network" if ROWS[name][0] == "network" else "domain")
    if isinstance(fact, Absent):
        pytest.skip(f"libvirt is not installed: {fact}")
    assert isinstance(fact, Known)
    assert fact.value == ()


def test_the_schema_refuses_what_is_none(tmp_path):
    text = "<domain type='kvm'><name>a</name><memory>1</memory><nonsense/></domain>"
    fact = violations(text, "domain")
    if isinstance(fact, Absent):
        pytest.skip(f"libvirt is not installed: {fact}")
    assert fact.value
    assert isinstance(violations(text, "domain", str(tmp_path)), Absent)
    assert FILES["domain"] in str(violations(text, "domain", str(tmp_path)))
    assert FOLDER.startswith("/usr/share")


def test_an_older_libvirt_gets_no_names_that_it_refuses(tmp_path, capsys):
    old = machine(tmp_path / "old")
    said = produce(ROWS["vmx-features"], old, capsys)
    assert "vmx-" not in said
    assert "'ept'" not in said
    assert 'name="vmx"' in said


def test_weakening_features_is_done_as_asked_and_told(recording, capsys):
    with pytest.raises(SystemExit):
        main([*ROWS["features-off"], "--recording", recording])
    said = capsys.readouterr().err
    assert re.search(r"spec-ctrl disabled.*\n\s+why: it weakens the guest", said)
    assert "invtsc disabled" not in said


def test_the_example_that_does_not_work_is_named_and_repaired(tmp_path, recording, capsys):
    path = tmp_path / "skylake.xml"
    cpu = EXAMPLES["skylake"].read_text()
    path.write_text(f"<domain type='kvm'><name>a</name><memory unit='GiB'>4</memory>{cpu}</domain>")
    with pytest.raises(SystemExit) as end:
        main(["guest", "diff", str(path), "--json", "--recording", recording])
    assert end.value.code == 1
    said = json.loads(capsys.readouterr().out)
    assert "domain-named-model" in {p["id"] for p in said["problems"]}
    assert "address-width" in {p["id"] for p in said["problems"]}
    repaired = etree.fromstring(said["xml"])
    assert repaired.find("cpu/feature[@name='vmx']").get("policy") == "require"
    assert any("vmx" in line and line.startswith("+") for line in said["diff"])
