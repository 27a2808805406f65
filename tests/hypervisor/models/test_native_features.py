"""What is called native is executed on the processor library; what is said to fault faults."""

import struct
from dataclasses import dataclass

import pytest
import unicorn
from unicorn import x86_const as uc

from undervisor.guest.asm import assemble
from undervisor.hypervisor.models.support import NATIVE, UNSUPPORTED

RAM = 8 << 20
CODE, STACK, SOURCE, TARGET = 0x100000, 0x180000, 0x140000, 0x150000
TABLES = 0x10000
PAGE = 0x40000000
FRAME = 0x200000
ABOVE_4G = 0x1_0000_0000
PSE, PAE, PGE, OSFXSR, OSXMM, FSGS, XSAVE, SMEP, SMAP, DE = (
    1 << bit for bit in (4, 5, 7, 9, 10, 16, 18, 20, 21, 3)
)
LONG = PAE | OSFXSR | OSXMM | FSGS | XSAVE
EFER = 0x901
RET = b"\xc3"


@dataclass
class Ending:
    """RAX and, where an exception ended the run, its vector."""

    rax: int
    vector: int | None


def run(text, *, bits=64, cr4=LONG, efer=EFER, paging=False, tables=()):
    """Execute `text` on the processor that the L0 uses."""
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if bits == 64 else 4)
    machine.ctl_set_cpu_model(uc.UC_CPU_X86_EPYC)
    machine.mem_map(0, RAM)
    machine.mem_map(ABOVE_4G, 4 << 20)
    code = assemble(f".intel_syntax noprefix\n.code{bits}\n{text}", CODE).bytes
    machine.mem_write(CODE, code)
    machine.mem_write(SOURCE, bytes(range(256)))
    machine.mem_write(FRAME, RET * 16)
    machine.mem_write(ABOVE_4G, struct.pack("<Q", 0x55AA))
    for address, data in tables:
        machine.mem_write(address, data)
    vectors = []

    def interrupt(engine, vector, _user):
        vectors.append(vector)
        engine.emu_stop()

    machine.hook_add(unicorn.UC_HOOK_INTR, interrupt)
    machine.reg_write(uc.UC_X86_REG_RSP, STACK)
    machine.reg_write(uc.UC_X86_REG_RSI, SOURCE)
    machine.reg_write(uc.UC_X86_REG_RDI, TARGET)
    machine.reg_write(uc.UC_X86_REG_CR4, cr4)
    if paging:
        machine.reg_write(uc.UC_X86_REG_CR3, TABLES)
        if bits == 64:
            machine.msr_write(0xC0000080, efer)
        machine.reg_write(uc.UC_X86_REG_CR0, 0x80010033)
    try:
        machine.emu_start(CODE, CODE + len(code), count=1000)
    except unicorn.UcError as error:
        vectors.append(6 if error.errno == unicorn.UC_ERR_INSN_INVALID else str(error))
    accumulator = uc.UC_X86_REG_RAX if bits == 64 else uc.UC_X86_REG_EAX
    return Ending(machine.reg_read(accumulator), vectors[0] if vectors else None)


def q(*entries):
    return struct.pack(f"<{len(entries)}Q", *entries)


def long_mode(leaf, *, one_gigabyte=False):
    """Identity map of the first GiB, and `leaf` at PAGE."""
    second = leaf | 0x80 if one_gigabyte else (TABLES + 0x2000) | 7
    return [
        (TABLES, q((TABLES + 0x1000) | 7)),
        (TABLES + 0x1000, q(0x83, second)),
        (TABLES + 0x2000, q((TABLES + 0x3000) | 7)),
        (TABLES + 0x3000, q(leaf)),
    ]


READ = f"mov rbx, {PAGE:#x}; mov rax, [rbx]"
CALL = f"mov rbx, {PAGE:#x}; call rbx; mov eax, 1"
FULL = 0xC3C3C3C3C3C3C3C3

# Feature -> (program, RAX after it); what the program does is decided by its own instructions.
COMPUTES = {
    "fpu": ("fninit; fld1; fadd st, st; fistp qword ptr [rdi]; mov rax, [rdi]", 2),
    "cx8": (
        "mov eax, 0x03020100; mov edx, 0x07060504; mov ebx, 7; mov ecx, 8; "
        "cmpxchg8b [rsi]; mov rax, [rsi]",
        0x8_0000_0007,
    ),
    "cx16": (
        "mov rax, 0x0706050403020100; mov rdx, 0x0f0e0d0c0b0a0908; mov ebx, 7; mov ecx, 8; "
        "cmpxchg16b [rsi]; mov rax, [rsi]; add rax, [rsi+8]",
        15,
    ),
    "cmov": ("mov ecx, 5; xor eax, eax; cmovz eax, ecx", 5),
    "mmx": ("movq mm0, [rsi]; paddb mm0, mm0; movq rax, mm0; emms", 0x0E0C0A0806040200),
    "clflush": ("mov eax, 1; clflush [rsi]", 1),
    "clflushopt": ("mov eax, 1; clflushopt [rsi]", 1),
    "3dnowprefetch": ("mov eax, 1; prefetchw [rsi]", 1),
    "lahf-lm": ("mov eax, 0x0100; sahf; setc al; movzx eax, al", 1),
    "fxsr": ("mov eax, 0x1234; movq xmm0, rax; fxsave [rdi]; mov rax, [rdi+160]", 0x1234),
    "sse": (
        "mov eax, 0x3fc00000; movd xmm0, eax; addss xmm0, xmm0; movd eax, xmm0",
        0x40400000,
    ),
    "sse2": (
        "movdqu xmm0, [rsi]; paddq xmm0, xmm0; psrldq xmm0, 8; movq rax, xmm0",
        0x1E1C1A1816141210,
    ),
    "pni": (
        "mov rax, 0x3f8000003f800000; movq xmm0, rax; haddps xmm0, xmm0; movd eax, xmm0",
        0x40000000,
    ),
    "ssse3": (
        "movdqu xmm0, [rsi]; movdqu xmm1, [rsi+8]; pshufb xmm0, xmm1; movq rax, xmm0",
        0x0F0E0D0C0B0A0908,
    ),
    "sse4.1": ("movdqu xmm0, [rsi]; pmulld xmm0, xmm0; movd eax, xmm0", 0x04010000),
    "sse4.2": ("xor eax, eax; mov ecx, 1; crc32 eax, ecx", 0xDD45AAB8),
    "sse4a": ("movdqu xmm0, [rsi]; extrq xmm0, 8, 8; movq rax, xmm0", 1),
    "mmxext": ("pcmpeqd mm0, mm0; pxor mm1, mm1; pavgb mm0, mm1; movd eax, mm0; emms", 0x80808080),
    "popcnt": ("mov rax, 0xff0f; popcnt rax, rax", 12),
    "movbe": ("movbe eax, [rsi]", 0x00010203),
    "abm": ("mov ecx, 0xff; lzcnt rax, rcx", 56),
    "bmi1": ("mov ecx, 0xf0; mov edx, 0xff; andn rax, rcx, rdx", 0xF),
    "bmi2": ("mov ecx, 0x1111; mov edx, 0x1111; pext rax, rcx, rdx", 0xF),
    "adx": ("xor eax, eax; mov ecx, 5; stc; adcx rax, rcx", 6),
    "aes": (
        "movdqu xmm0, [rsi]; pxor xmm1, xmm1; aesenc xmm0, xmm1; movq rax, xmm0",
        0x51336D2C455C6A6A,
    ),
    "pclmulqdq": (
        "mov eax, 3; movq xmm0, rax; pclmulqdq xmm0, xmm0, 0; movq rax, xmm0",
        5,
    ),
    "xsave": (
        "mov eax, 0x1234; movq xmm0, rax; mov eax, 3; xor edx, edx; xsave [rdi]; pxor xmm0, xmm0; "
        "xrstor [rdi]; movq rax, xmm0; add rax, [rdi+512]",
        0x1237,
    ),
    "xsaveopt": (
        "mov eax, 0x1234; movq xmm0, rax; mov eax, 3; xor edx, edx; xsaveopt [rdi]; "
        "mov rax, [rdi+160]",
        0x1234,
    ),
    "xgetbv1": ("mov eax, 1; movq xmm0, rax; mov ecx, 1; xgetbv; and eax, 2", 2),
    "fsgsbase": ("mov eax, 0x1234; wrfsbase rax; xor eax, eax; rdfsbase rax", 0x1234),
    "erms": ("mov ecx, 16; rep movsb; mov rax, [rdi-8]", 0x0F0E0D0C0B0A0908),
}


@pytest.mark.parametrize("name", COMPUTES)
def test_a_native_instruction_computes(name):
    text, expected = COMPUTES[name]
    assert run(text) == Ending(expected, None)


def test_debugging_extensions_bar_the_aliases_of_dr6_and_dr7():
    assert run("mov rax, dr4").vector is None
    assert run("mov rax, dr4", cr4=LONG | DE).vector == 6


def test_long_mode_translates():
    tables = long_mode(FRAME | 7)
    assert run(READ, paging=True, tables=tables) == Ending(FULL, None)


def test_a_1_gbyte_page_translates():
    tables = long_mode(7, one_gigabyte=True)
    text = f"mov rbx, {PAGE + FRAME:#x}; mov rax, [rbx]"
    assert run(text, paging=True, tables=tables) == Ending(FULL, None)


def test_no_execute_bars_fetches_only():
    tables = long_mode(FRAME | 7 | 1 << 63)
    assert run(READ, paging=True, tables=tables) == Ending(FULL, None)
    assert run(CALL, paging=True, tables=tables).vector == 14
    assert run(CALL, paging=True, tables=long_mode(FRAME | 7)) == Ending(1, None)


def test_smep_bars_supervisor_fetches_from_user_pages():
    tables = long_mode(FRAME | 7)
    assert run(CALL, cr4=LONG | SMEP, paging=True, tables=tables).vector == 14
    assert run(CALL, cr4=LONG | SMEP, paging=True, tables=long_mode(FRAME | 3)).vector is None


def test_smap_bars_supervisor_reads_of_user_pages_unless_ac_is_set():
    tables = long_mode(FRAME | 7)
    assert run(READ, cr4=LONG | SMAP, paging=True, tables=tables).vector == 14
    assert run("stac; " + READ, cr4=LONG | SMAP, paging=True, tables=tables) == Ending(FULL, None)


def test_global_pages_translate():
    tables = long_mode(FRAME | 0x107)
    assert run(READ, cr4=LONG | PGE, paging=True, tables=tables) == Ending(FULL, None)


READ_32 = f"mov ebx, {PAGE:#x}; mov eax, [ebx]"


def directory(entry):
    """A 32-bit page directory: the first 4 MiB, and `entry` at PAGE."""
    return [
        (TABLES, struct.pack("<I", 0x83)),
        (TABLES + 4 * (PAGE >> 22), struct.pack("<I", entry)),
    ]


def test_a_4_mbyte_page_translates():
    text = f"mov ebx, {PAGE + FRAME:#x}; mov eax, [ebx]"
    ending = run(text, bits=32, cr4=PSE, paging=True, tables=directory(0x83))
    assert ending == Ending(0xC3C3C3C3, None)


def test_pse_36_reaches_memory_above_4_gbytes():
    ending = run(READ_32, bits=32, cr4=PSE, paging=True, tables=directory(0x83 | 1 << 13))
    assert ending == Ending(0x55AA, None)


def test_pae_reaches_memory_above_4_gbytes():
    tables = [
        (TABLES, q((TABLES + 0x1000) | 1, (TABLES + 0x2000) | 1)),
        (TABLES + 0x1000, q(0x83)),
        (TABLES + 0x2000, q(ABOVE_4G | 0x83)),
    ]
    assert run(READ_32, bits=32, cr4=PAE, paging=True, tables=tables) == Ending(0x55AA, None)


ELSEWHERE = {"de", "lm", "pdpe1gb", "nx", "smep", "smap", "pge", "pse", "pse36", "pae"}


def test_every_native_feature_is_executed_here():
    assert set(COMPUTES) | ELSEWHERE == set(NATIVE)
    assert not set(COMPUTES) & ELSEWHERE


FAULTS = {
    "sha-ni": "sha1nexte xmm0, xmm1",
    "gfni": "gf2p8mulb xmm0, xmm1",
    "clwb": "clwb [rsi]",
    "clzero": ".byte 0x0f, 0x01, 0xfc",
    "pku": "xor ecx, ecx; rdpkru",
    "movdiri": "movdiri [rsi], ecx",
    "movdir64b": "movdir64b rdi, [rsi]",
    "serialize": "serialize",
    "3dnow": "pfadd mm0, mm1",
    "3dnowext": "pswapd mm0, mm1",
    "monitorx": ".byte 0x0f, 0x01, 0xfa",
    "rdpru": ".byte 0x0f, 0x01, 0xfd",
    "pcommit": ".byte 0x66, 0x0f, 0xae, 0xf8",
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_instruction_that_is_said_to_be_missing_faults(name):
    assert run(FAULTS[name]).vector == 6


def test_every_feature_that_is_said_to_fault_is_executed_here():
    reason = "the instruction raises #UD on the silicon"
    assert {name for name, why in UNSUPPORTED.items() if why == reason} == set(FAULTS)


@pytest.mark.parametrize(
    "text",
    [
        "mov eax, 3; xor edx, edx; .byte 0x48, 0x0f, 0xc7, 0x2f",
        "rdpid rax",
        "invpcid rax, [rsi]",
    ],
)
def test_what_is_emulated_at_the_undefined_opcode_exit_is_undefined(text):
    assert run(text).vector == 6


def test_the_compacted_form_of_xrstor_is_missing():
    text = (
        "mov eax, 3; xor edx, edx; mov qword ptr [rdi+512], 3; bts qword ptr [rdi+520], 63; "
        "xrstor [rdi]"
    )
    assert run(text).vector == 13
