"""CR0, CR3, CR4, CR8, XCR0 and the debug registers: what may be loaded, and the faults."""

import pytest
from small_guests import DATA, PDPT, PML4, run, run16, run32

GP, UD, DB = (13, 0), (6, 0), (1, 0)
PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG = (
    1 << b for b in (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31)
)
BASE0 = PE | MP | ET | NE | WP | PG
BASE4 = 0x620


def load(register, value):
    return f"movabs rax, {value:#x}; here: mov {register}, rax;"


def check_gp(text, cpu="intel"):
    result = run(text, cpu)
    assert result.faults == [GP]
    assert result.events[0].rip == result.labels["here"]


@pytest.mark.parametrize(
    "value", [BASE0 & ~PE, BASE0 | NW, BASE0 | 1 << 32, BASE0 | 1 << 63, BASE0 & ~PG & ~PE | NW]
)
def test_an_illegal_cr0_raises_gp(value):
    check_gp(load("cr0", value))


def test_paging_may_not_be_switched_off_in_64_bit_code():
    check_gp(load("cr0", BASE0 & ~PG))


@pytest.mark.parametrize(
    "value", [BASE0 | CD, BASE0 | CD | NW, BASE0 | TS, BASE0 | AM, BASE0 & ~WP]
)
def test_a_legal_cr0_reads_back(value):
    assert run(load("cr0", value) + "mov rbx, cr0").rbx == value


def test_cr0_et_cannot_be_cleared_and_undeclared_bits_are_ignored():
    assert run(load("cr0", BASE0 & ~ET | 1 << 10) + "mov rbx, cr0").rbx == BASE0


@pytest.mark.parametrize(("bits", "faults"), [(BASE0, [(14, 3)]), (BASE0 & ~WP, [])])
def test_write_protection_decides_about_the_kernels_own_writes(bits, faults):
    text = (
        load("cr0", bits) + f"mov rax, [{PDPT + 16:#x}]; and al, 0xfd; mov [{PDPT + 16:#x}], rax;"
    )
    text += "mov rax, cr3; mov cr3, rax;"
    assert run(text + "mov esi, 0x80000000; mov dword ptr [rsi], 1").faults == faults


@pytest.mark.parametrize("text", ["clts", "mov ax, 0x3b; lmsw ax; clts"])
def test_clts_clears_ts(text):
    result = run(load("cr0", BASE0 | TS) + f"{text}; mov rbx, cr0")
    assert not result.rbx & TS


def test_lmsw_changes_four_bits_and_cannot_clear_pe():
    result = run("mov eax, 0xfff0; lmsw ax; mov rbx, cr0")
    assert result.rbx == BASE0 & ~(MP | EM | TS)


def test_lmsw_and_smsw_reach_memory():
    result = run(
        f"mov word ptr [{DATA:#x}], 0xf; lmsw word ptr [{DATA:#x}]; mov qword ptr [{DATA:#x}], -1;"
        f"smsw word ptr [{DATA:#x}]; mov rbx, [{DATA:#x}]; smsw rcx; smsw esi"
    )
    assert result.rbx == 0xFFFFFFFFFFFF0000 | (BASE0 | MP | EM | TS) & 0xFFFF
    assert result.rcx == BASE0 | MP | EM | TS
    assert result.rsi == result.rcx & 0xFFFFFFFF


@pytest.mark.parametrize("bit", range(40, 63))
def test_an_address_bit_of_cr3_beyond_the_processors_raises_gp(bit):
    check_gp(load("cr3", PML4 | 1 << bit))


def test_bit_63_of_cr3_needs_pcids():
    check_gp(load("cr3", PML4 | 1 << 63))
    text = load("cr4", BASE4 | 1 << 17) + f"movabs rax, {PML4 | 1 << 63:#x}; mov cr3, rax;"
    assert run(text + "mov rbx, cr3").rbx == PML4


def test_a_load_of_cr3_drops_translations():
    text = (
        f"mov rax, [0x80000000]; mov qword ptr [{PDPT + 16:#x}], 0; mov rax, cr3; mov cr3, rax;"
        "mov rax, [0x80000000]"
    )
    # An address of 32 bits would be sign-extended: go through a register.
    text = text.replace("[0x80000000]", "[rsi]")
    result = run("mov esi, 0x80000000;" + text)
    assert result.faults == [(14, 0)]
    assert result.events[0].cr2 == 0x80000000


@pytest.mark.parametrize("cpu", ["intel", "amd"])
@pytest.mark.parametrize("bit", [11, 12, 14, 15, 19, 22, 23, 24, 25, 31, 32, 63])
def test_a_bit_of_cr4_that_the_model_lacks_raises_gp(cpu, bit):
    check_gp(load("cr4", BASE4 | 1 << bit), cpu)


def test_vmxe_exists_on_intel_only():
    assert run(load("cr4", BASE4 | 1 << 13) + "mov rbx, cr4", "intel").rbx == BASE4 | 1 << 13
    check_gp(load("cr4", BASE4 | 1 << 13), "amd")


def test_pae_may_not_be_cleared_in_long_mode():
    check_gp(load("cr4", BASE4 & ~0x20))


def test_pcide_may_not_be_set_with_a_pcid_in_cr3():
    prefix = f"mov eax, {PML4 | 0x18:#x}; mov cr3, rax;"
    check_gp(prefix + load("cr4", BASE4 | 1 << 17))


@pytest.mark.parametrize("bit", [2, 3, 4, 6, 7, 8, 16, 18, 20, 21])
def test_a_bit_of_cr4_that_the_model_has_reads_back(bit):
    text = "mov qword ptr [0x2000], 0x83; mov rax, cr3; mov cr3, rax;"  # no user page for SMEP
    assert run(text + load("cr4", BASE4 | 1 << bit) + "mov rbx, cr4").rbx == BASE4 | 1 << bit


def test_osxsave_shows_in_cpuid():
    result = run("mov eax, 1; cpuid; mov r8, rcx;" + load("cr4", BASE4 | 1 << 18)
                 + "mov eax, 1; cpuid; mov r9, rcx")  # fmt: skip
    assert (result.r8 >> 27 & 1, result.r9 >> 27 & 1) == (0, 1)


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_cr8_is_the_task_priority(cpu):
    result = run("mov eax, 9; mov cr8, rax; mov rbx, cr8; mov ecx, 0xfee00080; mov edx, [rcx]", cpu)
    assert (result.rbx, result.rdx) == (9, 0x90)


def test_the_local_apics_task_priority_shows_in_cr8():
    assert run("mov ecx, 0xfee00080; mov dword ptr [rcx], 0xab; mov rbx, cr8").rbx == 0xA


@pytest.mark.parametrize("value", [0x10, 1 << 31, 1 << 63])
def test_a_reserved_bit_of_cr8_raises_gp(value):
    check_gp(load("cr8", value))


@pytest.mark.parametrize("number", [1, 5, 7, 9])
def test_a_control_register_that_does_not_exist_is_undefined(number):
    modrm = 0xC0 | (number & 7) << 3
    rex = 0x44 if number > 7 else 0x40
    assert run(f".byte {rex:#x}, 0x0f, 0x20, {modrm:#x}").faults == [UD]
    assert run(f".byte {rex:#x}, 0x0f, 0x22, {modrm:#x}").faults == [UD]


XSAVE = load("cr4", BASE4 | 1 << 18).replace("here:", "")


def xsetbv(eax, ecx=0, edx=0):
    return f"mov ecx, {ecx}; mov eax, {eax:#x}; mov edx, {edx:#x}; here: xsetbv;"


@pytest.mark.parametrize(
    "text", [xsetbv(0), xsetbv(2), xsetbv(7), xsetbv(3, ecx=1), xsetbv(3, edx=1), xsetbv(0x203)]
)
def test_an_illegal_xcr0_raises_gp(text):
    check_gp(XSAVE + text)


@pytest.mark.parametrize("value", [1, 3])
def test_a_legal_xcr0_reads_back(value):
    result = run(XSAVE + xsetbv(value) + "xor ecx, ecx; xgetbv; mov rbx, rax")
    assert (result.rbx, result.rdx) == (value, 0)


def test_xsetbv_needs_osxsave():
    assert run(xsetbv(1)).faults == [UD]


# -- debug registers ---------------------------------------------------------------------------


def test_dr0_to_dr3_hold_any_value():
    text = "".join(f"movabs rax, {0x1122334455660000 + i:#x}; mov dr{i}, rax;" for i in range(4))
    result = run(text + "mov r8, dr0; mov r9, dr1; mov r10, dr2; mov r11, dr3")
    assert [result.r8, result.r9, result.r10, result.r11] == [
        0x1122334455660000 + i for i in range(4)
    ]


def test_dr6_and_dr7_have_fixed_bits():
    result = run("mov eax, 0; mov dr6, rax; mov dr7, rax; mov rbx, dr6; mov rcx, dr7")
    assert (result.rbx, result.rcx) == (0xFFFF0FF0, 0x400)
    result = run("mov eax, 0xffffdfff; mov dr7, rax; mov rcx, dr7")
    assert result.rcx & 0xD800 == 0


@pytest.mark.parametrize("register", ["dr6", "dr7"])
def test_the_upper_half_of_dr6_and_dr7_is_reserved(register):
    check_gp(load(register, 1 << 32))


def test_dr4_and_dr5_are_dr6_and_dr7_without_cr4_de():
    result = run("mov eax, 0x4000; mov dr4, rax; mov rbx, dr6; mov rcx, dr5")
    assert (result.rbx, result.rcx) == (0xFFFF4FF0, 0x400)


@pytest.mark.parametrize("text", ["mov rax, dr4", "mov dr5, rax", "mov dr4, rax", "mov rax, dr5"])
def test_dr4_and_dr5_are_undefined_with_cr4_de(text):
    assert run(load("cr4", BASE4 | 8) + text).faults == [UD]


@pytest.mark.parametrize("text", ["mov rbx, dr0", "mov dr3, rbx", "mov rbx, dr6", "mov dr7, rbx"])
def test_general_detect_traps_an_access_and_switches_itself_off(text):
    result = run(f"mov eax, 0x2400; mov dr7, rax; here: {text}")
    assert result.faults == [DB]
    assert result.events[0].rip == result.labels["here"]
    assert result.vcpu.state.dr6 & 0x2000
    assert not result.vcpu.state.dr7 & 0x2000


# -- other modes -------------------------------------------------------------------------------


def test_paging_without_protection_raises_gp_in_real_mode():
    # Vector 13 of the real-mode table leads to the end.
    text = (
        "mov word ptr [13*4], offset caught; mov word ptr [13*4+2], 0; mov eax, 0x80000010;"
        "mov cr0, eax; mov bl, 1; jmp over; caught: mov bl, 2; over:"
    )
    assert run16(text).rbx & 0xFF == 2


def test_real_mode_may_enter_protected_mode():
    assert run16("mov eax, cr0; or al, 1; mov cr0, eax; mov ebx, cr0").rbx == 0x11


def test_pae_paging_checks_its_four_pointers():
    text = """
     lgdt [gdtr]
     lidt [idtr]
     mov eax, 0x20
     mov cr4, eax
     mov eax, 0x200000
     mov cr3, eax
     mov eax, 0x80000011
     mov cr0, eax
     mov ebx, 1
     jmp over
    caught: mov ebx, 2
     jmp over
    gdtr: .word 23
     .long gdt
    idtr: .word 0x6f
     .long idt
    .balign 8
    gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
    idt: .fill 13, 8, 0
     .long 0x80000 + caught - caught
     .long 0
    over:
    """

    def prepare(pointer):
        def write(machine, labels):
            target = labels["caught"]
            gate = target & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (target >> 16) << 48
            machine.memory.set_u64(labels["idt"] + 13 * 8, gate)
            machine.memory.set_u64(0x200000, pointer)
            machine.memory.set_u64(0x201000, 0x83)

        return write

    assert run32(text, prepare=prepare(0x201001)).rbx == 1
    assert run32(text, prepare=prepare(0x201003)).rbx == 2  # bit 1 is reserved
