"""Plan to switch nesting on or off: now, by a reload, and for good, by the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.kernel import parse_modprobe
from undervisor.host.facts.kvm import Presence
from undervisor.host.facts.machine import Machine
from undervisor.host.fixes.plan import Command, FileChange, Plan

OUR_FILE = "/etc/modprobe.d/zz-undervisor-nested.conf"
"""Sorts after what packages ship, and modprobe lets the last word win."""

_HEADER = "# Written by `undervisor enable` or `undervisor disable`; --undo takes it back.\n"

INITRAMFS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("/usr/sbin/update-initramfs", ("update-initramfs", "-u")),
    ("/usr/bin/dracut", ("dracut", "-f")),
    ("/usr/sbin/dracut", ("dracut", "-f")),
    ("/usr/bin/mkinitcpio", ("mkinitcpio", "-P")),
)
"""The distributions' own tools: the file that shows them, and how they are called."""

_GRUB_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("/usr/sbin/update-grub", ("update-grub",)),
    ("/usr/sbin/grub2-mkconfig", ("grub2-mkconfig", "-o", "/boot/grub2/grub.cfg")),
    ("/usr/bin/grub-mkconfig", ("grub-mkconfig", "-o", "/boot/grub/grub.cfg")),
)

_GRUB_FILE = "/etc/default/grub"
_KERNEL_INSTALL_FILE = "/etc/kernel/cmdline"
_KERNEL_INSTALL_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("/usr/bin/reinstall-kernels", ("reinstall-kernels",)),
    ("/usr/bin/kernel-install", ("kernel-install", "add-all")),
)
_SUPPORTED = ("kvm_intel", "kvm_amd", "kvm")


def plan_nested(host: Host, machine: Machine, on: bool, *, now: bool = True) -> Plan:
    """The plan; `now` is false where only the configuration shall change."""
    title = f"switch nested virtualization {'on' if on else 'off'}"
    module = machine.kvm.expected
    refusal = _refusal(machine)
    if refusal:
        return Plan(title, refusal=refusal)
    if machine.kvm.presence is Presence.BUILT_IN:
        return _plan_built_in(host, machine, on, title)
    changes = tuple(_file_changes(host, module, _options(module, on)))
    commands = tuple(_initramfs(host)) if changes else ()
    running = value_or(machine.kvm.nested, None)
    if not now or machine.kvm.presence is not Presence.LOADED:
        restart = "" if running == on or not changes else f"or unload and load {module} by hand"
        return Plan(title, changes, commands, restart=restart)
    if running == on and not _hpage_in_the_way(machine, on):
        return Plan(title, changes, commands)
    holders = _holders(machine)
    if holders:
        return Plan(title, changes, commands, refusal=holders)
    return Plan(title, changes, (*commands, *_reload(machine, on)))


def plan_root(host: Host, module: str, on: bool) -> Plan:
    """The plan for the system in a folder, whose kernel is not running: its configuration."""
    title = f"switch nested virtualization {'on' if on else 'off'} in {host.name}"
    changes = tuple(_file_changes(host, module, _options(module, on)))
    return Plan(title, changes, tuple(_initramfs(host)) if changes else ())


def _refusal(machine: Machine) -> str:
    """Why this machine is not one to plan for."""
    module = machine.kvm.expected
    if isinstance(machine.place.wsl, Known):
        return ("WSL takes its kernel's settings from Windows: set nestedVirtualization=true and "
                f"kernelCommandLine={module.replace('_', '-')}.nested=1 in .wslconfig")  # fmt: skip
    if isinstance(machine.place.container, Known):
        return "a container can't configure its host's kernel: run it on the host"
    if module not in _SUPPORTED or not machine.processor.extension:
        architecture = value_or(machine.processor.architecture, "this architecture")
        return f"on {architecture} nesting is not a parameter of the KVM module"
    if machine.processor.has(machine.processor.extension) is False:
        return f"the processor shows no {machine.processor.extension}: see `undervisor check`"
    if machine.kvm.presence in (Presence.MISSING, Presence.UNKNOWN):
        return f"{module} is {machine.kvm.presence.value}: see `undervisor check`"
    return ""


def _holders(machine: Machine) -> str:
    """Who holds the module, as a refusal; empty where nobody does."""
    guests = [g for g in value_or(machine.software.guests, ()) if g.holds_kvm is not False]
    guests = [g for g in guests if g.holds_kvm or g.wants_kvm]
    module = value_or(machine.kernel.modules, {}).get(machine.kvm.expected)
    names = ", ".join(f"{g.name} (pid {g.pid})" for g in guests)
    if guests:
        return f"running guests hold {machine.kvm.expected}: {names}; stop them, or use --later"
    if module and module.references:
        used = f" by {', '.join(module.users)}" if module.users else ""
        return (f"{module.name} is in use{used} ({module.references} references) although no "
                "QEMU was found; stop its users, or use --later")  # fmt: skip
    return ""


def _options(module: str, on: bool) -> str:
    """The parameters for modprobe; on s390x, where KVM is one module, huge pages exclude it."""
    return f"nested={int(on)}" + (" hpage=0" if module == "kvm" and on else "")


def _hpage_in_the_way(machine: Machine, on: bool) -> bool:
    return (machine.processor.extension == "sie" and on
            and value_or(machine.kvm.parameter("hpage"), "0") not in ("0", "N"))  # fmt: skip


def _file_changes(host: Host, module: str, options: str) -> Iterator[FileChange]:
    """Say ours, then take other words for the same out of the operator's files.

    In this order, what modprobe makes of the whole is the old or the new at every moment.
    """
    names = {word.partition("=")[0] for word in options.split()}
    ours = host.read_text(OUR_FILE)
    text_of_ours = f"{_HEADER}options {module} {options}\n"
    before = ours.value if isinstance(ours, Known) else None
    if before != text_of_ours:
        yield FileChange(OUR_FILE, before, text_of_ours, "for every later load of the module")
    for name in value_or(host.listdir("/etc/modprobe.d"), ()):
        path = f"/etc/modprobe.d/{name}"
        text = host.read_text(path)
        if path == OUR_FILE or not name.endswith(".conf") or not isinstance(text, Known):
            continue
        after = _without(text.value, module, names)
        if after != text.value:
            yield FileChange(path, text.value, after, f"it sets {' and '.join(sorted(names))}")


def _without(text: str, module: str, names: set[str]) -> str:
    """`text` without words that set `names` of `module`; lines left empty of options go."""
    kept = []
    for line in text.splitlines(keepends=True):
        parsed = parse_modprobe("", line)
        if parsed and parsed[0].verb == "options" and parsed[0].module == module:
            words = [w for w in parsed[0].words if w.partition("=")[0] not in names]
            if len(words) != len(parsed[0].words):
                head = " ".join(line.split()[:2])
                line = f"{head} {' '.join(words)}\n" if words else ""
        kept.append(line)
    return "".join(kept)


def _initramfs(host: Host) -> Iterator[Command]:
    """The image that the kernel starts from may hold a copy of /etc/modprobe.d."""
    for path, argv in INITRAMFS:
        if value_or(host.exists(path), False):
            yield Command(argv, "the initramfs holds a copy of the configuration")
            return


def _reload(machine: Machine, on: bool) -> Iterator[Command]:
    """Unload what depends on the module, the module, and load it anew."""
    module = machine.kvm.expected
    loaded = value_or(machine.kernel.modules, {})
    dependents = loaded[module].users if module in loaded else ()
    for dependent in dependents:
        yield Command(("modprobe", "-r", dependent), f"it uses {module}")
    yield Command(("modprobe", "-r", module), "nested is read only when the module loads")
    yield Command(
        ("modprobe", module, *_options(module, on).split()), "load it anew", ("modprobe", module)
    )


def _plan_built_in(host: Host, machine: Machine, on: bool, title: str) -> Plan:
    """A built-in module listens to the kernel command line alone."""
    word = f"{machine.kvm.expected}.nested={int(on)}"
    restart = "KVM is built into this kernel, which reads the parameter only when it starts"
    if value_or(machine.kvm.nested, None) == on and _says(machine, on):
        return Plan(title)
    if value_or(host.exists("/usr/sbin/grubby"), False):
        # Where grubby is, boot entries are files of their own that GRUB's file does not reach.
        argv = ("grubby", "--update-kernel=ALL", f"--args={word}")
        return Plan(title, (), (Command(argv, "the kernel command line"),), restart=restart)
    for path in (_GRUB_FILE, _KERNEL_INSTALL_FILE):
        text = host.read_text(path)
        if isinstance(text, Known):
            return _plan_boot_file(host, machine, on, path, text.value)
    where = "neither grubby nor /etc/default/grub nor /etc/kernel/cmdline is here"
    refusal = f"add {word} to the kernel command line in this machine's boot loader: {where}"
    return Plan(title, refusal=refusal)


def _plan_boot_file(host: Host, machine: Machine, on: bool, path: str, text: str) -> Plan:
    """Change the file that holds the command line, and run the tool that spreads it."""
    title = f"switch nested virtualization {'on' if on else 'off'}"
    word = f"{machine.kvm.expected}.nested={int(on)}"
    restart = "KVM is built into this kernel, which reads the parameter only when it starts"
    change = _grub_with if path == _GRUB_FILE else _line_with
    after = change(text, machine.kvm.expected, word)
    if after == text:
        return Plan(title, restart="" if value_or(machine.kvm.nested, None) == on else restart)
    tools = _GRUB_TOOLS if path == _GRUB_FILE else _KERNEL_INSTALL_TOOLS
    tool = next((argv for place, argv in tools if value_or(host.exists(place), False)), ())
    commands = (Command(tool, "write the boot loader's own configuration"),) if tool else ()
    notes = () if tool else ("no tool was found: write the boot loader's configuration by hand",)
    changes = (FileChange(path, text, after, "the kernel command line"),)
    return Plan(title, changes, commands, restart=restart, notes=notes)


def _says(machine: Machine, on: bool) -> bool:
    """Whether the running kernel was told, or needs no telling because it is its default."""
    told = machine.kernel.parameter(f"{machine.kvm.expected}.nested")
    return told is None or told in (("1", "Y", "y") if on else ("0", "N", "n"))


def _line_with(text: str, module: str, word: str) -> str:
    """A command line by itself, with `word` and without an older one for the same parameter."""
    return f"{_older(module).sub('', text).strip()} {word}\n"


def _older(module: str) -> re.Pattern[str]:
    """Words that set the parameter; dashes and underscores are the same to the kernel."""
    return re.compile(rf"\s*\b{re.escape(module).replace('_', '[-_]')}\.nested=\w*")


def _grub_with(text: str, module: str, word: str) -> str:
    """GRUB_CMDLINE_LINUX with `word`, and without an older word for the same parameter."""
    old = _older(module)
    line = re.compile(r"^(GRUB_CMDLINE_LINUX=)([\"']?)(.*?)\2\s*$", re.M)
    cleared = re.sub(r"^GRUB_CMDLINE_LINUX(?:_DEFAULT)?=.*$", lambda m: old.sub("", m[0]), text,
                     flags=re.M)  # fmt: skip
    match = line.search(cleared)
    if not match:
        return (
            cleared
            + ("" if cleared.endswith("\n") or not cleared else "\n")
            + (f'GRUB_CMDLINE_LINUX="{word}"\n')
        )
    quote = match[2] or '"'
    value = f"{match[3].strip()} {word}".strip()
    return cleared[: match.start()] + f"{match[1]}{quote}{value}{quote}" + cleared[match.end() :]
