"""Where KVM keeps each field in its vmcs12: the layout behind `KVM_GET_NESTED_STATE`.

KVM promises that these offsets never change; revision 11E57ED0H names the layout.
"""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.arch.vmx.fields import SEGMENTS
from undervisor.arch.vmx.fields import VmcsField as F

REVISION = 0x11E5_7ED0
ABORT_OFFSET = 4
LAUNCH_STATE_OFFSET = 8
SIZE = 0x1000

_GUEST_6 = ("ES", "CS", "SS", "DS", "FS", "GS")
_TABLES = ("GDTR", "IDTR")


def _run(offset: int, size: int, names: str) -> Iterator[tuple[F, int, int]]:
    """Fields one after another from `offset`, `size` bytes each."""
    for number, name in enumerate(names.split()):
        yield F[name], offset + number * size, size


def _each(pattern: str, registers: tuple[str, ...]) -> str:
    return " ".join(pattern.format(register) for register in registers)


LAYOUT: tuple[tuple[F, int, int], ...] = (
    *_run(
        40,
        8,
        "IO_BITMAP_A_ADDRESS IO_BITMAP_B_ADDRESS MSR_BITMAP_ADDRESS EXIT_MSR_STORE_ADDRESS "
        "EXIT_MSR_LOAD_ADDRESS ENTRY_MSR_LOAD_ADDRESS TSC_OFFSET VIRTUAL_APIC_ADDRESS "
        "APIC_ACCESS_ADDRESS POSTED_INTERRUPT_DESCRIPTOR_ADDRESS EPT_POINTER EOI_EXIT_BITMAP_0 "
        "EOI_EXIT_BITMAP_1 EOI_EXIT_BITMAP_2 EOI_EXIT_BITMAP_3 XSS_EXITING_BITMAP "
        "GUEST_PHYSICAL_ADDRESS VMCS_LINK_POINTER GUEST_DEBUGCTL GUEST_PAT GUEST_EFER "
        "GUEST_PERF_GLOBAL_CTRL GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 "
        "GUEST_BNDCFGS HOST_PAT HOST_EFER HOST_PERF_GLOBAL_CTRL VMREAD_BITMAP_ADDRESS "
        "VMWRITE_BITMAP_ADDRESS VM_FUNCTION_CONTROLS EPTP_LIST_ADDRESS PML_ADDRESS",
    ),
    *_run(
        344,
        8,
        "CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW "
        "CR3_TARGET_VALUE_0 CR3_TARGET_VALUE_1 CR3_TARGET_VALUE_2 CR3_TARGET_VALUE_3 "
        "EXIT_QUALIFICATION GUEST_LINEAR_ADDRESS GUEST_CR0 GUEST_CR3 GUEST_CR4 "
        + _each("GUEST_{}_BASE", (*SEGMENTS, *_TABLES))
        + " GUEST_DR7 GUEST_RSP GUEST_RIP GUEST_RFLAGS GUEST_PENDING_DEBUG_EXCEPTIONS "
        "GUEST_SYSENTER_ESP GUEST_SYSENTER_EIP HOST_CR0 HOST_CR3 HOST_CR4 "
        + _each("HOST_{}_BASE", ("FS", "GS", "TR", "GDTR", "IDTR"))
        + " HOST_SYSENTER_ESP HOST_SYSENTER_EIP HOST_RSP HOST_RIP",
    ),
    *_run(
        744,
        4,
        "PIN_BASED_CONTROLS PRIMARY_CONTROLS EXCEPTION_BITMAP PAGE_FAULT_ERROR_CODE_MASK "
        "PAGE_FAULT_ERROR_CODE_MATCH CR3_TARGET_COUNT EXIT_CONTROLS EXIT_MSR_STORE_COUNT "
        "EXIT_MSR_LOAD_COUNT ENTRY_CONTROLS ENTRY_MSR_LOAD_COUNT ENTRY_INTERRUPTION_INFORMATION "
        "ENTRY_EXCEPTION_ERROR_CODE ENTRY_INSTRUCTION_LENGTH TPR_THRESHOLD SECONDARY_CONTROLS "
        "VM_INSTRUCTION_ERROR EXIT_REASON EXIT_INTERRUPTION_INFORMATION "
        "EXIT_INTERRUPTION_ERROR_CODE IDT_VECTORING_INFORMATION IDT_VECTORING_ERROR_CODE "
        "EXIT_INSTRUCTION_LENGTH EXIT_INSTRUCTION_INFORMATION "
        + _each("GUEST_{}_LIMIT", (*SEGMENTS, *_TABLES))
        + " "
        + _each("GUEST_{}_ACCESS_RIGHTS", SEGMENTS)
        + " GUEST_INTERRUPTIBILITY_STATE GUEST_ACTIVITY_STATE GUEST_SYSENTER_CS "
        "HOST_SYSENTER_CS PREEMPTION_TIMER_VALUE",
    ),
    *_run(
        960,
        2,
        "VPID POSTED_INTERRUPT_NOTIFICATION_VECTOR "
        + _each("GUEST_{}_SELECTOR", SEGMENTS)
        + " GUEST_INTERRUPT_STATUS "
        + _each("HOST_{}_SELECTOR", (*_GUEST_6, "TR"))
        + " PML_INDEX",
    ),
)


def decode(raw: bytes) -> dict[int, int]:
    """All fields of a vmcs12."""
    return {
        int(field): int.from_bytes(raw[offset : offset + size], "little")
        for field, offset, size in LAYOUT
        if offset + size <= len(raw)
    }


def encode(state: dict[int, int]) -> bytes:
    """A vmcs12 that holds `state`; for tests and for making blobs."""
    raw = bytearray(SIZE)
    raw[:4] = REVISION.to_bytes(4, "little")
    for field, offset, size in LAYOUT:
        value = state.get(field, 0) & ((1 << size * 8) - 1)
        raw[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(raw)
