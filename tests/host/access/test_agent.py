"""The guest agent, with a virsh of our own that really runs what it is asked to run."""

import stat
import sys
import textwrap

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.agent import AgentHost
from undervisor.host.access.live import LiveHost
from undervisor.host.fact import Absent

VIRSH = """
import base64, json, subprocess, sys
request = json.loads(sys.argv[sys.argv.index("--cmd") + 1])
given = request["arguments"]
store = __file__ + ".result"
if request["execute"] == "guest-exec":
    done = subprocess.run([given["path"], *given["arg"]], capture_output=True)
    status = {"exited": True, "exitcode": done.returncode}
    for key, raw in (("out-data", done.stdout), ("err-data", done.stderr)):
        if raw:
            status[key] = base64.b64encode(raw).decode()
    open(store, "w").write(json.dumps(status))
    print(json.dumps({"return": {"pid": 7}}))
else:
    assert given == {"pid": 7}
    print(json.dumps({"return": json.load(open(store))}))
"""


def virsh(folder, text):
    path = folder / "virsh"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(text))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_agent_sees_what_the_guest_sees(tmp_path):
    host = AgentHost("guest", virsh=virsh(tmp_path, VIRSH))
    host.greet()
    assert host.read_text("/proc/version") == LiveHost().read_text("/proc/version")
    assert isinstance(host.read_text("/no/such"), Absent)


@pytest.mark.parametrize(
    "text",
    [
        "import sys; print('error: domain is not running', file=sys.stderr); sys.exit(1)",
        "print('rubbish')",
        "print('[' * 100000)",
        "print('{\"return\": 7}')",
    ],
    ids=["error", "rubbish", "nesting", "odd"],
)
def test_an_agent_that_does_not_answer_well_is_refused(tmp_path, text):
    with pytest.raises(BadInput, match="agent of guest"):
        AgentHost("guest", virsh=virsh(tmp_path, text)).greet()


@pytest.mark.parametrize("name", ["", "--connect"])
def test_a_domain_name_that_could_be_an_option_is_refused(name):
    with pytest.raises(BadInput):
        AgentHost(name)
