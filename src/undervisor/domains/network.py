"""An isolated libvirt network: written, read, and its limits checked before libvirt sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network, NetmaskValueError

from lxml import etree

from undervisor.domains import xml_tree as x
from undervisor.domains.limits import Problem, Weight
from undervisor.domains.safe_xml import parse, to_text
from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.host.fact import Known, value_or

BRIDGE_NAME_MOST = 15
"""Characters of an interface's name: IFNAMSIZ without its NUL."""

_ROUTE = re.compile(r"^(\S+)\t([0-9A-F]{8})\t\S+\t\S+\t\S+\t\S+\t\S+\t([0-9A-F]{8})\t", re.M)


@dataclass(frozen=True, slots=True)
class Network:
    """A network; `forward` is empty for an isolated one, `domain` is what DNS calls it, `range`
    what DHCP gives away."""

    name: str
    bridge: str = ""
    address: IPv4Interface | None = None
    range: tuple[IPv4Address, IPv4Address] | None = None
    domain: str = ""
    forward: str = ""
    delay: str = "0"
    stp: str = "on"


def isolated(name: str, address: str, bridge: str = "") -> Network:
    """An isolated network of that address; DHCP gives away the rest of it.  Raises BadInput."""
    interface = _interface(address)
    hosts = interface.network
    if hosts.prefixlen > 29:
        raise BadInput(f"{address} has no room for guests", hint="a network of /29 or larger")
    inside = (hosts.network_address + 1, hosts.broadcast_address - 1)
    below, above = int(interface.ip) - int(inside[0]), int(inside[1]) - int(interface.ip)
    if below < 0 or above < 0:
        raise BadInput(f"{interface.ip} is the network's own or its broadcast address")
    first, last = (interface.ip + 1, inside[1]) if above >= below else (inside[0], interface.ip - 1)
    return Network(name, bridge, interface, (first, last), domain=name)


def _interface(address: str) -> IPv4Interface:
    try:
        return IPv4Interface(address)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        raise BadInput(
            f"{address!r} is no IPv4 address with a length", hint="192.168.100.1/24"
        ) from error


def to_xml(network: Network) -> str:
    """libvirt's XML."""
    root = etree.Element("network")
    etree.SubElement(root, "name").text = network.name
    if network.forward:
        etree.SubElement(root, "forward", mode=network.forward)
    bridge = {"name": network.bridge, "stp": network.stp, "delay": network.delay}
    etree.SubElement(root, "bridge", {k: v for k, v in bridge.items() if v})
    if network.domain:
        etree.SubElement(root, "domain", name=network.domain)
    if network.address is not None:
        ip = etree.SubElement(
            root, "ip", address=str(network.address.ip), netmask=str(network.address.netmask)
        )
        if network.range is not None:
            dhcp = etree.SubElement(ip, "dhcp")
            first, last = network.range
            etree.SubElement(dhcp, "range", start=str(first), end=str(last))
    etree.indent(root)
    return to_text(root)


def from_xml(raw: bytes | str) -> Network:
    """What a network's XML says, as far as isolation and addresses go.  Raises BadInput."""
    root = parse(raw, "network")
    forward = root.find("forward")
    return Network(
        name=x.text_of(root, "name"),
        bridge=x.attribute(root, "bridge", "name"),
        address=_address(root),
        range=_range(root),
        domain=x.attribute(root, "domain", "name"),
        forward="" if forward is None else forward.get("mode") or "nat",
        delay=x.attribute(root, "bridge", "delay"),
        stp=x.attribute(root, "bridge", "stp"),
    )


def _address(root: etree._Element) -> IPv4Interface | None:
    for ip in root.findall("ip"):
        if ip.get("family", "ipv4") == "ipv4":
            length = ip.get("prefix") or ip.get("netmask") or "32"
            return _interface(f"{ip.get('address')}/{length}")
    return None


def _range(root: etree._Element) -> tuple[IPv4Address, IPv4Address] | None:
    found = root.find("ip/dhcp/range")
    if found is None:
        return None
    try:
        return IPv4Address(found.get("start") or ""), IPv4Address(found.get("end") or "")
    except AddressValueError as error:
        raise BadInput(f"the DHCP range is no range: {error}") from error


def problems(network: Network, host: Host | None = None) -> tuple[Problem, ...]:
    """What libvirt or the kernel would refuse, and what makes it less than isolated."""
    found = [*_own_problems(network)]
    if host is not None:
        found += _problems_on(network, host)
    return tuple(found)


def _own_problems(network: Network) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,50}", network.name):
        yield Problem(
            "network-name",
            Weight.REFUSED,
            f"{network.name!r} is no name of a network",
            "letters, digits, and _ . + -",
        )
    if len(network.bridge) > BRIDGE_NAME_MOST or re.search(r"[\s/:]", network.bridge):
        yield Problem(
            "bridge-name",
            Weight.REFUSED,
            f"{network.bridge!r} is no name of a bridge",
            f"at most {BRIDGE_NAME_MOST} characters, no blank, / or :",
        )
    if network.forward:
        yield Problem(
            "not-isolated",
            Weight.WARN,
            f"<forward mode='{network.forward}'> leads out",
            "an isolated network has no <forward>",
        )
    address, leases = network.address, network.range
    if address is None:
        return
    if not address.network.is_private:
        yield Problem(
            "public-address",
            Weight.WARN,
            f"{address.network} is a public network",
            "the host can't reach the real one any more; take one of RFC 1918",
        )
    if leases is None:
        return
    first, last = leases
    if first > last or first not in address.network or last not in address.network:
        yield Problem(
            "dhcp-outside",
            Weight.REFUSED,
            f"{first} to {last} is not in {address.network}",
            "libvirt refuses it",
        )
    elif first <= address.ip <= last:
        yield Problem(
            "dhcp-overlaps",
            Weight.WARN,
            f"the range holds the bridge's own {address.ip}",
            "start after it",
        )


def _problems_on(network: Network, host: Host) -> Iterator[Problem]:
    if network.bridge and isinstance(host.stat(f"/sys/class/net/{network.bridge}"), Known):
        yield Problem(
            "bridge-taken",
            Weight.REFUSED,
            f"there is an interface {network.bridge}",
            "name another bridge, or none: libvirt then takes the next free virbr",
        )
    if network.address is None:
        return
    for name, taken in routes(value_or(host.read_text("/proc/net/route"), "")):
        if name != network.bridge and taken.overlaps(network.address.network):
            yield Problem(
                "address-taken",
                Weight.REFUSED,
                f"{taken} is already reached through {name}",
                "libvirt refuses the start; take another address",
            )


def routes(text: str) -> Iterator[tuple[str, IPv4Network]]:
    """Interfaces and networks of /proc/net/route, the default route left out; little endian."""
    for name, destination, mask in _ROUTE.findall(text):
        length = bin(int(mask, 16)).count("1")
        if length:
            address = int.from_bytes(bytes.fromhex(destination), "little")
            yield name[:40], IPv4Network((address, length), strict=False)
