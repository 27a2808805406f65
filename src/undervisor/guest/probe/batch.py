"""A batch: operations for the probe that go over in one request and answer in one.

    batch = Batch()
    leaf = batch.cpuid(1)
    tsc = batch.rdmsr(0x10)
    probe.run(batch)
    leaf.value["rcx"], tsc.outcome

Nearly every operation is a call of a routine in the probe's library with some registers in and
some out; what faults gives a `Fault` and the batch goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from undervisor.guest.asm import Code
from undervisor.guest.probe.answers import ALL, REGISTERS, Answer, Fault, Refused, Returned
from undervisor.guest.probe.program import program
from undervisor.guest.probe.protocol import MOST_REQUEST, MOST_RESPONSE, Status

T = TypeVar("T")

HEADER = struct.Struct("<HHI")
FAULT_BYTES = 6 * 8
MOST_BYTES = 0x7000
"""Bytes that one read or write may have."""
MOST_CODE = 0xF00
NEVER = 0xFFFFFFFF
NOT_FINISHED = Refused("the processor has not finished")


class Op(IntEnum):
    """The interpreter's operations."""

    CALL = 0
    READ = 1
    WRITE = 2
    FILL = 3
    COPY = 4
    POST = 5
    COLLECT = 6


@dataclass(frozen=True, slots=True)
class Request:
    """One operation: its bytes, the most that its answer takes, and who takes the answer."""

    data: bytes
    most: int
    out: int
    answer: Answer[Any]
    decode: Callable[[bytes], Any]

    def resolve(self, status: int, data: bytes) -> None:
        """Fill in the answer from a record of the response."""
        match status:
            case Status.OK:
                self.answer.set(self.decode(data))
            case Status.FAULT:
                self.answer.set(_fault(data, self.out))
            case Status.TIMEOUT:
                self.answer.set(NOT_FINISHED)
            case Status.NO_PROCESSOR:
                self.answer.set(Refused("no such processor is idle, or it died"))
            case Status.NO_ROOM:
                self.answer.set(Refused("too many bytes for one answer"))
            case _:
                self.answer.set(Refused(f"the probe answers with status {status}"))


def _registers(data: bytes, mask: int) -> dict[str, int]:
    names = [name for number, name in enumerate(REGISTERS) if mask >> number & 1]
    return dict(zip(names, struct.unpack_from(f"<{len(names)}Q", data), strict=True))


def _returned(mask: int) -> Callable[[bytes], Returned]:
    return lambda data: Returned(int.from_bytes(data[:8], "little"), _registers(data[8:], mask))


def _fault(data: bytes, mask: int) -> Fault:
    vector, error, rip, cs, rsp, cr2, rflags = struct.unpack_from("<7Q", data)
    registers = _registers(data[56:], mask)
    return Fault(vector, error, rip, cs, rsp, cr2, rflags, registers)


def _mask(names: Iterable[str]) -> int:
    mask = 0
    for name in names:
        mask |= 1 << REGISTERS.index(name)
    return mask


class BatchCore:
    """Operations that any processor can do, and the list of all that were asked for."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def add(
        self,
        what: str,
        op: Op,
        arguments: bytes,
        decode: Callable[[bytes], T],
        most: int = 0,
        out: int = 0,
    ) -> Answer[T]:
        """An operation; `most` is the size of its answer where it has data."""
        answer: Answer[T] = Answer(what)
        data = HEADER.pack(op, 0, len(arguments)) + arguments
        most = HEADER.size + max(most, FAULT_BYTES + 8 + 8 * out.bit_count())
        if len(data) > MOST_REQUEST or most > MOST_RESPONSE - 256:
            raise ValueError(f"{what}: {len(data)} bytes are too many for one operation")
        self.requests.append(Request(data, most, out, answer, decode))
        return answer

    def call(
        self,
        where: str | int | bytes | Code,
        registers: Mapping[str, int] | None = None,
        out: Iterable[str] = ALL,
        decode: Callable[[Returned], T] | None = None,
        what: str = "",
    ) -> Answer[Any]:
        """Call a routine of the library by name, code at an address, or the code itself.

        Code is put into the processor's slot and must not depend on its address; a RET is
        appended.  `registers` not given are zero; `rflags` may be among them.  Interrupts are
        disabled.  The answer is a `Returned`, or what `decode` makes of it.
        """
        code = b""
        if isinstance(where, str):
            address, what = program().routine(where), what or where
        elif isinstance(where, int):
            address, what = where, what or f"code at {where:#x}"
        else:
            address, what = 0, what or "inline code"
            code = where.bytes if isinstance(where, Code) else where
            if not 0 < len(code) <= MOST_CODE:
                raise ValueError(f"{len(code)} bytes of inline code; at most {MOST_CODE}")
        given = {("rsp" if k == "rflags" else k): v for k, v in (registers or {}).items()}
        inward, outward = _mask(given), _mask(out)
        values = [given[name] & (1 << 64) - 1 for name in REGISTERS if name in given]
        arguments = struct.pack(f"<I2H{len(values)}Q", address, inward, outward, *values) + code
        take = _returned(outward)
        if decode is None:
            return self.add(what, Op.CALL, arguments, take, out=outward)
        then = decode
        return self.add(what, Op.CALL, arguments, lambda data: then(take(data)), out=outward)

    # Memory, by physical address: the first 4 GiB are mapped identically

    def read(self, gpa: int, size: int) -> Answer[bytes]:
        """The bytes at `gpa`."""
        arguments = struct.pack("<2Q", gpa, size)
        return self.add(f"read at {gpa:#x}", Op.READ, arguments, bytes, size)

    def write(self, gpa: int, data: bytes) -> Answer[None]:
        """`data` to `gpa`; at most `MOST_BYTES`, `Probe.load` takes more."""
        arguments = struct.pack("<Q", gpa) + data
        return self.add(f"write at {gpa:#x}", Op.WRITE, arguments, _nothing)

    def fill(self, gpa: int, size: int, byte: int = 0) -> Answer[None]:
        """`size` times `byte` at `gpa`."""
        arguments = struct.pack("<3Q", gpa, size, byte)
        return self.add(f"fill at {gpa:#x}", Op.FILL, arguments, _nothing)

    def copy(self, to: int, source: int, size: int) -> Answer[None]:
        """`size` bytes from `source` to `to`; they may overlap."""
        arguments = struct.pack("<3Q", to, source, size)
        return self.add(f"copy to {to:#x}", Op.COPY, arguments, _nothing)

    def peek(self, gpa: int, bits: int = 32) -> Answer[int]:
        """One load of 8, 16, 32 or 64 bits: for device registers."""
        return self.call(f"peek{bits}", {"rdi": gpa}, ["rax"], _rax, f"peek at {gpa:#x}")

    def poke(self, gpa: int, value: int, bits: int = 32) -> Answer[None]:
        """One store of 8, 16, 32 or 64 bits."""
        inward = {"rdi": gpa, "rax": value}
        return self.call(f"poke{bits}", inward, [], _nothing, f"poke at {gpa:#x}")

    # Instructions

    def cpuid(self, leaf: int, subleaf: int = 0) -> Answer[Returned]:
        """CPUID: rax, rbx, rcx and rdx."""
        out = ("rax", "rbx", "rcx", "rdx")
        return self.call("cpuid", {"rax": leaf, "rcx": subleaf}, out, None, f"CPUID {leaf:#x}")

    def rdmsr(self, msr: int) -> Answer[int]:
        """RDMSR: the 64-bit value."""
        return self.call("rdmsr", {"rcx": msr}, ("rax", "rdx"), _edx_eax, f"RDMSR {msr:#x}")

    def wrmsr(self, msr: int, value: int) -> Answer[None]:
        """WRMSR."""
        inward = {"rcx": msr, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        return self.call("wrmsr", inward, [], _nothing, f"WRMSR {msr:#x}")

    def read_cr(self, number: int) -> Answer[int]:
        """MOV from CR0, CR2, CR3, CR4 or CR8."""
        return self.call(f"read_cr{number}", {}, ["rax"], _rax)

    def write_cr(self, number: int, value: int) -> Answer[None]:
        """MOV to CR0, CR2, CR3, CR4 or CR8."""
        return self.call(f"write_cr{number}", {"rax": value}, [], _nothing)

    def read_dr(self, number: int) -> Answer[int]:
        """MOV from DR0-DR3, DR6 or DR7."""
        return self.call(f"read_dr{number}", {}, ["rax"], _rax)

    def write_dr(self, number: int, value: int) -> Answer[None]:
        """MOV to DR0-DR3, DR6 or DR7."""
        return self.call(f"write_dr{number}", {"rax": value}, [], _nothing)

    def xgetbv(self, number: int = 0) -> Answer[int]:
        """XGETBV: an extended control register."""
        return self.call("xgetbv", {"rcx": number}, ("rax", "rdx"), _edx_eax)

    def xsetbv(self, number: int, value: int) -> Answer[None]:
        """XSETBV."""
        inward = {"rcx": number, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        return self.call("xsetbv", inward, [], _nothing)

    def inp(self, port: int, bits: int = 8) -> Answer[int]:
        """IN of 8, 16 or 32 bits."""
        return self.call(f"in{bits}", {"rdx": port}, ["rax"], _rax, f"IN {port:#x}")

    def outp(self, port: int, value: int, bits: int = 8) -> Answer[None]:
        """OUT of 8, 16 or 32 bits."""
        inward = {"rdx": port, "rax": value}
        return self.call(f"out{bits}", inward, [], _nothing, f"OUT {port:#x}")

    def rdtsc(self) -> Answer[int]:
        """RDTSC: the 64-bit value."""
        return self.call("rdtsc", {}, ("rax", "rdx"), _edx_eax)

    def invlpg(self, address: int) -> Answer[None]:
        """INVLPG."""
        return self.call("invlpg", {"rdi": address}, [], _nothing)

    def apic_read(self, offset: int) -> Answer[int]:
        """The local APIC's register at `offset`, as xAPIC or as x2APIC."""
        return self.call("apic_read", {"rdi": offset}, ["rax"], _rax)

    def apic_write(self, offset: int, value: int) -> Answer[None]:
        """`value` to the local APIC's register at `offset`."""
        return self.call("apic_write", {"rdi": offset, "rsi": value}, [], _nothing)

    # Other processors

    def start_ap(self, apic_id: int) -> Answer[int]:
        """INIT-SIPI-SIPI; how many processors run then. They are numbered as they arrive."""
        return self.call("start_ap", {"rdi": apic_id}, ["rax"], _rax, f"start of AP {apic_id}")

    def send_ipi(self, apic_id: int, command: int) -> Answer[None]:
        """An interrupt command (ICR 31:0) to one local APIC."""
        return self.call("send_ipi", {"rdi": apic_id, "rsi": command}, [], _nothing)

    def post(self, processor: int, batch: BatchCore) -> Answer[None]:
        """Let a started AP run `batch`, at the same time as what follows here."""
        arguments = struct.pack("<I", processor) + b"".join(r.data for r in batch.requests)
        return self.add(f"batch for processor {processor}", Op.POST, arguments, _nothing)

    def collect(self, processor: int, batch: BatchCore, polls: int = NEVER) -> Answer[None]:
        """Wait until the AP has run `batch`, for `polls` rounds; its answers are then there."""
        return self.add(
            f"answers of processor {processor}",
            Op.COLLECT,
            struct.pack("<2I", processor, polls),
            lambda data: resolve(batch.requests, data),
            sum(request.most for request in batch.requests),
        )


def resolve(requests: list[Request], data: bytes) -> None:
    """Give each record of a response to its request; what has none was not run."""
    at = 0
    for request in requests:
        if at + HEADER.size > len(data):
            request.answer.set(Refused("not run: the answers before it took all room"))
            continue
        _, status, size = HEADER.unpack_from(data, at)
        at += HEADER.size + size
        request.resolve(status, data[at - size : at])


def _nothing(_: object) -> None:
    return None


def _rax(returned: Returned) -> int:
    return returned["rax"]


def _edx_eax(returned: Returned) -> int:
    return (returned["rdx"] & 0xFFFFFFFF) << 32 | returned["rax"] & 0xFFFFFFFF
