"""Values as the prompt shows them: hexadecimal numbers, bytes with addresses, faults in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from undervisor.arch.x86.events import Vector
from undervisor.guest.probe.answers import Answer, Fault, Refused

WIDTH = 16


class Hex(int):
    """A number from the machine; shown in hexadecimal."""

    def __repr__(self) -> str:
        return f"{int(self):#x}"


class Bytes(bytes):
    """Memory; shown as a dump.  `address` is where it is from."""

    address: int = 0

    def __repr__(self) -> str:
        lines = []
        for at in range(0, len(self), WIDTH):
            part = bytes(self[at : at + WIDTH])
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            lines.append(f"{self.address + at:08x}  {part.hex(' '):{3 * WIDTH}} {text}")
        return "\n".join(lines) or "(no bytes)"


class Leaf(NamedTuple):
    """What CPUID gives."""

    eax: int
    ebx: int
    ecx: int
    edx: int

    def __repr__(self) -> str:
        return "  ".join(f"{name}={value:#010x}" for name, value in self._asdict().items())


class Shown:
    """Some text that is a value; shown as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Raised(Shown):
    """An exception in place of a value: `vector`, `error_code`, `rip`, `cr2`, `registers`."""

    def __init__(self, fault: Fault, hint: str = "") -> None:
        super().__init__(fault_words(fault) + (f" ({hint})" if hint else ""))
        self.vector, self.error_code = fault.vector, fault.error_code
        self.rip, self.cr2 = fault.rip, fault.cr2
        self.registers = fault.registers

    def __bool__(self) -> bool:
        return False


class Failed(Shown):
    """No value: an instruction failed, or the probe could not do it."""

    def __bool__(self) -> bool:
        return False


def fault_words(fault: Fault) -> str:
    """An exception as the manuals write it, and where it was."""
    try:
        vector = Vector(fault.vector)
        name = f"#{vector.name}"
        name += f"({fault.error_code:#x})" if vector.has_error_code else ""
    except ValueError:
        name = f"exception {fault.vector}"
    where = f" for linear address {fault.cr2:#x}" if fault.vector == Vector.PF else ""
    return f"{name}{where} at rip {fault.rip:#x}"


def shown(answer: Answer[Any], hint: str = "") -> object:
    """The answer to an operation as a value: a number, bytes, or a fault in their place."""
    match answer.outcome:
        case Fault() as fault:
            return Raised(fault, hint)
        case Refused() as refused:
            return Failed(f"{answer.what}: {refused}")
        case bool() | None as value:
            return value
        case int() as value:
            return Hex(value)
        case value:
            return value


def register_words(registers: Mapping[str, int], names: Iterable[str] = ()) -> str:
    """Registers in lines of four; without `names`, those that are not zero."""
    wanted = tuple(names) or tuple(name for name, value in registers.items() if value)
    cells = [f"{name:3} {registers[name]:#018x}" for name in wanted]
    return "\n".join("  ".join(cells[at : at + 4]) for at in range(0, len(cells), 4))


def vendor_name(registers: Mapping[str, int]) -> str:
    """The vendor's string of CPUID leaf 0."""
    parts = (registers[name] & 0xFFFF_FFFF for name in ("rbx", "rdx", "rcx"))
    return b"".join(part.to_bytes(4, "little") for part in parts).decode("ascii", "replace")
