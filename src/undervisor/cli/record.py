"""`undervisor record`: keep a machine's answers in a folder, without its secrets."""

from __future__ import annotations

from typing import Annotated

import typer

from undervisor.cli.check import GuestOption, HostOption, ShellOption, SshConfigOption, machine
from undervisor.domains.cpu_features import known_to_libvirt
from undervisor.domains.host_topology import topology
from undervisor.host.access.recorder import RecordingHost
from undervisor.host.checks.engine import examine
from undervisor.host.facts.machine import gather
from undervisor.host.migration.capabilities import vmx_msrs
from undervisor.report.items import collect


def record(
    folder: Annotated[str, typer.Argument(help="A new folder to write.")],
    host: HostOption = "",
    guest: GuestOption = "",
    shell: ShellOption = "",
    ssh_config: SshConfigOption = "",
    live: Annotated[bool, typer.Option("--live", help="Also open /dev/kvm and ask it.")] = False,
    about: Annotated[str, typer.Option(help="A sentence about the machine.")] = "",
) -> None:
    """Record a machine: `undervisor check --recording FOLDER` then sees it as it is now.

    Serial numbers, UUIDs, addresses, names and credentials are replaced; what was is listed.
    """
    with machine(host, guest, "", ssh_config, shell) as opened:
        recorder = RecordingHost(opened)
        facts = gather(recorder)
        vmx_msrs(recorder, facts)
        collect(recorder, facts)
        topology(recorder)  # what tuning a guest looks at
        known_to_libvirt(recorder)
        if live:
            recorder.kvm()
        examination = examine(facts, with_security=True)
        removed = recorder.write(folder, about)
    print(f"recorded {examination.machine} in {folder}: {examination.verdict.value}")
    for kind, count in removed.items():
        print(f"  removed: {count} {kind}")
    raise typer.Exit(0)
