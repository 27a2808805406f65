"""Port I/O at L1 level: protection, string forms, widths, breakpoints."""

import struct

import pytest
from small_guests import DATA, PDPT, TSS, in_ring_3, run, run32

GP, DB = 13, 1


def allow(*ports):
    def prepare(machine, labels):
        for p in ports:
            byte = machine.memory.read(TSS + 104 + p // 8, 1)[0] & ~(1 << p % 8)
            machine.memory.write(TSS + 104 + p // 8, bytes([byte]))

    return prepare


def test_ring_3_without_iopl_may_use_ports_whose_bits_are_clear():
    assert in_ring_3("in al, 0x61", prepare=allow(0x61, 0xF4)).faults == []


def test_ring_3_without_iopl_may_not_use_ports_whose_bits_are_set():
    result = in_ring_3("mov ebx, 7; denied: in al, 0x61")
    assert result.faults == [(GP, 0)]
    assert result.events[0].rip == result.labels["denied"]


def test_ring_3_with_iopl_3_needs_no_permission_map():
    assert in_ring_3("in al, 0x61", iopl=3).faults == []


@pytest.mark.parametrize("forbidden", range(4))
def test_every_byte_of_a_wide_access_needs_its_bit(forbidden):
    def prepare(machine, labels):
        allow(*[0x200 + i for i in range(4) if i != forbidden])(machine, labels)

    assert in_ring_3("mov edx, 0x200; in eax, dx", prepare=prepare).faults == [(GP, 0)]


def test_a_wide_access_across_two_bytes_of_the_map_is_allowed_where_all_bits_are_clear():
    prepare = allow(0x206, 0x207, 0x208, 0x209, 0xF4)
    assert in_ring_3("mov edx, 0x206; in eax, dx", prepare=prepare).faults == []


def test_a_port_beyond_the_end_of_the_tss_is_denied():
    def prepare(machine, labels):
        machine.memory.write(TSS + 102, struct.pack("<H", 0x6FE - 0x60 // 8))
        machine.memory.write(TSS + 0x6F0, bytes(0x20))

    assert in_ring_3("in al, 0x5f", prepare=prepare).faults == [(GP, 0)]  # then the end's port
    assert in_ring_3("in al, 0x70", prepare=prepare).faults == [(GP, 0)]


def test_ring_0_needs_no_permission():
    assert run("in al, 0x61").faults == []


def test_an_absent_port_reads_as_all_ones_in_every_width():
    result = run(
        "mov rax, -1; mov rbx, rax; mov edx, 0x1234; xor eax, eax; in al, dx; mov r8, rax;"
        "xor eax, eax; in ax, dx; mov r9, rax; mov rax, 0x1111111111111111; in eax, dx;"
        "mov r10, rax"
    )
    assert (result.r8, result.r9, result.r10) == (0xFF, 0xFFFF, 0xFFFFFFFF)


def test_in_al_keeps_the_rest_of_rax():
    result = run("mov rax, 0x1122334455667788; mov edx, 0x1234; in al, dx; mov r8, rax")
    assert result.r8 == 0x11223344556677FF


PRINT = "mov edx, 0x3f8;"


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_rep_outsb_writes_every_byte(cpu):
    result = run(
        PRINT
        + 'mov esi, offset text; mov ecx, 5; rep outsb; jmp over; text: .ascii "hello"; over:',
        cpu,
    )
    assert result.output == b"hello"
    assert (result.rcx, result.rsi) == (0, result.labels["text"] + 5)


def test_rep_outsb_goes_down_when_df_is_set():
    result = run(
        PRINT + "mov esi, offset text + 4; mov ecx, 5; std; rep outsb; cld; jmp over;"
        'text: .ascii "olleh"; over:'
    )
    assert result.output == b"hello"


def test_a_repeated_string_with_a_count_of_zero_does_nothing():
    result = run(PRINT + "mov rsi, -1; xor ecx, ecx; rep outsb")
    assert result.output == b""
    assert result.faults == []


def test_a_count_that_is_longer_than_one_exit_handles_is_finished():
    result = run("mov edi, 0x200000; mov ecx, 10000; mov edx, 0x1234; rep insd; mov r8, rdi")
    assert result.r8 == 0x200000 + 40000
    assert result.machine.memory.read(0x200000, 40001) == b"\xff" * 40000 + b"\0"


def test_a_string_goes_on_from_page_to_page():
    """An element may lie across two of them."""
    text = "mov edx, 0x1234; mov rdi, 0x3ffffd; mov ecx, 4; rep insd"
    result = run(text + "; mov r8, rdi")
    assert (result.rcx, result.r8) == (0, 0x40000D)
    assert result.machine.memory.read(0x3FFFFC, 18) == b"\0" + b"\xff" * 16 + b"\0"


def test_insw_stores_what_the_port_gives():
    result = run(f"mov edi, {DATA:#x}; mov edx, 0x1234; insw; mov rax, [{DATA:#x}]; mov r8, rax")
    assert result.r8 == 0xFFFF


def test_ins_with_32_bit_addresses_clears_the_upper_half_of_rdi():
    result = run(f"mov rdi, {0xFF << 40 | DATA:#x}; mov edx, 0x1234; .byte 0x67; insb; mov r8, rdi")
    assert result.r8 == DATA + 1


def test_a_page_fault_in_the_middle_of_outs_leaves_the_registers_at_the_iteration():
    text = PRINT + "mov rsi, 0x7ffffffffd; mov ecx, 8; rep outsb"

    def prepare(machine, labels):
        machine.memory.write(PDPT + 8 * 511, struct.pack("<Q", 0x87))

    result = run(text, prepare=prepare)
    assert result.output == b"\xff" * 3  # no memory is there
    assert result.faults == [(14, 0)]
    assert result.events[0].cr2 == 0x8000000000
    assert (result.rcx, result.rsi) == (5, 0x8000000000)


def test_an_output_of_four_bytes_at_f4_ends_the_run_with_its_status():
    result = run("mov eax, 0x12; mov edx, 0xf4; out dx, eax")
    assert result.outcome.status == 0x25


def test_protected_mode_without_paging_does_port_io():
    assert run32("mov edx, 0x3f8; mov al, 'x'; out dx, al").output == b"x"


DE = "mov rax, cr4; or eax, 8; mov cr4, rax;"


def arm(port, length=0, kind=2):
    dr7 = 0x402 | kind << 16 | length << 18
    return f"mov eax, {port:#x}; mov dr0, rax; mov eax, {dr7:#x}; mov dr7, rax;"


def test_an_io_breakpoint_traps_after_the_instruction():
    result = run(DE + arm(0x61) + "in al, 0x61; after: nop")
    assert result.faults == [(DB, 0)]
    assert result.events[0].rip == result.labels["after"]
    assert result.vcpu.state.dr6 & 0x400F == 1


def test_an_io_breakpoint_needs_cr4_de():
    assert run(arm(0x61) + "in al, 0x61").faults == []


def test_an_io_breakpoint_of_four_ports_meets_any_of_them():
    assert run(DE + arm(0x60, length=3) + "in al, 0x63").faults == [(DB, 0)]
    assert run(DE + arm(0x60, length=3) + "in al, 0x64").faults == []


def test_an_io_breakpoint_stops_a_repeated_output_after_its_first_iteration():
    result = run(DE + arm(0x80) + "mov edx, 0x80; mov esi, 0x1000; mov ecx, 3; stop: rep outsb")
    assert result.faults == [(DB, 0)]
    assert result.events[0].rip == result.labels["stop"]
    assert result.rcx == 2
