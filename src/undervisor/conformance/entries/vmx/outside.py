"""VM entries from a 32-bit host.

CR0.PG cannot be cleared in VMX operation, so the way leads out of it and in again, on both sides.
"""

from __future__ import annotations

import struct
from typing import Final

from undervisor.conformance.entries.legacy import RESULTS, outside_long_mode
from undervisor.conformance.entries.vmx.states import OUTSIDE, PAE, REGION, VMCS
from undervisor.guest.probe.answers import CF, ZF, Answer, L2Run, VmxOutcome, VmxResult
from undervisor.guest.probe.client import Batch

_LAUNCH: Final = """
    vmxon REGION_AT
    vmptrld VMCS_AT
    mov $HOST_RIP, %eax
    mov $landed, %edx
    test %edi, %edi
    jnz 1f
    vmwrite %edx, %eax
1:  mov $HOST_RSP, %eax
    vmwrite %esp, %eax
    vmlaunch
    pushf
    pop %eax
    mov %eax, RESULTS
    mov $VM_INSTRUCTION_ERROR, %eax
    vmread %eax, %edx
    mov %edx, RESULTS + 8
    jmp 2f
landed:
    movl $0, RESULTS
2:  vmclear VMCS_AT
    vmxoff
"""
_POINTERS: Final = RESULTS + 0x40
_FIELDS: Final = {"HOST_RIP": 0x6C16, "HOST_RSP": 0x6C14, "VM_INSTRUCTION_ERROR": 0x4400}


def program() -> tuple[int, bytes]:
    """Where the routine goes, and its page."""
    at = OUTSIDE + _POINTERS
    code = outside_long_mode(_LAUNCH, OUTSIDE, PAE, REGION_AT=at, VMCS_AT=at + 8, **_FIELDS)
    return OUTSIDE, code.ljust(_POINTERS, b"\0") + struct.pack("<2Q", REGION, VMCS)


def run(batch: Batch, *, alone: bool) -> Answer[L2Run]:
    """VMLAUNCH of the current VMCS from a 32-bit host; VMX operation is as before, afterwards.

    `alone`: with the host RIP that is in the VMCS.
    """
    batch.vmclear(VMCS)
    batch.vmxoff()
    ran = batch.call(OUTSIDE, {"rdi": int(alone)}, [], what="L2 run from a 32-bit host")
    batch.vmxon(REGION)
    batch.vmptrld(VMCS)
    answer: Answer[L2Run] = Answer("L2 run from a 32-bit host")
    batch.read(OUTSIDE + RESULTS, 16)
    request = batch.requests[-1]

    def decode(data: bytes) -> L2Run:
        _ = ran.value
        return L2Run(_result(*struct.unpack("<2Q", data)), {})

    batch.requests[-1] = type(request)(request.data, request.most, 0, answer, decode)
    return answer


def _result(flags: int, error: int) -> VmxResult:
    if flags & CF:
        return VmxResult(VmxOutcome.FAIL_INVALID)
    return VmxResult(VmxOutcome.FAIL_VALID, error) if flags & ZF else VmxResult(VmxOutcome.SUCCEED)
