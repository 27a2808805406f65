"""All facts of one machine, read once."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.host.access.protocol import Host, User
from undervisor.host.fact import Fact, value_or
from undervisor.host.facts.firmware import Firmware, firmware
from undervisor.host.facts.kernel import Kernel, kernel
from undervisor.host.facts.kvm import Kvm, kvm
from undervisor.host.facts.place import Place, place
from undervisor.host.facts.processor import Processor, processor
from undervisor.host.facts.security import Security, security
from undervisor.host.facts.software import Software, software
from undervisor.host.facts.zsystem import Zsystem, zsystem


@dataclass(frozen=True, slots=True)
class Machine:
    """What checks look at; nothing of it is read later."""

    name: str
    user: Fact[User]
    processor: Processor
    kernel: Kernel
    firmware: Firmware
    kvm: Kvm
    place: Place
    software: Software
    zsystem: Zsystem
    security: Security


def gather(host: Host) -> Machine:
    """Read everything; what can't be read is a fact of its own."""
    its_processor = processor(host)
    its_kernel = kernel(host)
    return Machine(
        name=host.name,
        user=host.user(),
        processor=its_processor,
        kernel=its_kernel,
        firmware=firmware(host, its_processor),
        kvm=kvm(host, its_kernel, its_processor),
        place=place(host, its_kernel, its_processor),
        software=software(host, value_or(its_processor.architecture, "")),
        zsystem=zsystem(host, its_processor),
        security=security(host),
    )
