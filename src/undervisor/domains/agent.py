"""A guest behind its agent, asked through libvirt's API rather than virsh."""

from __future__ import annotations

import importlib
import json
from typing import Any

from undervisor.domains.connection import Libvirt
from undervisor.errors import BadInput
from undervisor.host.access.agent import AgentHost
from undervisor.host.fact import Fact, Known, Unknown


class ApiAgentHost(AgentHost):
    """The guest `name` of a connection."""

    def __init__(self, libvirt: Libvirt, name: str) -> None:
        super().__init__(name)
        self._libvirt = libvirt
        self._object = libvirt.domain(name)
        self._agent = importlib.import_module("libvirt_qemu")

    def _command(
        self, verb: str, arguments: dict[str, Any], timeout: float, limit: int
    ) -> Fact[dict[str, Any]]:
        """One agent command; libvirt itself bounds its time in whole seconds."""
        request = json.dumps({"execute": verb, "arguments": arguments})
        try:
            said = self._agent.qemuAgentCommand(self._object, request, max(1, int(timeout)), 0)
            reply = json.loads(said)["return"]
        except self._libvirt.library.libvirtError as error:
            return Unknown(self.name, str(error).splitlines()[0][:200])
        except (ValueError, KeyError, TypeError, RecursionError):
            return Unknown(self.name, "the agent's answer is not JSON")
        return Known(reply, verb) if isinstance(reply, dict) else Unknown(self.name, "odd answer")


def open_agent(libvirt: Libvirt, name: str) -> ApiAgentHost:
    """The guest `name` behind its agent.  Raises BadInput where none answers."""
    if not libvirt.active(name):
        raise BadInput(f"{name} does not run", hint="start it first")
    host = ApiAgentHost(libvirt, name)
    host.greet()
    return host
