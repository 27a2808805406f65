"""The kernel: its KVM, the parameters that matter, and what else holds the extension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.checks.place import extension_missing
from undervisor.host.fact import Absent, Known, unknowable, value_or
from undervisor.host.facts.kvm import HARDWARE_BACKENDS, Presence, boolean
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.version import Version

_L = Layer.KERNEL

LOADED = Kind("kvm-loaded", _L, Level.OK, "KVM is in the kernel", "The backend is active.")
MISSING = Kind(
    "kvm-missing", _L, Level.FAIL, "This kernel has no KVM for this processor",
    "The backend is neither built in nor among the kernel's modules.",
    "Install a kernel with KVM (in some distributions a package of extra modules), or build with "
    "CONFIG_KVM_INTEL or CONFIG_KVM_AMD.",
)  # fmt: skip
SOFTWARE_BACKEND = Kind(
    "software-kvm-backend", _L, Level.FAIL, "KVM here runs without the processor's extension",
    "Another backend than kvm_intel and kvm_amd serves /dev/kvm. It runs guests by means of "
    "software (paging tricks, a de-privileged kernel), so that its guests see neither VMX nor SVM: "
    "one level of guests works, nested KVM on top of it does not.",
    "For nested guests, use a machine whose processor shows vmx or svm. `undervisor run` needs "
    "neither.",
)  # fmt: skip
NOT_LOADED = Kind(
    "kvm-not-loaded", _L, Level.FAIL, "The KVM module is not loaded",
    "The kernel has it, nothing loaded it. That the folder of its parameters is missing in "
    "/sys/module is a consequence.",
    "sudo modprobe {module}; if it fails: sudo dmesg | grep -i kvm",
)  # fmt: skip
FORBIDDEN = Kind(
    "kvm-forbidden", _L, Level.FAIL, "The configuration forbids loading KVM",
    "A blacklist or an install command that does nothing keeps the module out.",
    "Remove the line that is shown, run the distribution's initramfs tool, then modprobe {module}.",
    ("modprobe.d(5)",),
)  # fmt: skip
REFUSED = Kind(
    "kvm-refused", _L, Level.FAIL, "The KVM module was tried and refused to load",
    "modprobe says Input/output error or Operation not supported; the log says why.",
    "Remedy the layer below first (see the earlier findings and the log line), then modprobe "
    "{module}.",
)  # fmt: skip
KVM_UNKNOWN = Kind(
    "kvm-unknown", _L, Level.UNKNOWN, "Whether the kernel has KVM is not known",
    "Neither /proc/modules nor the kernel's lists of modules could be read.",
    "Make /proc, /sys and /lib/modules readable.", decides=True,
)  # fmt: skip
NESTED_ON = Kind("nested-on", _L, Level.OK, "Nesting is on", "Guests can be given the extension.")
NESTED_OFF = Kind(
    "nested-off", _L, Level.FAIL, "Nesting is off",
    "The nested parameter of the KVM module is off, so that its guests never see vmx, svm or sie. "
    "It can only be set while the module is loaded anew.",
    "sudo undervisor enable (or --dry-run to see the steps: stop all guests, unload and reload the "
    "module with nested=1, and write /etc/modprobe.d)",
    ("Linux Documentation, Running nested guests with KVM",),
)  # fmt: skip
NESTED_OFF_BUILT_IN = Kind(
    "nested-off-built-in", _L, Level.FAIL, "Nesting is off, and KVM is built in",
    "A built-in module can't be reloaded and does not read /etc/modprobe.d.",
    "Add {module}.nested=1 to the kernel command line and restart: sudo undervisor enable.",
)  # fmt: skip
NESTED_UNKNOWN = Kind(
    "nested-unknown", _L, Level.UNKNOWN, "Whether nesting is on is not known",
    "The nested parameter could not be read or understood.",
    "cat /sys/module/{module}/parameters/nested", decides=True,
)  # fmt: skip
CONFIG_DISAGREES = Kind(
    "nested-config-disagrees", _L, Level.WARN, "The configuration says otherwise about nesting",
    "The next load of the module, at the latest the next start, changes it.",
    "sudo undervisor enable (or disable) makes the configuration agree.",
)  # fmt: skip
PAGING_OFF = Kind(
    "nested-paging-off", _L, Level.WARN, "EPT or NPT is switched off by a parameter",
    "KVM shadows page tables in software, for nested guests twice.",
    "Remove {parameter}=0 from /etc/modprobe.d and the kernel command line, and reload {module}.",
)  # fmt: skip
ASSISTS_OFF = Kind(
    "nested-assists-off", _L, Level.NOTE, "Parameters that speed up nesting are off",
    "Without shadow VMCS every VMREAD and VMWRITE of L1 exits; without vgif and vls every STGI, "
    "CLGI, VMLOAD and VMSAVE does; without unrestricted guest, L2's real mode is emulated.",
    "Set them to 1 in /etc/modprobe.d and reload the module. Where the processor lacks the feature "
    "the kernel keeps them off.",
)  # fmt: skip
OTHER_HYPERVISOR = Kind(
    "other-hypervisor-loaded", _L, Level.WARN, "Another hypervisor's module is loaded",
    "Only one hypervisor can hold VMX or SVM operation at a time. Since 6.12 KVM takes it when it "
    "loads, and the other says VERR_VMX_IN_VMX_ROOT_MODE; before, the first to start a guest wins.",
    "Use one of them: unload the other's module (vboxdrv, vmmon), or KVM with kvm.enable_virt_at_"
    "load=0 and never both at once.",
)  # fmt: skip
OLD = Kind(
    "kernel-old", _L, Level.WARN, "This kernel is too old for dependable nesting",
    "Before 4.20 nesting is off by default and the nested state of a guest can't be saved; many "
    "fixes for L2 came later.",
    "Use a kernel of a maintained branch: 6.6 or later.",
    ("Linux Documentation, Running nested guests with KVM",),
)  # fmt: skip
KNOWN_DEFECT = Kind(
    "kernel-known-defect", _L, Level.WARN, "This very kernel release is known to break nesting",
    "A regression came with one release of a stable branch and went with another.",
    "Update to {fixed} or later of the same branch.",
)  # fmt: skip
SOFT_LOCKUPS = Kind(
    "soft-lockups", _L, Level.WARN, "The kernel logged soft lockups",
    "A processor did not get to schedule for many seconds. In an L1 or L2 that is the usual sign "
    "of an overcommitted or defective level below; nested guests on it are not dependable, so a CI "
    "that needs them should not run here.",
    "Compare the logs of all levels for the same time (undervisor report), lower the number of "
    "vCPUs, and update the kernel of the level below.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Defect:
    """Releases from `broken` up to, not including, `fixed` in one stable branch."""

    broken: Version
    fixed: Version
    what: str
    source: str


DEFECTS: tuple[Defect, ...] = (
    Defect(
        Version(4, 19, 78), Version(4, 19, 79),
        "a backport to 4.19.78 broke nested guests", "NixOS/nixpkgs#76839",
    ),
)  # fmt: skip

_REFUSALS = (
    r"no hardware support for|kvm.*: (?:VMX|SVM|vmx|svm) (?:not|is not) (?:supported|available)"
)
_REFUSALS += r"|support for 'kvm_(?:intel|amd)'|disabled by bios|disabled \(by BIOS\)"
_OTHERS = ("vboxdrv", "vmmon", "vmw_vmci_host", "hax")
_ASSISTS = {
    "kvm_intel": ("unrestricted_guest", "enable_shadow_vmcs"),
    "kvm_amd": ("vgif", "vls"),
}
_PAGING = {"kvm_intel": "ept", "kvm_amd": "npt"}


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about the kernel."""
    yield from _version(machine)
    if machine.kvm.others and machine.kvm.presence not in (Presence.LOADED, Presence.BUILT_IN):
        yield SOFTWARE_BACKEND.found("active backend: " + ", ".join(machine.kvm.others))
    elif machine.processor.x86 and not machine.processor.extension:
        yield KVM_UNKNOWN.found("which backend it needs: the processor's vendor is not known")
    elif not extension_missing(machine):
        yield from _presence(machine)
    if machine.kvm.presence in (Presence.LOADED, Presence.BUILT_IN):
        if not extension_missing(machine) and machine.kvm.expected in _nesting_modules(machine):
            yield from _nested(machine)
        yield from _parameters(machine)
    loaded = [name for name in _OTHERS if name in value_or(machine.kernel.modules, {})]
    if loaded:
        yield OTHER_HYPERVISOR.found("loaded: " + ", ".join(loaded))
    lockups = machine.kernel.logged(r"soft lockup - CPU#\d+ stuck")
    if lockups:
        yield SOFT_LOCKUPS.found(*lockups)


def _nesting_modules(machine: Machine) -> set[str]:
    """Modules whose `nested` parameter we understand."""
    return {"kvm_intel", "kvm_amd"} | ({"kvm"} if machine.processor.extension == "sie" else set())


def _version(machine: Machine) -> Iterator[Finding]:
    version = machine.kernel.version
    if not isinstance(version, Known) or not machine.processor.x86:
        return
    # Red Hat's kernels keep their number and take nested code from much later ones.
    if version.value < Version(4, 20) and ".el" not in value_or(machine.kernel.release, ""):
        yield OLD.found(f"kernel {value_or(machine.kernel.release, '')}")
    for defect in DEFECTS:
        if defect.broken <= version.value < defect.fixed:
            yield KNOWN_DEFECT.found(f"{version.value}: {defect.what}", defect.source,
                                     fixed=str(defect.fixed))  # fmt: skip


def _presence(machine: Machine) -> Iterator[Finding]:
    module, presence = machine.kvm.expected, machine.kvm.presence
    if presence in (Presence.LOADED, Presence.BUILT_IN):
        yield LOADED.found(f"{module} is {presence.value}")
    elif presence is Presence.MISSING:
        yield MISSING.found(f"{module} is {presence.value}")
    elif presence is Presence.UNKNOWN:
        yield KVM_UNKNOWN.found(unknowable(machine.kernel.modules), machine.kernel.available)
    else:
        forbidden = machine.kernel.forbidden(module)
        refused = machine.kernel.logged(_REFUSALS, most=1)
        if forbidden:
            yield FORBIDDEN.found(*forbidden, module=module)
        elif refused:
            yield REFUSED.found(*refused, module=module)
        else:
            yield NOT_LOADED.found(f"{module} is {presence.value}", module=module)


def _configured(machine: Machine) -> tuple[bool, str] | None:
    """What the configuration says about nested at the next load, and where."""
    module = machine.kvm.expected
    found = None
    if machine.kvm.presence is not Presence.BUILT_IN:
        for path, value in machine.kernel.options(module, "nested"):
            found = (value, path)
    # The kernel command line reaches modules too, but modprobe's own options come first there;
    # the kernel applies the later word, which is modprobe's.
    word = machine.kernel.parameter(f"{module}.nested")
    if word is not None and found is None:
        found = (word, "the kernel command line")
    if found is None:
        return None
    try:
        return boolean(found[0]), found[1]
    except ValueError:
        return None


def _nested(machine: Machine) -> Iterator[Finding]:
    module, nested = machine.kvm.expected, machine.kvm.nested
    configured = _configured(machine)
    if not isinstance(nested, Known):
        yield NESTED_UNKNOWN.found(nested, module=module)
        return
    source = f"{nested.source} is {'on' if nested.value else 'off'}"
    if nested.value:
        yield NESTED_ON.found(source)
    elif isinstance(machine.place.wsl, Known):
        return
    elif machine.kvm.presence is Presence.BUILT_IN:
        yield NESTED_OFF_BUILT_IN.found(source, module=module)
    else:
        yield NESTED_OFF.found(source)
    if configured and configured[0] != nested.value:
        word = "on" if configured[0] else "off"
        yield CONFIG_DISAGREES.found(f"{configured[1]} switches nested {word}", source)


def _off(machine: Machine, name: str) -> bool:
    return value_or(machine.kvm.parameter(name), "") in ("N", "0", "n")


def _parameters(machine: Machine) -> Iterator[Finding]:
    module = machine.kvm.expected
    paging = _PAGING.get(module, "")
    if paging and _off(machine, paging) and machine.processor.has(paging) is not False:
        yield PAGING_OFF.found(f"{module} {paging} is off", parameter=paging, module=module)
    if not isinstance(machine.place.hypervisor, Absent):
        return
    off = [name for name in _ASSISTS.get(module, ()) if _off(machine, name)]
    if off:
        yield ASSISTS_OFF.found(f"{module}: " + ", ".join(f"{name} is off" for name in off))


assert set(_ASSISTS) <= set(HARDWARE_BACKENDS)
