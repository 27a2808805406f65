"""Instructions on device memory: every form that is emulated, against the local and I/O APIC."""

import pytest
from small_guests import DATA, PDPT, run

from undervisor.hypervisor.verdict import Ending

TPR, ICR_HIGH, IOAPIC, WINDOW = 0xFEE00080, 0xFEE00310, 0xFEC00000, 0xFEC00010
POINT = f"mov esi, {ICR_HIGH:#x};"
CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
STATUS = CF | PF | AF | ZF | SF | OF


def set_up(value):
    return POINT + f"mov dword ptr [rsi], {value:#x};"


def after(text, value=0x12000000):
    """What the register holds after an instruction, and the result of the run."""
    result = run(set_up(value) + text + "; mov r15d, [rsi]")
    return result.r15, result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov eax, [rsi]; mov r8, rax", 0x12000000),
        ("mov rax, -1; mov eax, [rsi]; mov r8, rax", 0x12000000),
        ("mov r9d, [rsi]; mov r8, r9", 0x12000000),
        ("movsxd r8, dword ptr [rsi]", 0x12000000),
        ("mov edi, 0x10; sub esi, edi; mov r8d, [rsi + rdi]; add esi, edi", 0x12000000),
        ("sub esi, 0x40; mov edi, 8; mov r8d, [rsi + 8*rdi]; add esi, 0x40", 0x12000000),
    ],
)
def test_a_load_gives_the_register(text, expected):
    assert run(set_up(0x12000000) + text).r8 == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov dword ptr [rsi], 0x34000000", 0x34000000),
        ("mov eax, 0x56000000; mov [rsi], eax", 0x56000000),
        ("mov r13d, 0x56000000; mov [rsi], r13d", 0x56000000),
        ("mov eax, 0x77000000; movnti [rsi], eax", 0x77000000),
        ("or dword ptr [rsi], 0x01000000", 0x13000000),
        ("and dword ptr [rsi], 0x10000000", 0x10000000),
        ("xor dword ptr [rsi], 0x02000000", 0x10000000),
        ("add dword ptr [rsi], 0x01000000", 0x13000000),
        ("sub dword ptr [rsi], 0x02000000", 0x10000000),
        ("mov ecx, 0x20000000; or [rsi], ecx", 0x32000000),
        ("lock or dword ptr [rsi], 0x01000000", 0x13000000),
        ("bts dword ptr [rsi], 31", 0x92000000),
        ("btr dword ptr [rsi], 28", 0x02000000),
        ("btc dword ptr [rsi], 25", 0x10000000),
        ("mov ecx, 31; bts [rsi], ecx", 0x92000000),
        ("mov ecx, -97; add esi, 16; bts [rsi], ecx; sub esi, 16", 0x92000000),
    ],
)
def test_a_store_changes_the_register(text, expected):
    value, result = after(text)
    assert result.faults == []
    assert value == expected


def test_xchg_swaps():
    value, result = after("mov eax, 0x45000000; xchg eax, [rsi]; mov r8, rax")
    assert (value, result.r8) == (0x45000000, 0x12000000)


ALU = ["add", "sub", "cmp", "and", "or", "xor", "test"]
OPERANDS = [
    (0x12000000, 0x11000000),
    (0x12000000, 0x12000000),
    (0x12000000, 0xEE000000),
    (0x7F000000, 0x01000000),
    (0x80000000, 0x80000000),
    (0x80000000, 0x01000000),
    (0, 0xFFFFFFFF),
    (0, 0x10),
]


@pytest.mark.parametrize("name", ALU)
@pytest.mark.parametrize(("left", "right"), OPERANDS)
def test_the_flags_are_those_of_the_same_instruction_on_memory(name, left, right):
    """The silicon is the witness: the same operation on RAM."""
    text = (
        set_up(left)
        + f"mov dword ptr [{DATA:#x}], {left:#x}; mov ecx, {right:#x};"
        + f"{name} [{DATA:#x}], ecx; pushfq; pop r8;"
        + f"{name} [rsi], ecx; pushfq; pop r9;"
        + f"mov r10d, [{DATA:#x}]; mov r11d, [rsi]"
    )
    result = run(text)
    undefined = AF if name in ("and", "or", "xor", "test") else 0
    assert (result.r8 ^ result.r9) & STATUS & ~undefined == 0
    assert result.r10 & 0xFF000000 == result.r11  # the register has only its upper byte


@pytest.mark.parametrize("name", ["bt", "bts", "btr", "btc"])
@pytest.mark.parametrize("bit", [24, 25, 31])
def test_bit_tests_set_carry_as_on_memory(name, bit):
    text = set_up(0x82000000) + f"mov dword ptr [{DATA:#x}], 0x82000000;"
    text += (
        f"{name} dword ptr [{DATA:#x}], {bit}; setc r8b; {name} dword ptr [rsi], {bit}; setc r9b;"
    )
    result = run(text + f"mov r10d, [{DATA:#x}]; mov r11d, [rsi]")
    assert (result.r8 & 1, result.r10) == (result.r9 & 1, result.r11)


def test_the_io_apic_is_reached_through_its_window():
    result = run(
        f"mov esi, {IOAPIC:#x}; mov dword ptr [rsi], 1; mov eax, [rsi + 16]; mov r8, rax;"
        "mov dword ptr [rsi], 0x12; mov dword ptr [rsi + 16], 0x10031; mov r9d, [rsi + 16]"
    )
    assert result.r8 >> 16 & 0xFF == 23  # the last of its entries
    assert result.r9 == 0x10031


@pytest.mark.parametrize("store", ["stosd", "rep stosd"])
def test_stos_writes_the_register(store):
    count = 1
    result = run(
        f"mov edi, {ICR_HIGH:#x}; mov ecx, {count}; mov eax, 0x21000000; {store};"
        f"mov r8, rdi; mov esi, {ICR_HIGH:#x}; mov r9d, [rsi]"
    )
    assert (result.r8, result.r9) == (ICR_HIGH + 4, 0x21000000)


def test_movs_copies_from_memory_and_back():
    result = run(
        f"mov dword ptr [{DATA:#x}], 0x21000000; mov esi, {DATA:#x}; mov edi, {ICR_HIGH:#x}; movsd;"
        f"mov esi, {ICR_HIGH:#x}; mov edi, {DATA + 8:#x}; movsd; mov r8d, [{DATA + 8:#x}];"
        "mov r9, rsi"
    )
    assert (result.r8, result.r9) == (0x21000000, ICR_HIGH + 4)


def test_lods_reads_the_register():
    result = run(set_up(0x21000000) + "xor eax, eax; lodsd; mov r8, rax")
    assert result.r8 == 0x21000000


VIDEO = 0xB8000


def test_rep_stosw_fills_the_screen_and_a_read_gives_it_back():
    result = run(
        f"mov edi, {VIDEO:#x}; mov ecx, 2000; mov ax, 0x0741; rep stosw; mov r8, rdi; mov r9, rcx;"
        f"mov r10w, [{VIDEO + 3998:#x}]"
    )
    assert (result.r8, result.r9, result.r10 & 0xFFFF) == (VIDEO + 4000, 0, 0x0741)


def test_rep_movs_scrolls_the_screen_backwards_too():
    text = f"mov edi, {VIDEO:#x}; mov ecx, 100; mov eax, 1; 1: stosw; inc eax; loop 1b;"
    forwards = f"mov esi, {VIDEO + 20:#x}; mov edi, {VIDEO:#x}; mov ecx, 90; rep movsw;"
    result = run(text + forwards + f"movzx r8d, word ptr [{VIDEO:#x}]")
    assert result.r8 == 11
    backwards = (
        f"std; mov esi, {VIDEO + 178:#x}; mov edi, {VIDEO + 198:#x}; mov ecx, 90; rep movsw; cld;"
    )
    result = run(text + backwards + f"movzx r8d, word ptr [{VIDEO + 20:#x}]")
    assert result.r8 == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("movzx r8d, byte ptr [rsi]", 0x41),
        ("movzx r8, word ptr [rsi]", 0x8741),
        ("movsx r8d, word ptr [rsi]", 0xFFFF8741),
        ("movsx r8, word ptr [rsi]", 0xFFFFFFFFFFFF8741),
        ("movsx r8, byte ptr [rsi+1]", 0xFFFFFFFFFFFFFF87),
        ("xor r8d, r8d; mov r8b, [rsi]", 0x41),
        ("xor eax, eax; mov ah, [rsi]; mov r8, rax", 0x4100),
        ("mov r8, [rsi]", 0x8741),
    ],
)
def test_loads_of_every_width_extend_as_they_should(text, expected):
    setup = f"mov esi, {VIDEO:#x}; mov qword ptr [rsi], 0x8741;"
    assert run(setup + text).r8 == expected


def test_a_store_of_one_byte_leaves_its_neighbours():
    setup = f"mov esi, {VIDEO:#x}; mov dword ptr [rsi], 0x11223344; mov byte ptr [rsi + 1], 0x99;"
    assert run(setup + "mov r8d, [rsi]").r8 == 0x11229944


def test_rom_keeps_its_contents_when_it_is_written():
    text = "mov esi, 0xf0000; mov eax, [rsi]; mov dword ptr [rsi], 0x12345678; cmp eax, [rsi];"
    result = run(text + "sete bl; mov rax, 0x1234; mov [rsi], rax")
    assert result.faults == []
    assert result.rbx & 0xFF == 1


def test_absent_memory_reads_as_all_ones_and_swallows_writes():
    result = run(
        "mov esi, 0x10000000; mov dword ptr [rsi], 5; mov r8, [rsi]; movzx r9d, byte ptr [rsi];"
        "movabs rsi, 0x4000000000; xor edi, edi; mov [rsi], rdi; mov r10d, [rsi]"
    )
    assert (result.r8, result.r9, result.r10) == ((1 << 64) - 1, 0xFF, 0xFFFFFFFF)


def test_an_access_half_in_absent_memory_is_split():
    end = 16 << 20
    result = run(f"mov esi, {end - 4:#x}; mov dword ptr [rsi], 0x11223344; mov r8, [rsi]")
    assert result.r8 == 0xFFFFFFFF11223344


def test_the_local_apic_follows_its_base():
    result = run(
        "mov ecx, 0x1b; mov eax, 0xfed00900; xor edx, edx; wrmsr; mov esi, 0xfed00030;"
        "mov r8d, [rsi]; mov esi, 0xfee00030; mov r9d, [rsi]"
    )
    assert result.r8 & 0xFF in range(0x10, 0x16)
    assert result.r9 == 0xFFFFFFFF


def test_device_memory_behind_a_page_table_is_reached():
    # 0x7f_c0000000 translates to 0xc0000000.
    text = f"mov eax, 0xc0000087; mov [{PDPT + 8 * 511:#x}], rax;"
    result = run(text + "movabs rsi, 0x7ffee00030; mov r8d, [rsi]")
    assert result.r8 & 0xFF in range(0x10, 0x16)


def test_single_step_over_an_emulated_instruction_traps_after_it():
    result = run(
        POINT
        + "pushfq; or dword ptr [rsp], 0x100; popfq; mov dword ptr [rsi], 0x1000000; after: nop"
    )
    assert result.faults == [(1, 0)]
    assert result.events[0].rip == result.labels["after"]


def test_single_step_stops_a_repeated_string_after_each_iteration():
    result = run(
        f"mov edi, {VIDEO:#x}; mov ecx, 3; pushfq; or dword ptr [rsp], 0x100; popfq;here: rep stosb"
    )
    assert result.faults == [(1, 0)]
    assert (result.events[0].rip, result.rcx) == (result.labels["here"], 2)


def test_an_instruction_that_is_not_emulated_ends_the_run_and_says_which():
    outcome = run(POINT + "addps xmm0, [rsi]").outcome
    assert outcome.ending is Ending.UNKNOWN_EXIT
    assert "addps" in outcome.text


def test_a_jump_to_absent_memory_finds_an_undefined_instruction():
    result = run("mov esi, 0x10000000; jmp rsi")
    assert result.faults == [(6, 0)]
    assert result.events[0].rip == 0x10000000
