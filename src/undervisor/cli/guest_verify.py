"""The ways into a guest that `undervisor guest verify` knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from undervisor.cli.printing import console, put
from undervisor.domains.agent import open_agent
from undervisor.domains.connection import Libvirt
from undervisor.domains.console import open_console
from undervisor.domains.verify import Verification, verify
from undervisor.errors import BadInput
from undervisor.host.access.opening import open_host
from undervisor.host.access.protocol import Host


@contextlib.contextmanager
def inside(
    name: str,
    agent: bool,
    console_: bool,
    connect: str,
    host: str,
    shell: str,
    ssh_config: str,
    wait: float,
) -> Iterator[Host]:
    """The inside of the guest that is meant, closed at the end.  Raises BadInput."""
    if sum(map(bool, (name, host, shell))) != 1 or (agent and console_):
        hint = "a domain, lab:l1, --host or --shell; --agent or --console"
        raise BadInput("name one guest and one way into it", hint=hint)
    with contextlib.ExitStack() as stack:
        opened = _open(stack, name, agent, console_, connect, host, shell, ssh_config, wait)
        stack.callback(opened.close)
        yield opened


def _open(
    stack: contextlib.ExitStack, name: str, agent: bool, console_: bool, connect: str, host: str,
    shell: str, ssh_config: str, wait: float,
) -> Host:  # fmt: skip
    if host or shell:
        return open_host(host=host, shell=shell, ssh_config=ssh_config)
    if name == "lab" or name.startswith("lab:"):
        from undervisor.lab.host import open_level

        return open_level("lab:l1" if name == "lab" else name)
    libvirt = stack.enter_context(Libvirt(connect))
    if agent or (libvirt.document(name).guest.agent and not console_):
        try:
            return open_agent(libvirt, name)
        except BadInput:
            if agent:
                raise  # else the console may still do
    return open_console(libvirt, name, wait)


def verified(host: Host) -> Verification:
    """Every step, on a host that is open."""
    return verify(host)


def put_verification(found: Verification) -> None:
    """For people."""
    out = console()
    for step in found.steps:
        put(out, f"{step.verdict.value}: {step.title}: {step.evidence} [{step.id}]")
        if step.remedy:
            put(out, f"remedy: {step.remedy}", indent=4)
    verdict = "is an L1: it ran a nested guest" if found.good else "is not proven to be an L1"
    put(out, f"{found.machine} {verdict}")
