"""CPUID and its cost, executed here: a few instructions compiled from LLVM IR.

An unprivileged user has no cpuid device, but the instruction itself is not privileged.  It is also
the one instruction that always exits from a guest under VMX, so its cost tells who is below.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

from undervisor.host.access.protocol import Cpuid, Timing
from undervisor.host.fact import Fact, Known, Unknown

_IR = """
define void @cpuid(i32 %leaf, i32 %subleaf, i32* %out) {
  %r = call {i32, i32, i32, i32} asm sideeffect "cpuid",
       "={ax},={bx},={cx},={dx},{ax},{cx}"(i32 %leaf, i32 %subleaf)
  %a = extractvalue {i32, i32, i32, i32} %r, 0
  %b = extractvalue {i32, i32, i32, i32} %r, 1
  %c = extractvalue {i32, i32, i32, i32} %r, 2
  %d = extractvalue {i32, i32, i32, i32} %r, 3
  store i32 %a, i32* %out
  %p1 = getelementptr i32, i32* %out, i32 1
  store i32 %b, i32* %p1
  %p2 = getelementptr i32, i32* %out, i32 2
  store i32 %c, i32* %p2
  %p3 = getelementptr i32, i32* %out, i32 3
  store i32 %d, i32* %p3
  ret void
}

define i64 @cpuid_ticks() {
  %t0 = call i64 asm sideeffect "lfence; rdtsc; shl $$32, %rdx; or %rdx, %rax",
        "={rax},~{rdx},~{flags}"()
  %x = call i32 asm sideeffect "xor %eax, %eax; xor %ecx, %ecx; cpuid",
       "={ax},~{bx},~{cx},~{dx},~{flags}"()
  %t1 = call i64 asm sideeffect "lfence; rdtsc; shl $$32, %rdx; or %rdx, %rax",
        "={rax},~{rdx},~{flags}"()
  %d = sub i64 %t1, %t0
  ret i64 %d
}

define i64 @plain_ticks() {
  %t0 = call i64 asm sideeffect "lfence; rdtsc; shl $$32, %rdx; or %rdx, %rax",
        "={rax},~{rdx},~{flags}"()
  %x = call i32 asm sideeffect "xor %eax, %eax; xor %ecx, %ecx; lfence",
       "={ax},~{cx},~{flags}"()
  %t1 = call i64 asm sideeffect "lfence; rdtsc; shl $$32, %rdx; or %rdx, %rax",
        "={rax},~{rdx},~{flags}"()
  %d = sub i64 %t1, %t0
  ret i64 %d
}
"""

_ROUNDS = 201


@functools.cache
def _functions() -> dict[str, Callable[..., int]]:
    """The compiled functions; the engine stays referenced by the closure of this cache."""
    import llvmlite
    from llvmlite import binding

    # llvmlite 0.45 and later initializes the core by itself and refuses the explicit call.
    if tuple(int(part) for part in llvmlite.__version__.split(".")[:2]) < (0, 45):
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    target = binding.Target.from_default_triple().create_target_machine()
    module = binding.parse_assembly(_IR)
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _KEEP.append(engine)
    pointer = ctypes.POINTER(ctypes.c_uint32)
    make = {
        "cpuid": ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, pointer),
        "cpuid_ticks": ctypes.CFUNCTYPE(ctypes.c_uint64),
        "plain_ticks": ctypes.CFUNCTYPE(ctypes.c_uint64),
    }
    return {name: kind(engine.get_function_address(name)) for name, kind in make.items()}


_KEEP: list[object] = []


def cpuid(leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
    """Execute CPUID on whatever processor we are on."""
    source = f"CPUID.{leaf:X}H:{subleaf}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return Unknown(source, f"{platform.machine()} has no CPUID instruction")
    out = (ctypes.c_uint32 * 4)()
    try:
        _functions()["cpuid"](leaf, subleaf, out)
    except ImportError:
        return _uncompiled(source)
    return Known(Cpuid(*out), source)


def timing() -> Fact[Timing]:
    """Medians over a few hundred executions; no device is opened, nothing is disturbed."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return Unknown("timing", f"{platform.machine()} has no CPUID instruction")
    try:
        medians = [
            sorted(_functions()[name]() for _ in range(_ROUNDS))[_ROUNDS // 2]
            for name in ("cpuid_ticks", "plain_ticks")
        ]
    except ImportError:
        return _uncompiled("timing")
    return Known(Timing(*medians), "CPUID timed with RDTSC")


def _uncompiled(source: str) -> Unknown:
    """Small systems, such as the lab's L1, have no compiler of ours."""
    return Unknown(source, "llvmlite is not installed here", "pip install llvmlite")
