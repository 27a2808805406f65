"""Which machine an operator means: one of the ways to name it."""

from __future__ import annotations

import os
import shlex

from undervisor.errors import BadInput
from undervisor.host.access.agent import AgentHost
from undervisor.host.access.live import LiveHost
from undervisor.host.access.protocol import Host
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.access.schemes import opener
from undervisor.host.access.ssh import SshHost, ssh_command

_GUEST = "guest:"


def open_host(
    host: str = "",
    recording: str = "",
    guest: str = "",
    ssh_config: str = "",
    root: str = "",
    shell: str = "",
) -> Host:
    """This machine, `user@name` over SSH or `lab:l1`, a recording, a libvirt guest, a root folder,
    or what a command leads to that gives a plain sh, such as `kubectl exec -i POD -- sh`.

    Raises BadInput where more than one is named or the one named can't be reached.
    """
    if sum(map(bool, (host, recording, guest, root, shell))) > 1:
        raise BadInput("name one machine: a host, a guest, a shell, a recording or a root folder")
    if recording:
        return RecordedHost(recording)
    if host and (opens := opener(host)):
        return opens(host)
    if host:
        remote = SshHost(host, ssh_command(host, ssh_config))
        _greet(remote)
        return remote
    if shell:
        words = _words(shell)
        behind = SshHost(words[0], words)
        _greet(behind)
        return behind
    if guest:
        agent = AgentHost(guest)
        agent.greet()
        return agent
    return LiveHost(root or "/")


def open_place(place: str, ssh_config: str = "") -> Host:
    """The machine that one word names: `here`, user@name, lab:l1, guest:NAME (through its libvirt
    agent), or a recording's folder.  BadInput where it can't be reached."""
    if place == "here":
        return open_host()
    if place.startswith(_GUEST):
        return open_host(guest=place.removeprefix(_GUEST))
    if not opener(place) and (os.path.sep in place or os.path.isdir(place)):
        return open_host(recording=place)
    return open_host(host=place, ssh_config=ssh_config)


def _words(command: str) -> list[str]:
    """The words of a command, which is started without a shell of ours."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"the command {command!r} can't be understood: {error}") from error
    if not words:
        raise BadInput("the command is empty")
    return words


def _greet(remote: SshHost) -> None:
    try:
        remote.greet()
    except BadInput:
        remote.close()
        raise
