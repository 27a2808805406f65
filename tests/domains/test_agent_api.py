"""The agent through libvirt's API, with a libvirt that executes what the guest would."""

import base64
import json
import subprocess
import types

import pytest

from undervisor.domains.agent import open_agent
from undervisor.domains.connection import Libvirt
from undervisor.errors import BadInput
from undervisor.host.fact import Absent, Known, Unknown

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")


class Guest:
    """An agent that runs its commands here."""

    def __init__(self, broken=""):
        self.broken = broken
        self.ended = {}

    def qemuAgentCommand(self, domain, request, timeout, flags):
        assert timeout > 0
        if self.broken == "silent":
            raise libvirt.libvirtError("QEMU guest agent is not connected")
        if self.broken:
            return self.broken
        said = json.loads(request)
        arguments = said["arguments"]
        if said["execute"] == "guest-exec":
            number = len(self.ended) + 1
            argv = [arguments["path"], *arguments["arg"]]
            self.ended[number] = subprocess.run(argv, capture_output=True, check=False)
            return json.dumps({"return": {"pid": number}})
        it = self.ended[arguments["pid"]]
        out, err = (base64.b64encode(t).decode() for t in (it.stdout, it.stderr))
        done = {"exited": True, "exitcode": it.returncode, "out-data": out, "err-data": err}
        return json.dumps({"return": done})


@pytest.fixture
def agent(monkeypatch):
    def answer(guest):
        module = types.SimpleNamespace(qemuAgentCommand=guest.qemuAgentCommand)
        real = __import__("importlib").import_module
        monkeypatch.setattr(
            "undervisor.domains.agent.importlib.import_module",
            lambda name: module if name == "libvirt_qemu" else real(name),
        )
        connection = Libvirt("test:///default")
        return open_agent(connection, "test")

    return answer


def test_a_guest_behind_its_agent_is_a_host(agent, tmp_path):
    host = agent(Guest())
    (tmp_path / "file").write_text("text\n")
    assert host.read_text(str(tmp_path / "file")) == Known("text\n", str(tmp_path / "file"))
    assert isinstance(host.read_text(str(tmp_path / "none")), Absent)
    assert host.run(["sh", "-c", "exit 7"]).value.status == 7


@pytest.mark.parametrize("broken", ["silent", "{}", "[", '{"return": 3}'])
def test_an_agent_that_does_not_answer_right_is_told(agent, broken):
    with pytest.raises(BadInput, match="does not answer"):
        agent(Guest(broken))


def test_an_agent_that_falls_silent_is_unknown(agent):
    guest = Guest()
    host = agent(guest)
    guest.broken = "silent"
    assert isinstance(host.run(["true"]), Unknown)
