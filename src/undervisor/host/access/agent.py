"""A libvirt guest through its agent: `virsh qemu-agent-command`, no network and no login."""

from __future__ import annotations

import base64
import binascii
import json
import time
from typing import Any

from undervisor.errors import BadInput
from undervisor.host.access.process import run_bounded
from undervisor.host.access.shell import ShellHost
from undervisor.host.fact import Fact, Known, Unknown

_PREPARE = "LC_ALL=C; export LC_ALL; PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin\n"


class AgentHost(ShellHost):
    """The guest `domain` of the libvirt at `connection` (its default where empty)."""

    def __init__(self, domain: str, connection: str = "", virsh: str = "virsh") -> None:
        if domain.startswith("-") or not domain:
            raise BadInput(f"{domain!r} is not the name of a domain")
        self.name = f"guest {domain}"
        self._domain = domain
        self._virsh = [virsh, *(["-c", connection] if connection else [])]

    def greet(self) -> None:
        """Make sure that the agent answers; BadInput says why not."""
        fact = self.execute("uname -s", 10, 4096)
        if not isinstance(fact, Known):
            why = fact.why if isinstance(fact, Unknown) else str(fact)
            raise BadInput(
                f"the agent of {self._domain} does not answer: {why}",
                hint="install and start qemu-guest-agent in the guest; guest-exec must be allowed",
            )

    def execute(self, script: str, timeout: float, limit: int) -> Fact[tuple[int, bytes, bytes]]:
        """guest-exec, then guest-exec-status until it ended."""
        arguments = {"path": "/bin/sh", "arg": ["-c", _PREPARE + script], "capture-output": True}
        deadline = time.monotonic() + timeout
        started = self._command("guest-exec", arguments, timeout, limit)
        if not isinstance(started, Known):
            return started
        pause = 0.02
        while time.monotonic() < deadline:
            status = self._command("guest-exec-status", started.value, timeout, limit)
            if not isinstance(status, Known):
                return status
            if status.value.get("exited"):
                return _result(status.value, self.name)
            time.sleep(pause)
            pause = min(pause * 2, 0.5)
        return Unknown(self.name, f"no answer within {timeout:g} s", code="ETIMEDOUT")

    def _command(
        self, verb: str, arguments: dict[str, Any], timeout: float, limit: int
    ) -> Fact[dict[str, Any]]:
        """One agent command; the reply's `return` object, which for guest-exec is the pid."""
        request = json.dumps({"execute": verb, "arguments": arguments})
        argv = [*self._virsh, "qemu-agent-command", "--domain", self._domain, "--cmd", request]
        fact = run_bounded(argv, timeout, 2 * limit + (1 << 16))
        if not isinstance(fact, Known):
            return fact
        if fact.value.status:
            lines = fact.value.stderr.strip().splitlines()
            return Unknown(self.name, lines[-1][:200] if lines else "virsh failed")
        try:
            reply = json.loads(fact.value.stdout)["return"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Unknown(self.name, "the agent's answer is not JSON")
        return Known(reply, verb) if isinstance(reply, dict) else Unknown(self.name, "odd answer")


def _result(status: dict[str, Any], source: str) -> Fact[tuple[int, bytes, bytes]]:
    try:
        out, err = (
            base64.b64decode(str(status.get(key, "")), validate=True)
            for key in ("out-data", "err-data")
        )
        return Known((int(status.get("exitcode", 255)), out, err), source)
    except (binascii.Error, ValueError, TypeError):
        return Unknown(source, "the agent's answer is not base64")
