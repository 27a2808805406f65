"""/dev/kvm: there, KVM's, and open to this user."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.checks.place import extension_missing
from undervisor.host.fact import Absent, Known, value_or
from undervisor.host.facts.kvm import DEVICE, Presence, device_is_kvm
from undervisor.host.facts.machine import Machine

_L = Layer.DEVICE
_RULE = 'KERNEL=="kvm", GROUP="kvm", MODE="0660"'
_CI_RULE = 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"'

USABLE = Kind("device-usable", _L, Level.OK, "/dev/kvm is open to this user", "Read and write.")
DENIED = Kind(
    "device-denied", _L, Level.FAIL, "This user may not use /dev/kvm",
    "QEMU without an explicit -accel kvm then falls back to emulation without a word, and jobs "
    "take ten times as long or time out.",
    "sudo usermod -aG {group} $USER, then log in anew. On a throw-away CI machine: "
    "echo '" + _CI_RULE + "' | sudo tee /etc/udev/rules.d/99-kvm.rules; sudo udevadm control "
    "--reload-rules; sudo udevadm trigger --name-match=kvm",
)  # fmt: skip
MISSING = Kind(
    "device-missing", _L, Level.FAIL, "KVM is in the kernel, but /dev/kvm is missing",
    "The kernel creates the file through devtmpfs and udev sets its mode.",
    "sudo udevadm trigger --name-match=kvm; where /dev is not devtmpfs: sudo mknod /dev/kvm c 10 "
    "232, with the rule " + _RULE,
)  # fmt: skip
NO_DEVICE_IN_CONTAINER = Kind(
    "container-without-device", _L, Level.FAIL, "The container has no /dev/kvm",
    "The host's kernel has KVM; the container was started without its device.",
    "docker run --device /dev/kvm (podman likewise); in Kubernetes a device plugin or a "
    "privileged pod; in LXC lxc.mount.entry = /dev/kvm dev/kvm none bind,create=file",
)  # fmt: skip
NOT_KVM = Kind(
    "device-not-kvm", _L, Level.FAIL, "/dev/kvm is not KVM's device",
    "The file is no character device with KVM's number 10:232.",
    "sudo rm /dev/kvm; sudo udevadm trigger --name-match=kvm",
)  # fmt: skip
DEVICE_UNKNOWN = Kind(
    "device-unknown", _L, Level.UNKNOWN, "Whether /dev/kvm is usable is not known",
    "The device file could not be looked at.", "ls -l /dev/kvm", decides=True,
)  # fmt: skip


def _active(machine: Machine) -> bool:
    return machine.kvm.presence in (Presence.LOADED, Presence.BUILT_IN) or bool(machine.kvm.others)


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about the device; silent where KVM itself is missing, which says it all."""
    device = machine.kvm.device
    if isinstance(device, Absent):
        # A backend without its extension makes no device: said already, in a lower layer.
        if _active(machine) and (machine.kvm.others or not extension_missing(machine)):
            container = isinstance(machine.place.container, Known)
            yield (NO_DEVICE_IN_CONTAINER if container else MISSING).found(device)
        return
    if not isinstance(device, Known):
        yield DEVICE_UNKNOWN.found(device)
        return
    if not value_or(device_is_kvm(device), True):
        yield NOT_KVM.found(f"{DEVICE} is a {device.value.kind}, number {device.value.device}")
        return
    yield from _permission(machine)


def _permission(machine: Machine) -> Iterator[Finding]:
    assert isinstance(machine.kvm.device, Known)
    stat = machine.kvm.device.value
    mode = f"{DEVICE} is {stat.mode:04o} {stat.owner}:{stat.group}"
    usable = machine.kvm.usable
    if not isinstance(usable, Known):
        yield DEVICE_UNKNOWN.found(mode, usable)
    elif usable.value:
        yield USABLE.found(mode)
    else:
        groups = ", ".join(machine.user.value.groups) if isinstance(machine.user, Known) else "?"
        yield DENIED.found(mode, f"this user's groups: {groups}", group=stat.group)
