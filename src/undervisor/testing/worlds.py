"""L1 or L2 of a machine in another process: `undervisor.api.World` at arm's length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RemoteWorld:
    """One level on one vCPU: registers by name, memory by gva and gpa, and where they lead."""

    def __init__(self, call: Callable[..., Any], level: int, vcpu: int) -> None:
        self._call = call
        self.level = level
        self.vcpu = vcpu

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        return self._call("world", self.level, self.vcpu, method, *arguments, **options)

    def __getitem__(self, name: str) -> int:
        """A register; KeyError for an unknown name, NotThere for a value that nobody knows."""
        __tracebackhide__ = True
        return int(self._ask("__getitem__", name))

    def __setitem__(self, name: str, value: int) -> None:
        """Write a register; NotThere where L0 does not hold it."""
        __tracebackhide__ = True
        self._ask("__setitem__", name, value)

    def registers(self) -> dict[str, int]:
        """All registers whose values are known."""
        found: dict[str, int] = self._ask("registers")
        return found

    @property
    def is_running(self) -> bool:
        """Whether this world is the one on its vCPU; the other is suspended."""
        return bool(self._ask("is_running"))

    @property
    def exists(self) -> bool:
        """Whether there is such a world: an L2 that has been entered."""
        return bool(self._ask("exists"))

    def to_gpa(self, gva: int, *, write: bool = False) -> int:
        """The guest-physical address of a linear one; NotThere where unmapped."""
        __tracebackhide__ = True
        return int(self._ask("to_gpa", gva, write=write))

    def to_hpa(self, gpa: int, *, write: bool = False) -> int:
        """The host-physical address of this world's guest-physical one."""
        __tracebackhide__ = True
        return int(self._ask("to_hpa", gpa, write=write))

    def read_gpa(self, gpa: int, size: int) -> bytes:
        """`size` bytes of this world's guest-physical memory."""
        __tracebackhide__ = True
        return bytes(self._ask("read_gpa", gpa, size))

    def write_gpa(self, gpa: int, data: bytes) -> None:
        """Write this world's guest-physical memory; nothing where a page is not there."""
        __tracebackhide__ = True
        self._ask("write_gpa", gpa, data)

    def read_gva(self, gva: int, size: int) -> bytes:
        """`size` bytes at a linear address."""
        __tracebackhide__ = True
        return bytes(self._ask("read_gva", gva, size))

    def write_gva(self, gva: int, data: bytes) -> None:
        """Write at a linear address, if its pages may be written; nothing where one may not."""
        __tracebackhide__ = True
        self._ask("write_gva", gva, data)

    def text_of_registers(self) -> str:
        """What is known of the registers, for people."""
        return str(self._ask("text_of_registers"))
