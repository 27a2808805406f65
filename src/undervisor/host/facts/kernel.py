"""The running kernel: version, origin, command line, modules and what it logged."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase

from undervisor.host.access.protocol import Host, Output
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown, then, value_or
from undervisor.host.facts.version import Flavour, Version, flavour, parse_version

MODPROBE_FOLDERS = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d")
"""Where modprobe reads its configuration; a file hides those of the same name further right."""


@dataclass(frozen=True, slots=True)
class Module:
    """A row of /proc/modules."""

    name: str
    references: int
    users: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModprobeLine:
    """One line of modprobe's configuration: `verb module words`."""

    path: str
    verb: str
    module: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Facts about the kernel; `builtin` and `available` hold module names with underscores."""

    release: Fact[str]
    version: Fact[Version]
    flavour: Flavour
    distribution: Fact[dict[str, str]]
    command_line: Fact[tuple[str, ...]]
    modules: Fact[dict[str, Module]]
    builtin: Fact[frozenset[str]]
    available: Fact[frozenset[str]]
    modprobe: tuple[ModprobeLine, ...]
    log: Fact[str]

    def logged(self, pattern: str, most: int = 3) -> list[str]:
        """The last lines of the log that match."""
        shape = re.compile(pattern, re.I)
        lines = [line for line in value_or(self.log, "").splitlines() if shape.search(line[:1000])]
        return [line[:200] for line in lines[-most:]]

    def parameter(self, name: str) -> str | None:
        """The last value that the command line gives a parameter; dashes and underscores are the
        same there, a word without a value is on."""
        found = None
        for word in value_or(self.command_line, ()):
            key, equals, value = word.partition("=")
            if key.replace("-", "_") == name.replace("-", "_"):
                found = value if equals else "1"
        return found

    def options(self, module: str, parameter: str) -> list[tuple[str, str]]:
        """Where modprobe's configuration sets a module's parameter: file and value, last wins."""
        return [
            (line.path, word.partition("=")[2] or "1")
            for line in self.modprobe
            if line.verb == "options" and line.module == module
            for word in line.words
            if word.partition("=")[0].replace("-", "_") == parameter
        ]

    def forbidden(self, module: str) -> list[str]:
        """Lines that keep `module` from loading: blacklists, and `install` of nothing."""
        found = [
            f"{line.path}: {line.verb} {line.module} {' '.join(line.words)}".rstrip()
            for line in self.modprobe
            if line.module == module
            and (line.verb == "blacklist" or (line.verb == "install" and _does_nothing(line.words)))
        ]
        for key in ("module_blacklist", "modprobe.blacklist", "initcall_blacklist"):
            value = self.parameter(key) or ""
            if module in value.replace("-", "_").split(","):
                found.append(f"kernel command line: {key}={value}")
        return found


def _does_nothing(words: tuple[str, ...]) -> bool:
    return bool(words) and words[0].rsplit("/", 1)[-1] in ("true", "false", ":")


def parse_modules(text: str) -> dict[str, Module]:
    """The rows of /proc/modules; lines of another form are skipped."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[1].isdigit():
            users = tuple(name for name in words[3].split(",") if name not in ("", "-"))
            count = int(words[2]) if words[2].isdigit() and len(words[2]) < 10 else 0
            found[words[0]] = Module(words[0], count, users)
    return found


def parse_modprobe(path: str, text: str) -> list[ModprobeLine]:
    """The lines of one configuration file, continuation lines joined, comments left out."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = line.split()
        if len(words) >= 2 and not words[0].startswith("#"):
            module = words[1].replace("-", "_")
            lines.append(ModprobeLine(path, words[0], module, tuple(words[2:])))
    return lines


def modprobe_lines(host: Host) -> tuple[ModprobeLine, ...]:
    """modprobe's whole configuration in the order in which modprobe reads it (by file name)."""
    chosen: dict[str, str] = {}
    for folder in MODPROBE_FOLDERS:
        for name in value_or(host.listdir(folder), ()):
            if name.endswith(".conf"):
                chosen.setdefault(name, f"{folder}/{name}")
    lines: list[ModprobeLine] = []
    for name in sorted(chosen):
        lines += parse_modprobe(chosen[name], value_or(host.read_text(chosen[name]), ""))
    return tuple(lines)


def parse_os_release(text: str) -> dict[str, str]:
    """os-release: shell-like assignments."""
    found = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key.isidentifier():
            try:
                found[key] = " ".join(shlex.split(value))
            except ValueError:
                found[key] = value
    return found


def _names(text: str) -> frozenset[str]:
    """Module names in a list of module files."""
    found = (line.split(":")[0].rsplit("/", 1)[-1] for line in text.splitlines())
    return frozenset(re.sub(r"\.ko(\.\w+)?$", "", name).replace("-", "_") for name in found if name)


def _of_modules(host: Host, release: Fact[str], name: str) -> Fact[frozenset[str]]:
    """The names in /lib/modules/RELEASE/NAME; of interest are only those of virtualization."""
    if not isinstance(release, Known):
        return release
    text = host.read_text(f"/lib/modules/{release.value}/{name}", 8 << 20)
    wanted = ("kvm*", "vbox*", "vm*", "irqbypass")
    return then(
        text,
        lambda text: frozenset(
            module for module in _names(text) if any(fnmatchcase(module, w) for w in wanted)
        ),
    )


def _log(host: Host) -> Fact[str]:
    """The kernel's messages; who may not read them learns so."""
    fact = host.run(["dmesg"])
    if not isinstance(fact, Known):
        return Unknown("dmesg", str(fact)) if isinstance(fact, Absent) else fact
    output: Output = fact.value
    if output.status:
        if "not permitted" in output.stderr or "denied" in output.stderr:
            return Denied("dmesg", "run it as root, or set kernel.dmesg_restrict=0")
        return Unknown("dmesg", output.stderr.strip()[:200] or f"status {output.status}")
    return Known(output.stdout, "dmesg")


def _release(text: str) -> str:
    if not re.fullmatch(r"[\w.+~-]{1,64}", text):
        raise ValueError(f"{text[:60]!r} is no kernel release")
    return text


def _version(host: Host, release: Fact[str]) -> Fact[Version]:
    """The kernel.org version that the kernel was built from.

    Debian and Ubuntu keep `X.Y.0` in the release and say the true version elsewhere.
    """
    signature = host.read_line("/proc/version_signature")
    if isinstance(signature, Known) and len(signature.value.split()) == 3:
        return then(signature, lambda text: parse_version(text.split()[2]))
    banner = host.read_line("/proc/version")
    match = re.search(r" Debian (\d+\.\d+\.\d+)", value_or(banner, ""))
    if match:
        return Known(parse_version(match[1]), "/proc/version")
    return then(release, parse_version)


def kernel(host: Host) -> Kernel:
    """Read the kernel's facts."""
    release = then(host.read_line("/proc/sys/kernel/osrelease"), _release)
    return Kernel(
        release=release,
        version=_version(host, release),
        flavour=flavour(value_or(release, "")),
        distribution=then(host.read_text("/etc/os-release"), parse_os_release),
        command_line=then(host.read_text("/proc/cmdline"), lambda text: tuple(text.split())),
        modules=then(host.read_text("/proc/modules"), parse_modules),
        builtin=_of_modules(host, release, "modules.builtin"),
        available=_of_modules(host, release, "modules.dep"),
        modprobe=modprobe_lines(host),
        log=_log(host),
    )
