import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from undervisor.cli.main import main

HOSTS = Path(__file__).parent.parent / "hosts"


def run(*words):
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, words)])
    return end.value.code or 0


def bundle(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def written(tmp_path, **levels):
    words = [word for name, host in levels.items() for word in (f"--{name}", host)]
    code = run(tmp_path / "r.zip", *words)
    return code, bundle(tmp_path / "r.zip")


def test_three_levels_in_one_go(tmp_path, capsys):
    code, files = written(
        tmp_path,
        l0=HOSTS / "intel-bare-metal",
        l1=HOSTS / "intel-l1-passthrough",
        l2=HOSTS / "intel-l1-without-ept",
    )
    said = json.loads(files["report/report.json"])
    assert code == 1  # the recordings hold no dmidecode
    assert "It is KVM on KVM." in said["statement"]
    assert [level["level"] for level in said["levels"]] == ["L0", "L1", "L2"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.zip"]
    assert "report/L1/cpuinfo.txt" in files
    assert {"L0/cpuinfo.txt", "L2/cpuinfo.txt"} <= set(said["files"])


def test_vulnerabilities_are_compared_between_the_levels(tmp_path):
    levels = {"l0": HOSTS / "amd-bare-metal", "l1": HOSTS / "intel-stable-4.19.78"}
    _, files = written(tmp_path, **levels)
    told = json.loads(files["report/report.json"])["vulnerabilities"]
    assert told["itlb_multihit"] == {"L0": "Not affected", "L1": "KVM: Vulnerable"}
    assert "meltdown" not in told
    assert "KVM: Vulnerable" in files["report/report.html"]


@pytest.mark.parametrize(
    ("l1", "l2", "sentence"),
    [
        ("tcg-l1", "intel-l1-passthrough", "NOT KVM on KVM"),
        ("intel-l1-passthrough", "tcg-l1", "NOT KVM on KVM"),
        ("intel-l1-passthrough", "vmware-l1", "not shown"),
        ("intel-l1-passthrough", None, "not shown"),
        ("intel-l1-soft-lockups", None, "NOT KVM on KVM"),
    ],
)
def test_kvm_or_tcg_is_stated(tmp_path, l1, l2, sentence):
    levels = {"l1": HOSTS / l1} | ({"l2": HOSTS / l2} if l2 else {})
    _, files = written(tmp_path, **levels)
    assert sentence in json.loads(files["report/report.json"])["statement"]


def test_what_is_missing_is_told_with_the_command(tmp_path, capsys):
    _, files = written(tmp_path, l1=HOSTS / "intel-l1-passthrough")
    missing = json.loads(files["report/report.json"])["missing"]
    told = {(gap["level"], gap["item"]): gap["get"] for gap in missing}
    assert told["L1", "dmidecode"] == "sudo dmidecode"
    assert "--l0" in told["L0", "everything"]
    assert "missing: L1 dmidecode" in capsys.readouterr().out


def test_ibm_z_has_its_own_items(tmp_path):
    _, files = written(tmp_path, l1=HOSTS / "s390x-lpar")
    assert "LPAR Number" in files["report/L1/sysinfo.txt"]
    items = {gap["item"] for gap in json.loads(files["report/report.json"])["missing"]}
    assert "dmidecode" not in items


@pytest.fixture
def telling(tmp_path):
    """A machine that tells secrets everywhere, and HTML with them."""
    folder = tmp_path / "telling"
    shutil.copytree(HOSTS / "intel-l1-soft-lockups", folder)
    said = json.loads((folder / "machine.json").read_text())
    for command in said["commands"]:
        if command["argv"][0] == "dmesg":
            command["stdout"].append("[1.0] eth0: 52:54:00:aa:bb:cc <script>alert(1)</script>")
        if command["argv"][0] == "ps":
            command["stdout"] = [
                "77 qemu-system-x86_64 -name guest=<b>x</b> -uuid "
                "11111111-2222-3333-4444-555555555555 -object secret,id=a,data=hunter2hunter2 "
                "-netdev user,hostfwd=tcp:10.9.8.7:22-:22 -cpu host"
            ]
    (folder / "machine.json").write_text(json.dumps(said))
    (folder / "files/etc/hostname").write_text("secretbox\n")
    (folder / "files/proc/cmdline").write_text("root=/dev/sda host=secretbox token=abcdef123456\n")
    return folder


def test_secrets_are_removed_everywhere_and_listed(tmp_path, telling):
    _, files = written(tmp_path, l1=telling)
    whole = "\n".join(files.values())
    for secret in ("52:54:00:aa:bb:cc", "11111111-2222", "hunter2", "10.9.8.7", "secretbox",
                   "abcdef123456"):  # fmt: skip
        assert secret not in whole, secret
    removed = json.loads(files["report/report.json"])["removed"]
    assert {"mac", "uuid", "credential", "address", "name"} <= set(removed)


def test_the_page_is_html_in_which_nothing_of_the_machine_is_a_tag(tmp_path, telling):
    _, files = written(tmp_path, l1=telling)
    html = files["report/report.html"]
    tags = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.add(tag)

    Reader().feed(html)
    assert "script" not in tags
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert not re.search(r"(?:src|href)=['\"]https?:", html)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--l0", "/no/such/recording"],
        ["--l0", "-oProxyCommand=x"],
        ["--l1", "guest:--help"],
    ],
)
def test_bad_options_are_bad_input_and_write_nothing(tmp_path, words):
    assert run(tmp_path / "r.zip", *words) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "r.zip").write_text("keep")
    assert run(tmp_path / "r.zip", "--l1", HOSTS / "vmware-l1") == 2
    assert (tmp_path / "r.zip").read_text() == "keep"


def test_a_name_that_is_no_zip_or_no_folder_is_bad_input(tmp_path):
    assert run(tmp_path / "r.txt", "--l1", HOSTS / "vmware-l1") == 2
    assert run(tmp_path / "no" / "r.zip", "--l1", HOSTS / "vmware-l1") == 2
