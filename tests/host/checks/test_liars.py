"""Recordings that lie: whatever files, errors and answers say, the checks end with findings."""

import json
import random
import shutil
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.below import below
from undervisor.host.checks.engine import examine
from undervisor.host.facts.machine import gather
from undervisor.host.fixes.nested import plan_nested
from undervisor.host.migration.capabilities import vmx_msrs
from undervisor.host.migration.judge import Side, judge
from undervisor.host.migration.rules import Case
from undervisor.report.bundle import Bundle, contents, level

HOSTS = Path(__file__).parent.parent.parent / "hosts"
NAMES = ["intel-bare-metal", "intel-l1-soft-lockups", "s390x-hpage", "amd-stable-6.12.40",
         "arm64-bare-metal", "wsl2-nested-off", "gcp-n2-nested"]  # fmt: skip
WORDS = ["", "\0", "\n" * 50, "-1", "99999999999999999999999", "Y\nN", "vmx", "svm", ":" * 80,
         "a: b: c\n" * 30, "[x]", "\udcff", "processor : x\nflags : vmx vmx\nvendor_id : \n",
         "5.15", "6.6.6-rc", "1.2.3.4.5", "{}", "<domain type='kvm'>", "options kvm nested=\n",
         "options", "é" * 300, "%s%n{0}{how}", "[/bold] [red]"]  # fmt: skip


def lie(rng, folder):
    """Change a few things at random: files, errors, and every kind of value in the JSON."""
    files = [path for path in (folder / "files").rglob("*") if path.is_file()]
    for path in rng.sample(files, k=min(4, len(files))):
        text = rng.choice(WORDS)
        path.write_bytes(rng.choice([text.encode("utf-8", "surrogatepass"), rng.randbytes(200)]))
    said = json.loads((folder / "machine.json").read_text())
    for command in rng.sample(said["commands"], k=min(3, len(said["commands"]))):
        command["stdout"] = rng.choice(WORDS)
        command["status"] = rng.choice([0, 0, 1, -9, 255, 10**9])
    some = [f"/{path.relative_to(folder / 'files')}" for path in files]
    errors = said.setdefault("errors", {})
    for path in rng.sample(some, k=min(2, len(some))):
        errors[path] = rng.choice(["EIO", "EACCES", "ENOENT", "ESTRANGE", "EFBIG"])
    if rng.random() < 0.5:
        said["msr"] = {"0x3a": rng.choice([0, 1, "EIO", "0xfffffffffffffffff", None, [], "5"])}
    if rng.random() < 0.5:
        said["cpuid"] = {"0x40000000.0": rng.choice([None, [], [0] * 4, ["0x7"] * 4, [2**32] * 4])}
    if rng.random() < 0.3:
        said["stat"] = {"/dev/kvm": rng.choice([None, {}, {"mode": "9"}, {"device": [1]}, 3])}
    if rng.random() < 0.3:
        said["user"] = rng.choice([{}, {"uid": "x"}, {"uid": 5, "groups": []}])
    (folder / "machine.json").write_text(json.dumps(said))


@pytest.mark.parametrize("seed", range(60))
def test_no_lie_breaks_a_check(tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "m"
    shutil.copytree(HOSTS / rng.choice(NAMES), folder)
    lie(rng, folder)
    try:
        host = RecordedHost(str(folder))
        machine = gather(host)
    except BadInput:
        return
    examination = examine(machine, with_security=True, offer=host.kvm())
    assert examination.findings
    json.dumps(examination.as_json())
    assert str(below(machine))
    plan_nested(host, machine, rng.random() < 0.5).lines()
    side = Side(machine, vmx_msrs(host, machine))
    assert [judge(side, side, case).verdict for case in Case]
    files, _ = contents(Bundle((level("L1", host),)))
    assert "<script" not in files["report.html"]
