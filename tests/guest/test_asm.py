import time

import pytest

from undervisor.errors import BadInput
from undervisor.guest import asm_process
from undervisor.guest.asm import AsmError, assemble


def test_64_bit_code_in_att_syntax_is_the_default():
    assert assemble("mov $1, %eax; hlt").bytes == bytes.fromhex("b801000000f4")


def test_intel_syntax_is_understood():
    code = assemble(".intel_syntax noprefix\nmov eax, 1\nhlt")
    assert code.bytes == bytes.fromhex("b801000000f4")


@pytest.mark.parametrize(
    ("mode", "encoding"),
    [(".code16", "66b801000000"), (".code32", "b801000000"), (".code64", "b801000000")],
)
def test_each_mode_has_its_own_encoding(mode, encoding):
    assert assemble(f"{mode}\nmovl $1, %eax").bytes == bytes.fromhex(encoding)


@pytest.mark.parametrize(
    ("instruction", "encoding"),
    [
        ("vmrun %rax", "0f01d8"),
        ("vmload %rax", "0f01da"),
        ("vmsave %rax", "0f01db"),
        ("vmmcall", "0f01d9"),
        ("stgi", "0f01dc"),
        ("clgi", "0f01dd"),
        ("skinit %eax", "0f01de"),
        ("invlpga %rax, %ecx", "0f01df"),
        ("vmcall", "0f01c1"),
        ("vmlaunch", "0f01c2"),
        ("vmresume", "0f01c3"),
        ("vmxoff", "0f01c4"),
        ("vmfunc", "0f01d4"),
        ("vmxon (%rax)", "f30fc730"),
        ("vmclear (%rax)", "660fc730"),
        ("vmptrld (%rax)", "0fc730"),
        ("vmptrst (%rax)", "0fc738"),
        ("vmread %rax, %rbx", "0f78c3"),
        ("vmwrite %rax, %rbx", "0f79d8"),
        ("invept (%rbx), %rax", "660f388003"),
        ("invvpid (%rbx), %rax", "660f388103"),
    ],
)
def test_every_virtualization_instruction_assembles(instruction, encoding):
    assert assemble(instruction).bytes == bytes.fromhex(encoding)


def test_labels_are_addresses_from_the_origin():
    code = assemble("a: nop\nb: hlt\n.set size, 5\n.long b", origin=0x100000)
    assert code.labels == {"a": 0x100000, "b": 0x100001, "size": 5}
    assert code.bytes == bytes.fromhex("90f401001000")
    assert (len(code), code.end) == (6, 0x100006)


def test_a_far_jump_from_16_bit_code_has_the_linked_address():
    code = assemble(".code16\nljmpl $8, $there\n.code32\nthere: hlt", origin=0x7C00)
    assert code.bytes == bytes.fromhex("66ea087c00000800f4")


def test_a_relative_jump_to_a_constant_depends_on_the_origin():
    assert assemble("jmp 0x2000", origin=0x1000).bytes == bytes.fromhex("e9fb0f0000")


def test_symbols_are_constants_of_the_source():
    assert assemble("mov $count, %al", symbols={"count": 7}).bytes == bytes.fromhex("b007")


def test_an_error_names_the_line_and_shows_it():
    with pytest.raises(AsmError, match=r"^line 3: invalid instruction mnemonic 'foo': foo bar$"):
        assemble("nop\nnop\nfoo bar\nhlt", symbols={"x": 1})


def test_after_an_error_the_next_source_assembles():
    for _ in range(2):
        with pytest.raises(AsmError):
            assemble("nonsense at all")
        assert assemble("int3").bytes == b"\xcc"


def test_an_undefined_symbol_is_named():
    with pytest.raises(AsmError, match="'nowhere' is used but not defined"):
        assemble("jmp nowhere")


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(AsmError, match="does not fit in 32 bits"):
        assemble("here: .long here", origin=1 << 32)


def test_data_in_another_section_is_refused():
    with pytest.raises(AsmError, match=r"section \.data"):
        assemble("nop\n.data\n.long 1")


def test_quotes_backslashes_and_other_scripts_pass_unchanged():
    code = assemble('.ascii "a\\"b\\\\c\\n"  # größer “as” text')
    assert code.bytes == b'a"b\\c\n'


def test_a_source_that_asks_for_gigabytes_is_refused():
    with pytest.raises(AsmError):
        assemble(".fill 0x100000000, 8, 1")


def test_a_source_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(asm_process, "TIME_LIMIT", 1.0)
    begin = time.monotonic()
    with pytest.raises(AsmError):
        assemble(".rept 100000000\n.rept 100000000\nnop\n.endr\n.endr")
    assert time.monotonic() - begin < 10


def test_the_same_source_is_assembled_once():
    assert assemble("nop; nop", origin=3) is assemble("nop; nop", origin=3)


def test_where_llvm_is_missing_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(asm_process, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="llvmlite is not installed") as caught:
        asm_process.Assembler().run("nop")
    assert "--host" in caught.value.hint
