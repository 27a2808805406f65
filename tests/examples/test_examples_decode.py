"""The example's decoder of memory accesses, compiled for this machine, against iced-x86."""

import ctypes
import itertools
import shutil
import subprocess

import pytest
from example_machines import SOURCES
from iced_x86 import Code, Encoder, Instruction, MemoryOperand, Register

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")

# In the order of `struct registers` in hypervisor.h; RSP is not among them.
NAMES = ["AX", "BX", "CX", "DX", "SI", "DI", "BP"]
REGISTERS = {getattr(Register, f"E{name}"): at for at, name in enumerate(NAMES)}
REGISTERS |= {getattr(Register, f"R{number}D"): number - 1 for number in range(8, 16)}
BASES = [Register.RAX, Register.RSP, Register.RBP, Register.R12, Register.R13, Register.R9]
PLACES = [
    *(MemoryOperand(base, displ=d, displ_size=s) for base in BASES for d, s in ((0, 0), (16, 1))),
    *(MemoryOperand(base, displ=0x1000, displ_size=8) for base in BASES),
    *(MemoryOperand(base, Register.RCX, 4, 8, 1) for base in BASES),
    MemoryOperand(Register.NONE, Register.R10, 8, 0x1000, 8),
    MemoryOperand(Register.NONE, displ=0x7EE00300, displ_size=8),
    MemoryOperand(Register.RIP, displ=0x20000, displ_size=8),
]


class Access(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_uint8),
        ("is_store", ctypes.c_bool),
        ("has_immediate", ctypes.c_bool),
        ("immediate", ctypes.c_uint32),
        ("register", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    library = tmp_path_factory.mktemp("decode") / "decode.so"
    command = ["gcc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-I", str(SOURCES / "common")]
    subprocess.run([*command, str(SOURCES / "common/decode.c"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).decode_memory_access
    function.restype = ctypes.c_bool
    registers = (ctypes.c_uint64 * 15)()

    def call(code):
        access = Access()
        if not function(bytes(code).ljust(16, b"\xcc"), registers, ctypes.byref(access)):
            return None
        at = None
        if access.register:
            at = (access.register - ctypes.addressof(registers)) // 8
        return access, at

    return call


def encode(instruction):
    encoder = Encoder(64)
    encoder.encode(instruction, 0x1000)
    return encoder.take_buffer()


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_loads_and_stores_have_the_right_length_and_register(decode, place):
    for (register, at), is_store in itertools.product(REGISTERS.items(), (True, False)):
        if is_store:
            made = Instruction.create_mem_reg(Code.MOV_RM32_R32, place, register)
        else:
            made = Instruction.create_reg_mem(Code.MOV_R32_RM32, register, place)
        code = encode(made)
        access, found = decode(code)
        assert (access.length, access.is_store, found) == (len(code), is_store, at), code.hex()


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_stores_of_an_immediate_have_its_value(decode, place):
    code = encode(Instruction.create_mem_i32(Code.MOV_RM32_IMM32, place, 0x12345678))
    access, found = decode(code)
    assert (access.length, access.is_store, access.immediate) == (len(code), True, 0x12345678)
    assert access.has_immediate
    assert found is None


@pytest.mark.parametrize(
    "code",
    [
        "89c8",  # to a register
        "48890424",  # 64 bits
        "668903",  # 16 bits
        "8803",  # 8 bits
        "8923",  # ESP
        "0103",  # ADD
        "c70b00000000",  # not MOV
        "cc",
    ],
)
def test_anything_else_is_refused(decode, code):
    assert decode(bytes.fromhex(code)) is None
