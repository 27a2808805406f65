"""The I/O permission map: which accesses exit, and what the exit says."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode, IoInfo
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature

PORT: Final = 0x5A50
"""A port that no device has."""
IO: Final = [Intercept.IOIO_PROT]
SECTIONS: Final = ("APM: I/O Permissions Map", "APM: IOIO Intercept")
# The instruction, and EXITINFO1 without the port and the address size.
ACCESSES: Final = {
    "out %al, %dx": int(IoInfo.size8), "out %ax, %dx": int(IoInfo.size16),
    "out %eax, %dx": int(IoInfo.size32), "in %dx, %al": int(IoInfo.size8 | IoInfo.in_),
    "in %dx, %ax": int(IoInfo.size16 | IoInfo.in_), "in %dx, %eax": int(IoInfo.size32 | IoInfo.in_),
}  # fmt: skip
SIZES: Final = {"out %al, %dx": 1, "out %ax, %dx": 2, "out %eax, %dx": 4}
ADDRESS: Final = int(IoInfo.address16 | IoInfo.address32 | IoInfo.address64)
SEGMENT: Final = IoInfo.FIELDS["segment"].mask


@guest_test(*SECTIONS)
def a_port_in_the_map_exits_with_size_and_direction(lab: SvmLab) -> None:
    """IN and OUT of a port whose bit is set exit; EXITINFO1 has port, size and direction."""
    lab.set_bit(lab.places.io, PORT)
    got = {}
    for text in ACCESSES:
        run = lab.run(f"mov ${PORT}, %edx; {text}", wants=IO)
        run.exits_with(ExitCode.IOIO)
        got[text] = run.info1 & ~ADDRESS & 0xFFFFFFFF
    each("EXITINFO1", got, lambda text: ACCESSES[text] | PORT << 16)


@guest_test("APM: IOIO Intercept")
def an_io_exit_names_the_next_instruction(lab: SvmLab) -> None:
    """EXITINFO2 of an I/O exit is the address behind the instruction, RIP the instruction's."""
    lab.fill(lab.places.io, 0x2000, 0xFF)
    lengths = {
        "in $0x80, %al": 2, "out %al, $0x80": 2, "in $0x80, %ax": 3, "in %dx, %al": 1,
        "out %ax, %dx": 2, "insb": 1, "rep outsl": 2,
    }  # fmt: skip
    got = {}
    registers = {"rdx": PORT, "rdi": lab.places.data, "rsi": lab.places.data, "rcx": 1}
    for text in lengths:
        run = lab.run(text, registers=registers, wants=IO)
        run.exits_with(ExitCode.IOIO)
        got[text] = (run.rip, run.info2 - run.rip)
    each("RIP and length", got, lambda text: (lab.places.code, lengths[text]))


@guest_test(*SECTIONS)
def a_port_whose_bit_is_clear_does_not_exit(lab: SvmLab) -> None:
    """With all bits set but one port's, an access of that port alone runs in L2."""
    lab.fill(lab.places.io, 0x2000, 0xFF)
    lab.set_bit(lab.places.io, PORT, on=False)
    lab.run(f"mov ${PORT}, %edx; in %dx, %al; out %al, %dx", wants=IO).ends()
    lab.run(f"mov ${PORT + 1}, %edx; in %dx, %al", wants=IO).exits_with(ExitCode.IOIO)
    lab.run(f"mov ${PORT - 1}, %edx; in %dx, %al", wants=IO).exits_with(ExitCode.IOIO)


@guest_test("APM: I/O Permissions Map", "APM: Intercept Operation")
def without_ioio_prot_the_map_is_not_looked_at(lab: SvmLab) -> None:
    """While the IOIO_PROT intercept is clear no port exits, whatever the map says."""
    lab.fill(lab.places.io, 0x3000, 0xFF)
    lab.run(f"mov ${PORT}, %edx; in %dx, %al; out %eax, %dx").ends()


@guest_test(*SECTIONS)
def an_access_exits_when_any_of_its_ports_is_in_the_map(lab: SvmLab) -> None:
    """An access of 2 or 4 bytes exits if the bit of any port that it covers is set."""
    got, wanted = {}, {}
    for bit in range(-1, 5):
        lab.fill(lab.places.io, 0x2000)
        # The bits straddle a byte of the map.
        port = PORT + 6
        lab.set_bit(lab.places.io, port + bit)
        for text, size in SIZES.items():
            case = f"{text}, port {port:#x}, bit of {port + bit:#x}"
            run = lab.run(f"mov ${port}, %edx; {text}", wants=IO)
            got[case] = run.code
            wanted[case] = ExitCode.IOIO if 0 <= bit < size else ExitCode.VMMCALL
    each("the exit", got, lambda case: wanted[case])


@guest_test(*SECTIONS)
def the_maps_last_bits_are_for_accesses_beyond_port_ffff(lab: SvmLab) -> None:
    """The three bits behind port FFFFH count for accesses that begin below and end above it."""
    got, wanted = {}, {}
    for bit in (0, 1, 2, 3):
        lab.fill(lab.places.io, 0x3000)
        lab.set_bit(lab.places.io, 0x10000 + bit)
        for port, text, size in (
            (0xFFFF, "in %dx, %al", 1), (0xFFFF, "in %dx, %ax", 2), (0xFFFF, "in %dx, %eax", 4),
            (0xFFFD, "in %dx, %eax", 4), (0xFFFC, "in %dx, %eax", 4),
        ):  # fmt: skip
            case = f"{text} of {port:#x}, bit {0x10000 + bit:#x}"
            got[case] = lab.run(f"mov ${port}, %edx; {text}", wants=IO).code
            exits = 0x10000 + bit < port + size
            wanted[case] = ExitCode.IOIO if exits else ExitCode.VMMCALL
    each("the exit", got, lambda case: wanted[case])


@guest_test("APM: IOIO Intercept")
def string_io_says_so(lab: SvmLab) -> None:
    """EXITINFO1 of INS and OUTS has STR, REP where it repeats, and the address size."""
    lab.fill(lab.places.io, 0x2000, 0xFF)
    cases = {
        "insb": IoInfo.string | IoInfo.in_ | IoInfo.size8 | IoInfo.address64,
        "outsw": IoInfo.string | IoInfo.size16 | IoInfo.address64,
        "rep insl": IoInfo.string | IoInfo.in_ | IoInfo.rep | IoInfo.size32 | IoInfo.address64,
        "rep outsb": IoInfo.string | IoInfo.rep | IoInfo.size8 | IoInfo.address64,
        ".byte 0x67; outsb": IoInfo.string | IoInfo.size8 | IoInfo.address32,
        ".byte 0x67; rep insb": (
            IoInfo.string | IoInfo.in_ | IoInfo.rep | IoInfo.size8 | IoInfo.address32
        ),
    }  # fmt: skip
    registers = {"rdx": PORT, "rdi": lab.places.data, "rsi": lab.places.data, "rcx": 3}
    got = {}
    for text in cases:
        run = lab.run(text, registers=registers, wants=IO)
        run.exits_with(ExitCode.IOIO)
        got[text] = run.info1 & 0xFFFFFFFF & ~SEGMENT
        equal(f"RCX at {text}", run.registers["rcx"], 3)
    each("EXITINFO1", got, lambda text: int(cases[text]) | PORT << 16)


@guest_test("APM: IOIO Intercept", "APM: Decode Assists", needs=[feature("decode_assists")])
def string_io_names_its_segment(lab: SvmLab) -> None:
    """With decode assists EXITINFO1 has the effective segment of INS and OUTS."""
    lab.fill(lab.places.io, 0x2000, 0xFF)
    segments = {"insb": 0, "outsb": 3, "outsb %fs:(%rsi), %dx": 4, "outsb %gs:(%rsi), %dx": 5}
    registers = {"rdx": PORT, "rdi": lab.places.data, "rsi": lab.places.data}
    runs = {text: lab.run(text, registers=registers, wants=IO) for text in segments}
    got = {text: run.info1 >> 10 & 7 for text, run in runs.items()}
    each("the segment's number", got, lambda text: segments[text])


@guest_test("APM: IOIO Intercept", "APM: Instruction Intercepts")
def l2s_own_permissions_come_before_the_map(lab: SvmLab) -> None:
    """At CPL 3 with IOPL 0, a TSS without a bitmap gives #GP before the map is looked at."""
    lab.fill(lab.places.io, 0x2000, 0xFF)
    lab.write(lab.places.tss + 0x66, b"\x68\0")
    begin = modes.user(lab)
    wants = [*IO, Intercept.EXCP_GP]
    run = lab.run("in $0x80, %al", begin, wants=wants)
    run.exits_with(ExitCode.EXCP_GP, 0)
    run = lab.run("in $0x80, %al", begin | {F.RFLAGS: 0x3002}, wants=wants)
    run.exits_with(ExitCode.IOIO)


@guest_test("APM: IOIO Intercept")
def l1_can_carry_out_l2s_io(lab: SvmLab) -> None:
    """L1 gives IN its value in RAX, goes on at EXITINFO2, and L2 sees it."""
    lab.set_bit(lab.places.io, PORT)
    run = lab.run(f"mov ${PORT}, %edx; mov $-1, %rax; in %dx, %al; mov %rax, %rbx", wants=IO)
    run.exits_with(ExitCode.IOIO)
    rax = run.registers["rax"] & ~0xFF | 0x5A
    run = lab.skip(run, run.info2 - run.rip, {F.RAX: rax})
    run.ends()
    equal("what L2 read", run.registers["rbx"], rax)


@guest_test("APM: IOIO Intercept")
def real_mode_io_exits_as_well(lab: SvmLab) -> None:
    """An access in real mode exits with the 16-bit address size and its next IP."""
    lab.set_bit(lab.places.io, PORT)
    lab.code(f".code16\nmov ${PORT}, %dx; insb")
    run = lab.run(None, modes.real(lab), wants=IO)
    run.exits_with(ExitCode.IOIO, info2=4)
    size = IoInfo.string | IoInfo.in_ | IoInfo.size8 | IoInfo.address16
    equal("EXITINFO1", run.info1 & 0xFFFFFFFF & ~SEGMENT, size | PORT << 16)
