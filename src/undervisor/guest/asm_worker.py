"""The assembler's process: reads sources, writes ELF objects, dies of the first bad source.

LLVM leaves the process when inline assembly has an error, after printing it; so it has a process
of its own, started once and kept.  Frames both ways are a 32-bit little-endian length and data.
This file runs as a script and imports nothing of ours, to start fast.
"""

from __future__ import annotations

import resource
import struct
import sys

import llvmlite.binding as llvm

MEMORY_LIMIT = 640 << 20
"""Bytes of address space: a source that asks for a gigabyte of zeros ends here."""


def quoted(source: str) -> str:
    """`source` as the body of an LLVM IR string: everything unusual in hexadecimal."""
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:02X}"
        for byte in source.encode()
    )


def main() -> None:
    """Assemble until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    triple = "x86_64-unknown-none-elf"
    machine = llvm.Target.from_triple(triple).create_target_machine()
    while header := sys.stdin.buffer.read(4):
        source = sys.stdin.buffer.read(struct.unpack("<I", header)[0]).decode()
        module = llvm.parse_assembly(
            f'target triple = "{triple}"\nmodule asm "{quoted(source)}"\n', llvm.create_context()
        )
        elf = machine.emit_object(module)
        sys.stdout.buffer.write(struct.pack("<I", len(elf)) + elf)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
