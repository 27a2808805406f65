"""KVM on the machine: which backend, how it got into the kernel, its parameters, its device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from undervisor.host.access.protocol import Host, Stat
from undervisor.host.fact import Absent, Fact, Known, Unknown, then, value_or
from undervisor.host.facts.kernel import Kernel
from undervisor.host.facts.processor import Processor

HARDWARE_BACKENDS = {
    "kvm_intel": "vmx",
    "kvm_amd": "svm",
    "kvm_hv": "",
    "kvm_pr": "",
}
"""Backends that we know, and the processor flag that each needs (x86 only)."""

DEVICE = "/dev/kvm"
DEVICE_NUMBER = (10, 232)
"""The misc device number that KVM registers."""


class Presence(Enum):
    """How a module is there."""

    LOADED = "loaded as a module"
    BUILT_IN = "built into the kernel"
    AVAILABLE = "a module that is not loaded"
    MISSING = "not part of this kernel"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Kvm:
    """KVM's facts.

    `expected` is the backend that the processor's vendor calls for.  `others` are backends that
    are active and that we do not know as using the processor's extension.
    """

    expected: str
    presence: Presence
    others: tuple[str, ...]
    parameters: dict[str, dict[str, Fact[str]]]
    device: Fact[Stat]
    usable: Fact[bool]

    def parameter(self, name: str, module: str = "") -> Fact[str]:
        """A parameter of `module` (the expected backend)."""
        module = module or self.expected
        return self.parameters.get(module, {}).get(
            name, Absent(f"/sys/module/{module}/parameters/{name}")
        )

    @property
    def nested(self) -> Fact[bool]:
        """The `nested` parameter, which kernels print as Y, N, 1 or 0."""
        name = "kvm" if self.expected == "kvm" else self.expected
        return then(self.parameter("nested", name), boolean)


def boolean(text: str) -> bool:
    """A module parameter as the kernel prints booleans and small numbers."""
    words = {"Y": True, "1": True, "N": False, "0": False, "y": True, "n": False}
    if text not in words:
        raise ValueError(f"{text[:20]!r} is neither on nor off")
    return words[text]


def _expected(processor: Processor) -> str:
    return {"vmx": "kvm_intel", "svm": "kvm_amd", "sie": "kvm"}.get(processor.extension, "kvm")


def presence(module: str, kernel: Kernel, active: Fact[tuple[str, ...]]) -> Presence:
    """How `module` is there; `active` are the names in /sys/module."""
    if isinstance(kernel.modules, Known) and module in kernel.modules.value:
        return Presence.LOADED
    if module in value_or(kernel.builtin, frozenset()):
        return Presence.BUILT_IN
    if isinstance(active, Known) and module in active.value:
        # In /sys/module but not in /proc/modules: only what is built in looks like that.
        return Presence.BUILT_IN
    if module in value_or(kernel.available, frozenset()):
        return Presence.AVAILABLE
    if isinstance(active, Known) and isinstance(kernel.modules, Absent):
        # A kernel without loadable modules has in /sys/module all that there is.
        return Presence.MISSING
    if isinstance(kernel.builtin, Known) and isinstance(kernel.available, Known):
        return Presence.MISSING
    return Presence.UNKNOWN


def _parameters(host: Host, module: str) -> dict[str, Fact[str]]:
    folder = f"/sys/module/{module}/parameters"
    names = value_or(host.listdir(folder), ())
    return {name: host.read_line(f"{folder}/{name}") for name in names[:200]}


def kvm(host: Host, kernel: Kernel, processor: Processor) -> Kvm:
    """Read KVM's facts; the device is looked at, not opened."""
    active = host.listdir("/sys/module")
    names = [name for name in value_or(active, ()) if name.startswith("kvm_") or name == "kvm"]
    expected = _expected(processor)
    others = [n for n in names if n.startswith("kvm_") and n not in HARDWARE_BACKENDS]
    wanted = dict.fromkeys([*names, expected])
    return Kvm(
        expected=expected,
        presence=presence(expected, kernel, active),
        others=tuple(others),
        parameters={name: _parameters(host, name) for name in wanted if name in names},
        device=host.stat(DEVICE),
        usable=host.usable(DEVICE),
    )


def device_is_kvm(fact: Fact[Stat]) -> Fact[bool]:
    """Whether the device file is KVM's; Unknown where the number is not told."""
    if isinstance(fact, Known) and fact.value.kind == "character" and fact.value.device is None:
        return Unknown(DEVICE, "its device number is not known")
    return then(fact, lambda s: s.kind == "character" and s.device == DEVICE_NUMBER)
