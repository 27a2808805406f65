"""`Host`: the one way to look at a machine, and what a look returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from undervisor.host.fact import Fact, Known, then

TEXT_LIMIT = 1 << 20
"""Bytes of a file that a fact may need; a longer file is not the one we mean."""

OUTPUT_LIMIT = 8 << 20
"""Bytes of a command's output; dmesg of a large machine is about 2 MiB."""

RUN_SECONDS = 10.0
"""Seconds that a command may take; a healthy one takes far less."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What `stat` says: `kind` is file, folder, character, block, link, fifo or socket."""

    kind: str
    mode: int
    owner: str
    group: str
    device: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Cpuid:
    """The four registers that CPUID returns."""

    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass(frozen=True, slots=True)
class User:
    """Who looks: the effective user and the names of the groups."""

    uid: int
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """TSC ticks: the median of one CPUID (which always exits from a guest under VMX) and of a
    plain serializing-free instruction sequence of the same shape."""

    cpuid_ticks: int
    plain_ticks: int


@dataclass(frozen=True, slots=True)
class KvmOffer:
    """What KVM's device answers: KVM_GET_API_VERSION, KVM_CAP_NESTED_STATE (bytes), and whether
    KVM_GET_SUPPORTED_CPUID holds VMX or SVM."""

    api_version: int
    nested_state: int
    vmx: bool
    svm: bool


class Host(Protocol):
    """A machine to look at; nothing here changes it.

    Paths are absolute.  No method raises for what the machine does: every outcome is a fact.
    """

    name: str
    live: bool

    def read_bytes(self, path: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """The whole file; unknown where it is longer than `limit` bytes."""
        ...

    def listdir(self, path: str) -> Fact[tuple[str, ...]]:
        """The names in a folder, sorted."""
        ...

    def stat(self, path: str) -> Fact[Stat]:
        """Kind, mode, owner and group, following links."""
        ...

    def usable(self, path: str) -> Fact[bool]:
        """Whether this user may read and write `path`, as access(2) says (ACLs count)."""
        ...

    def run(self, argv: Sequence[str], timeout: float = RUN_SECONDS) -> Fact[Output]:
        """Run a command without a shell; absent where there is no such command."""
        ...

    def cpuid(self, leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
        """CPUID on the first processor."""
        ...

    def msr(self, index: int) -> Fact[int]:
        """A model-specific register of the first processor; EIO is the MSR's own #GP."""
        ...

    def user(self) -> Fact[User]:
        """Who looks."""
        ...

    def timing(self) -> Fact[Timing]:
        """What an exiting instruction costs against a plain one."""
        ...

    def kvm(self) -> Fact[KvmOffer]:
        """Open KVM's device and ask what it offers; makes no guest."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...

    def read_text(self, path: str, limit: int = TEXT_LIMIT) -> Fact[str]:
        """The file as text; bytes that are not UTF-8 are replaced, NULs and all."""
        return then(self.read_bytes(path, limit), lambda raw: raw.decode("utf-8", "replace"))

    def read_line(self, path: str) -> Fact[str]:
        """The stripped text of a one-line file, as sysfs has them."""
        return then(self.read_text(path, 4096), lambda text: text.strip("\0 \n\t"))

    def exists(self, path: str) -> Fact[bool]:
        """Whether `path` is there; denied and unknown stay what they are."""
        from undervisor.host.fact import Absent

        fact = self.stat(path)
        if isinstance(fact, Absent):
            return Known(False, fact.source)
        return then(fact, lambda _: True)
