"""L2's I/O instructions: the controls and bitmaps that make them exit, and what the exit tells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.conformance.vmx.run import Run

PORT: Final = 0x5000
"""A port with no device behind it."""
REGISTER: Final = {1: "al", 2: "ax", 4: "eax"}
STRING, REP, IMMEDIATE, IN = 1 << 4, 1 << 5, 1 << 6, 1 << 3
IO: Final = ExitReason.IO_INSTRUCTION
FORMS: Final = {
    "in $0x80, %al": IN | IMMEDIATE | 0x80 << 16,
    "in $0x84, %ax": 1 | IN | IMMEDIATE | 0x84 << 16,
    "in $0x80, %eax": 3 | IN | IMMEDIATE | 0x80 << 16,
    "out %al, $0xff": IMMEDIATE | 0xFF << 16,
    "out %ax, $0x81": 1 | IMMEDIATE | 0x81 << 16,
    "out %eax, $0x80": 3 | IMMEDIATE | 0x80 << 16,
    "in %dx, %al": IN | PORT << 16,
    "in %dx, %ax": 1 | IN | PORT << 16,
    "in %dx, %eax": 3 | IN | PORT << 16,
    "out %al, %dx": PORT << 16,
    "out %ax, %dx": 1 | PORT << 16,
    "out %eax, %dx": 3 | PORT << 16,
}
"""Instruction -> exit qualification. SDM, "Exit Qualification for I/O Instructions"."""
STRINGS: Final = {
    "insb": IN | STRING | PORT << 16,
    "insw": 1 | IN | STRING | PORT << 16,
    "insl": 3 | IN | STRING | PORT << 16,
    "outsb": STRING | PORT << 16,
    "outsw": 1 | STRING | PORT << 16,
    "rep outsl": 3 | STRING | REP | PORT << 16,
    "rep insb": IN | STRING | REP | PORT << 16,
}
EDGES: Final = (0x0, 0x60, 0x3F7, 0x7FFC, 0x7FFF, 0x8000, 0x8001, 0xFFFC)


@guest_test("SDM: Exit Qualification for I/O Instructions",
            "SDM: Primary Processor-Based VM-Execution Controls")  # fmt: skip
def io_tells_port_size_direction_and_form(lab: VmxLab) -> None:
    """With "unconditional I/O exiting" IN and OUT exit and tell port, size and operand form."""
    runs = lab.sweep([lab.primary(unconditional_io_exiting=1, use_io_bitmaps=0)] * len(FORMS),
                     sources=list(FORMS), registers={"rdx": PORT, "rax": 0x77})  # fmt: skip
    got = {text: (run.reason, run.qualification, run.length, run.registers["rax"])
           for text, run in zip(FORMS, runs, strict=True)}  # fmt: skip
    each("reason, qualification, length and RAX of", dict(got),
         lambda text: (IO, FORMS[text], len(lab.assemble(text)), 0x77))  # fmt: skip


@guest_test("SDM: Exit Qualification for I/O Instructions",
            "SDM: Information for VM Exits Due to Instruction Execution")  # fmt: skip
def string_io_tells_its_linear_address(lab: VmxLab) -> None:
    """INS and OUTS give the linear address of their operand; segment and size in the information.

    The latter where IA32_VMX_BASIC bit 54 is 1.
    """
    data = lab.places.data
    registers = {"rdx": PORT, "rsi": data, "rdi": data + 8, "rcx": 2}
    runs = lab.sweep([lab.primary(unconditional_io_exiting=1)] * len(STRINGS),
                     sources=list(STRINGS), registers=registers)  # fmt: skip
    got = {text: (run.reason, run.qualification, run[F.GUEST_LINEAR_ADDRESS],
                  run.registers["rcx"])
           for text, run in zip(STRINGS, runs, strict=True)}  # fmt: skip
    each("reason, qualification, linear address and RCX of", dict(got),
         lambda text: (IO, STRINGS[text], data + 8 if "ins" in text else data, 2))  # fmt: skip
    if lab.facts.basic.ins_outs_information:
        sources = ["outsb %gs:(%rsi), %dx", "outsb %ds:(%esi), %dx", "insb"]
        runs = lab.sweep([lab.primary(unconditional_io_exiting=1)] * 3, sources=sources,
                         registers=registers)  # fmt: skip
        sizes = [run[F.EXIT_INSTRUCTION_INFORMATION] >> 7 & 7 for run in runs]
        segments = [run[F.EXIT_INSTRUCTION_INFORMATION] >> 15 & 7 for run in runs[:2]]
        equal("the address sizes", sizes, [2, 1, 2])
        equal("the segments of OUTS", segments, [5, 3])


def _bitmap_bit(lab: VmxLab, port: int, on: bool = True) -> None:
    lab.set_bit(lab.places.io, port, on)  # bitmap B is the page behind bitmap A


def _accesses(lab: VmxLab, accesses: Sequence[tuple[int, int]]) -> list[Run]:
    """OUT of a size to a port, each with the I/O bitmaps in use."""
    on = lab.primary(use_io_bitmaps=1, unconditional_io_exiting=1)
    return lab.sweep(
        [on] * len(accesses),
        sources=[f"mov ${port:#x}, %edx; in %dx, %{REGISTER[size]}" for port, size in accesses],
    )


@guest_test("SDM: I/O-Bitmap Addresses", cases={"8 bits": 1, "16 bits": 2, "32 bits": 4})
def io_bitmaps_decide_port_by_port(lab: VmxLab, size: int) -> None:
    """With I/O bitmaps an access exits if a bit of one of its ports is 1, and not otherwise.

    At both ends of both bitmaps, with every port of the access that can have its bit set.
    """
    lab.fill(lab.places.io, 0x2000)
    clear = dict(zip(EDGES, _accesses(lab, [(port, size) for port in EDGES]), strict=True))
    each("the exit with all bits 0 at port",
         {port: run.reason for port, run in clear.items()}, ExitReason.VMCALL)  # fmt: skip
    got: dict[tuple[int, int], object] = {}
    for port, bit in product((0x3F7, 0x7FFE, 0x8000, 0xFFFC), range(size)):
        lab.fill(lab.places.io, 0x2000)
        _bitmap_bit(lab, port + bit)
        (run,) = _accesses(lab, [(port, size)])
        got[port, port + bit] = (run.reason, run.qualification >> 16)
    each("(port, port whose bit is 1): reason and port told", got, lambda case: (IO, case[0]))


@guest_test("SDM: I/O-Bitmap Addresses")
def a_bit_of_another_port_does_not_matter(lab: VmxLab) -> None:
    """An access does not exit for the bits of the ports beside its own."""
    lab.write(lab.places.io, b"\xff" * 0x2000)
    for port in (0x80, 0x81, 0x7FFF, 0x8000):
        _bitmap_bit(lab, port, on=False)
        lab.flush()
    cases = [(0x80, 1), (0x80, 2), (0x7FFF, 1), (0x7FFF, 2), (0x8000, 1), (0x80, 4), (0x7F, 1),
             (0x8000, 2)]  # fmt: skip
    runs = dict(zip(cases, _accesses(lab, cases), strict=True))
    each("(port, size): the exit", {case: run.reason for case, run in runs.items()},
         lambda case: IO if case in cases[5:] else ExitReason.VMCALL)  # fmt: skip


@guest_test("SDM: Instructions That Cause VM Exits Conditionally")
def an_access_that_wraps_the_io_space_exits(lab: VmxLab) -> None:
    """With I/O bitmaps an access beyond port FFFFH exits whatever the bitmaps hold."""
    lab.fill(lab.places.io, 0x2000)
    cases = [(0xFFFF, 2), (0xFFFD, 4), (0xFFFF, 4), (0xFFFF, 1), (0xFFFE, 2)]
    runs = dict(zip(cases, _accesses(lab, cases), strict=True))
    each("(port, size): the exit", {case: run.reason for case, run in runs.items()},
         lambda case: IO if sum(case) > 0x10000 else ExitReason.VMCALL)  # fmt: skip


@guest_test("SDM: Primary Processor-Based VM-Execution Controls")
def io_bitmaps_replace_unconditional_exiting(lab: VmxLab) -> None:
    """With "use I/O bitmaps" the "unconditional I/O exiting" control is ignored.

    Without either, I/O does not exit.
    """
    lab.fill(lab.places.io, 0x2000)
    for bitmaps, unconditional, reason in (
        (1, 1, ExitReason.VMCALL), (1, 0, ExitReason.VMCALL), (0, 0, ExitReason.VMCALL),
        (0, 1, IO),
    ):  # fmt: skip
        on = lab.primary(use_io_bitmaps=bitmaps, unconditional_io_exiting=unconditional)
        lab.run("in $0x80, %al", on).exits_with(reason)


@guest_test("SDM: Relative Priority of Faults and VM Exits")
def the_io_permission_check_comes_before_the_exit(lab: VmxLab) -> None:
    """At CPL 3 with IOPL 0 a port that the TSS does not allow causes #GP(0), not an exit.

    With IOPL 3 the access exits.
    """
    lab.write_u32(lab.places.tss + 0x64, 0xFFFF0000)  # no I/O permission bit map
    user = lab.primary(unconditional_io_exiting=1) | {F.GUEST_CR3: lab.pages()}
    source = "push $DS3; push $USER_STACK; push ${}; push $CS3; push $1f; iretq; 1: in $0x80, %al"
    lab.run(source.format("2"), user).delivers(13)
    run = lab.run(source.format("0x3002"), user)
    run.exits_with(IO)


@guest_test("SDM: I/O-Bitmap Addresses")
def a_repeated_string_of_no_bitmapped_port_moves_data(lab: VmxLab) -> None:
    """INS and OUTS that do not exit are executed: here the RTC's RAM is read byte by byte."""
    lab.fill(lab.places.io, 0x2000)
    lab.write(lab.places.data, bytes(16))
    with lab.batch() as batch:
        batch.outp(0x70, 0x7B)
        batch.outp(0x71, 0x6D)
        batch.outp(0x70, 0x7B)
    run = lab.run("insb", lab.primary(use_io_bitmaps=1), {"rdx": 0x71, "rdi": lab.places.data})
    run.ends()
    equal("RDI behind INSB", run.registers["rdi"], lab.places.data + 1)
    if (byte := lab.read(lab.places.data, 1)) == b"\xff":
        raise Lacking("there is no RTC")
    equal("the byte in memory", byte, b"\x6d")
