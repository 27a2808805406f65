"""What the documentation says that the silicon does not do: a change here changes the document."""

from small_guests import DATA, PDPT, TO_USER, in_ring_3, run

DR7 = "mov eax, {:#x}; mov dr7, rax;"


def test_a_breakpoint_on_a_fetch_does_not_trigger():
    text = "mov eax, offset here; mov dr0, rax;" + DR7.format(0x402) + "nop; here: nop"
    assert run(text).faults == []


def test_a_breakpoint_on_a_write_does_not_trigger():
    text = f"mov eax, {DATA:#x}; mov dr0, rax;" + DR7.format(0xD0402) + f"mov [{DATA:#x}], eax"
    assert run(text).faults == []


def test_a_non_canonical_stack_reference_is_a_general_protection_fault():
    assert run("movabs rbp, 0x800000000000; mov eax, [rbp]").faults == [(13, 0)]


def test_alignment_is_not_checked():
    am = "mov rax, cr0; bts rax, 18; mov cr0, rax;"
    assert run(am + TO_USER % "0x43002" + f"mov eax, [{DATA + 1:#x}]").faults == []
    assert run(f"movaps xmm0, [{DATA + 1:#x}]").faults == []


def test_lock_is_ignored_where_it_is_not_allowed():
    assert run(".byte 0xf0, 0xec; mov ebx, 1").rbx == 1


def touch(bit, cpu):
    """Read through a page-directory pointer with one address bit more."""
    text = f"mov rax, [{PDPT + 16:#x}]; bts rax, {bit}; mov [{PDPT + 16:#x}], rax;"
    text += "mov rax, cr3; mov cr3, rax; mov esi, 0x80000000; mov eax, [rsi]"
    return run(text, cpu).faults


def test_l0_finds_reserved_address_bits_below_40_itself():
    assert touch(40, "intel") == [(14, 9)]  # this one the silicon finds
    assert touch(39, "intel,phys-bits=36") == [(14, 9)]
    assert touch(36, "intel,phys-bits=36") == [(14, 9)]
    assert touch(35, "intel,phys-bits=36") == []


def test_a_128_bit_avx_encoding_runs_as_its_sse_instruction():
    text = "mov eax, 5; movd xmm1, eax; vpaddd {0}mm0, {0}mm1, {0}mm1; movd ebx, xmm0"
    assert run(text.format("x")).rbx == 5  # not 10: the second source is ignored
    assert run(text.format("y")).faults == [(6, 0)]


def test_sysret_does_not_check_its_target():
    star = "mov ecx, 0xc0000081; xor eax, eax; mov edx, 0x1b0008; wrmsr;"
    result = run(star + "movabs rcx, 0x800000000000; mov r11d, 2; here: sysretq")
    assert result.events[0].cs & 3 == 3  # a processor of Intel's faults in ring 0


def test_ring_3_may_use_what_umip_would_bar():
    assert in_ring_3(f"sgdt [{DATA:#x}]; str ebx", iopl=3).faults == []
