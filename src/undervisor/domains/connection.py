"""libvirt through its own API: no virsh, no text to parse but XML."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.safe_xml import parse
from undervisor.errors import BadInput
from undervisor.host.facts.software import Capabilities, parse_capabilities

T = TypeVar("T")
SYSTEM = "qemu:///system"


class Libvirt:
    """A connection; a context manager.  Every method raises BadInput with libvirt's own words."""

    def __init__(self, uri: str = SYSTEM) -> None:
        self.uri = uri
        self.library = load_library()
        self.library.registerErrorHandler(lambda *_: None, None)
        self.handle = self._ask(f"connect to {uri}", lambda: self.library.open(uri))

    def __enter__(self) -> Libvirt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.handle.close()

    def domains(self) -> tuple[str, ...]:
        """The names of all domains, running or not."""
        found = self._ask("list domains", lambda: self.handle.listAllDomains())
        return tuple(sorted(domain.name() for domain in found))

    def document(self, name: str) -> DomainXml:
        """The definition that the next start will use, secrets included."""
        library = self.library
        flags = library.VIR_DOMAIN_XML_INACTIVE | library.VIR_DOMAIN_XML_SECURE
        return DomainXml.parse(self._ask(f"read {name}", lambda: self.domain(name).XMLDesc(flags)))

    def domain(self, name: str) -> Any:
        """libvirt's object of a domain."""
        return self._ask(f"find the domain {name}", lambda: self.handle.lookupByName(name))

    def has_domain(self, name: str) -> bool:
        """Whether there is such a domain."""
        return name in self.domains()

    def active(self, name: str) -> bool:
        """Whether the domain runs."""
        return bool(self._ask("ask for its state", lambda: self.domain(name).isActive()))

    def define(self, text: str) -> None:
        """Define or redefine a domain; libvirt validates the XML against its schema first."""
        flag = self.library.VIR_DOMAIN_DEFINE_VALIDATE
        self._ask("define the domain", lambda: self.handle.defineXMLFlags(text, flag))

    def undefine(self, name: str) -> None:
        """Remove the definition; firmware variables and disks stay."""
        flag = self.library.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        self._ask(f"remove {name}", lambda: self.domain(name).undefineFlags(flag))

    def start(self, name: str) -> None:
        """Start a domain."""
        self._ask(f"start {name}", lambda: self.domain(name).create())

    def stop(self, name: str) -> None:
        """Switch a domain off, as if by its power switch."""
        self._ask(f"stop {name}", lambda: self.domain(name).destroy())

    def capabilities(self) -> Capabilities:
        """What libvirt gives domains here; host-model's features among it."""
        text = self._ask("read the capabilities", lambda: self.handle.getDomainCapabilities())
        try:
            return parse_capabilities(text)
        except ValueError as error:
            raise BadInput(f"libvirt's capabilities can't be read: {error}") from error

    def networks(self) -> dict[str, bool]:
        """All networks by name, and whether each is active."""
        found = self._ask("list networks", lambda: self.handle.listAllNetworks())
        return {network.name(): bool(network.isActive()) for network in found}

    def network(self, name: str) -> Any:
        """libvirt's object of a network."""
        return self._ask(f"find the network {name}", lambda: self.handle.networkLookupByName(name))

    def network_text(self, name: str) -> str:
        """A network's XML."""
        return str(self._ask(f"read {name}", lambda: self.network(name).XMLDesc(0)))

    def define_network(self, text: str) -> None:
        """Define a network; BadInput where it is no network at all."""
        parse(text, "network")
        self._ask("define the network", lambda: self.handle.networkDefineXML(text))

    def start_network(self, name: str, autostart: bool) -> None:
        """Start a network unless it runs, and say whether it starts with the host."""
        network = self.network(name)
        if not self._ask("ask for its state", network.isActive):
            self._ask(f"start {name}", network.create)
        self._ask(f"set autostart of {name}", lambda: network.setAutostart(int(autostart)))

    def remove_network(self, name: str) -> None:
        """Stop a network if it runs, and remove its definition."""
        network = self.network(name)
        if self._ask("ask for its state", network.isActive):
            self._ask(f"stop {name}", network.destroy)
        self._ask(f"remove {name}", network.undefine)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except self.library.libvirtError as error:
            said = str(error).strip().splitlines()
            raise BadInput(
                f"libvirt can't {what}: {said[0][:300] if said else 'no reason given'}",
                hint=_hint(str(error)),
            ) from error


def _hint(words: str) -> str:
    """What to do about libvirt's most usual refusals."""
    for phrase, hint in (
        ("Failed to connect socket", "start libvirtd or virtqemud; or give --connect"),
        ("authentication", "be in the group libvirt, or use sudo"),
        ("unknown CPU feature", "`undervisor guest diff` names the right one"),
        ("not supported by hypervisor", "host-passthrough needs KVM: type='kvm' and /dev/kvm"),
        ("validate against schema", "an element is misplaced or misspelt"),
    ):
        if phrase in words:
            return hint
    return ""


def load_library() -> Any:
    """libvirt's Python module; BadInput where it is not installed."""
    try:
        return importlib.import_module("libvirt")
    except ImportError as error:
        raise BadInput(
            "libvirt's Python module is not installed",
            hint="pip install 'undervisor[libvirt]' (it builds against libvirt-dev), or "
            "use files: every command but apply, verify and network takes them",
        ) from error
