"""The machine's memory, by physical address."""

from __future__ import annotations

from undervisor.errors import BadInput
from undervisor.guest.asm import Code
from undervisor.guest.probe.batch import MOST_BYTES
from undervisor.guest.probe.client import Batch
from undervisor.shell.machine import Machine
from undervisor.shell.values import Bytes, Failed, Raised, shown


class Mem:
    """`mem.read(gpa, size)`, `mem.write(gpa, data)`; the first 4 GiB are mapped identically."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def read(self, gpa: int, size: int = 64) -> Bytes | Raised | Failed:
        """`size` bytes, shown as a dump."""
        batch = Batch()
        starts = range(gpa, gpa + size, MOST_BYTES)
        answers = [batch.read(at, min(MOST_BYTES, gpa + size - at)) for at in starts]
        self._machine.run(batch)
        parts = []
        for answer in answers:
            part = shown(answer)
            if isinstance(part, Raised | Failed):
                return part
            assert isinstance(part, bytes)
            parts.append(part)
        found = Bytes(b"".join(parts))
        found.address = gpa
        return found

    def write(self, gpa: int, data: bytes | Code | int, bits: int = 64) -> object:
        """Bytes, code, or a number of 8, 16, 32 or 64 bits; nothing, or the fault."""
        if isinstance(data, int):
            if data < 0 or data >> bits:
                raise BadInput(f"{data:#x} does not fit in {bits} bits")
            data = data.to_bytes(bits // 8, "little")
        content = data.bytes if isinstance(data, Code) else data
        batch = Batch()
        pieces = range(0, len(content), MOST_BYTES)
        answers = [batch.write(gpa + at, content[at : at + MOST_BYTES]) for at in pieces]
        self._machine.run(batch)
        values = [shown(answer) for answer in answers]
        return next((value for value in values if value is not None), None)

    def fill(self, gpa: int, size: int, byte: int = 0) -> object:
        """`size` times `byte`."""
        batch = Batch()
        answer = batch.fill(gpa, size, byte)
        self._machine.run(batch)
        return shown(answer)

    def peek(self, gpa: int, bits: int = 32) -> object:
        """One load of 8, 16, 32 or 64 bits: for device registers."""
        batch = Batch()
        answer = batch.peek(gpa, bits)
        self._machine.run(batch)
        return shown(answer)

    def poke(self, gpa: int, value: int, bits: int = 32) -> object:
        """One store of 8, 16, 32 or 64 bits."""
        batch = Batch()
        answer = batch.poke(gpa, value, bits)
        self._machine.run(batch)
        return shown(answer)

    def __repr__(self) -> str:
        return "mem.read(gpa, size), mem.write(gpa, data), mem.fill, mem.peek, mem.poke"
