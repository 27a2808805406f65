"""The fields of a VMCS and their encodings.

SDM, appendix "Field Encoding in VMCS".  An encoding is 32 bits: bit 0 selects the high half of a
64-bit field, bits 9:1 count, bits 11:10 give the area and bits 14:13 the width.

A VMX state is a `Mapping[VmcsField, int]`; since a `VmcsField` *is* its encoding, a
`dict[int, int]` keyed by encodings serves as one.
"""

from __future__ import annotations

from enum import IntEnum

from undervisor.arch.bits import plain_members


class FieldWidth(IntEnum):
    """Bits 14:13 of an encoding."""

    BITS_16 = 0
    BITS_64 = 1
    BITS_32 = 2
    NATURAL = 3


class FieldArea(IntEnum):
    """Bits 11:10 of an encoding: the field's type."""

    CONTROL = 0
    READ_ONLY = 1
    GUEST = 2
    HOST = 3


BITS = {
    FieldWidth.BITS_16: 16,
    FieldWidth.BITS_64: 64,
    FieldWidth.BITS_32: 32,
    FieldWidth.NATURAL: 64,
}
"""The number of bits that a field of a width holds on a processor with Intel 64."""

HIGH = 1
"""The access type of an encoding (bit 0): the high 32 bits of a 64-bit field."""

ENCODING_RESERVED = 0xFFFF_9000
"""Bits 31:15 and 12 of an encoding, which are 0 in every supported one."""


@plain_members
class VmcsField(IntEnum):
    """Every VMCS field, named in the manual's words, with its encoding for full access."""

    # 16-bit control fields
    VPID = 0x0000
    POSTED_INTERRUPT_NOTIFICATION_VECTOR = 0x0002
    EPTP_INDEX = 0x0004
    HLAT_PREFIX_SIZE = 0x0006
    LAST_PID_POINTER_INDEX = 0x0008
    VIRTUAL_TIMER_VECTOR = 0x000A

    # 16-bit guest-state fields
    GUEST_ES_SELECTOR = 0x0800
    GUEST_CS_SELECTOR = 0x0802
    GUEST_SS_SELECTOR = 0x0804
    GUEST_DS_SELECTOR = 0x0806
    GUEST_FS_SELECTOR = 0x0808
    GUEST_GS_SELECTOR = 0x080A
    GUEST_LDTR_SELECTOR = 0x080C
    GUEST_TR_SELECTOR = 0x080E
    GUEST_INTERRUPT_STATUS = 0x0810
    PML_INDEX = 0x0812
    GUEST_UINV = 0x0814

    # 16-bit host-state fields
    HOST_ES_SELECTOR = 0x0C00
    HOST_CS_SELECTOR = 0x0C02
    HOST_SS_SELECTOR = 0x0C04
    HOST_DS_SELECTOR = 0x0C06
    HOST_FS_SELECTOR = 0x0C08
    HOST_GS_SELECTOR = 0x0C0A
    HOST_TR_SELECTOR = 0x0C0C

    # 64-bit control fields
    IO_BITMAP_A_ADDRESS = 0x2000
    IO_BITMAP_B_ADDRESS = 0x2002
    MSR_BITMAP_ADDRESS = 0x2004
    EXIT_MSR_STORE_ADDRESS = 0x2006
    EXIT_MSR_LOAD_ADDRESS = 0x2008
    ENTRY_MSR_LOAD_ADDRESS = 0x200A
    EXECUTIVE_VMCS_POINTER = 0x200C
    PML_ADDRESS = 0x200E
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_ADDRESS = 0x2012
    APIC_ACCESS_ADDRESS = 0x2014
    POSTED_INTERRUPT_DESCRIPTOR_ADDRESS = 0x2016
    VM_FUNCTION_CONTROLS = 0x2018
    EPT_POINTER = 0x201A
    EOI_EXIT_BITMAP_0 = 0x201C
    EOI_EXIT_BITMAP_1 = 0x201E
    EOI_EXIT_BITMAP_2 = 0x2020
    EOI_EXIT_BITMAP_3 = 0x2022
    EPTP_LIST_ADDRESS = 0x2024
    VMREAD_BITMAP_ADDRESS = 0x2026
    VMWRITE_BITMAP_ADDRESS = 0x2028
    VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS = 0x202A
    XSS_EXITING_BITMAP = 0x202C
    ENCLS_EXITING_BITMAP = 0x202E
    SUB_PAGE_PERMISSION_TABLE_POINTER = 0x2030
    TSC_MULTIPLIER = 0x2032
    TERTIARY_CONTROLS = 0x2034
    ENCLV_EXITING_BITMAP = 0x2036
    LOW_PASID_DIRECTORY_ADDRESS = 0x2038
    HIGH_PASID_DIRECTORY_ADDRESS = 0x203A
    SHARED_EPT_POINTER = 0x203C
    PCONFIG_EXITING_BITMAP = 0x203E
    HLAT_POINTER = 0x2040
    PID_POINTER_TABLE_ADDRESS = 0x2042
    SECONDARY_EXIT_CONTROLS = 0x2044
    SPEC_CTRL_MASK = 0x204A
    SPEC_CTRL_SHADOW = 0x204C
    GUEST_DEADLINE_SHADOW = 0x204E
    INJECTED_EVENT_DATA = 0x2052

    # 64-bit read-only data fields
    GUEST_PHYSICAL_ADDRESS = 0x2400
    MSR_DATA = 0x2402
    ORIGINAL_EVENT_DATA = 0x2404

    # 64-bit guest-state fields
    VMCS_LINK_POINTER = 0x2800
    GUEST_DEBUGCTL = 0x2802
    GUEST_PAT = 0x2804
    GUEST_EFER = 0x2806
    GUEST_PERF_GLOBAL_CTRL = 0x2808
    GUEST_PDPTE0 = 0x280A
    GUEST_PDPTE1 = 0x280C
    GUEST_PDPTE2 = 0x280E
    GUEST_PDPTE3 = 0x2810
    GUEST_BNDCFGS = 0x2812
    GUEST_RTIT_CTL = 0x2814
    GUEST_LBR_CTL = 0x2816
    GUEST_PKRS = 0x2818
    GUEST_FRED_CONFIG = 0x281A
    GUEST_FRED_RSP1 = 0x281C
    GUEST_FRED_RSP2 = 0x281E
    GUEST_FRED_RSP3 = 0x2820
    GUEST_FRED_STKLVLS = 0x2822
    GUEST_FRED_SSP1 = 0x2824
    GUEST_FRED_SSP2 = 0x2826
    GUEST_FRED_SSP3 = 0x2828
    GUEST_SPEC_CTRL = 0x282E
    GUEST_DEADLINE = 0x2830

    # 64-bit host-state fields
    HOST_PAT = 0x2C00
    HOST_EFER = 0x2C02
    HOST_PERF_GLOBAL_CTRL = 0x2C04
    HOST_PKRS = 0x2C06
    HOST_FRED_CONFIG = 0x2C08
    HOST_FRED_RSP1 = 0x2C0A
    HOST_FRED_RSP2 = 0x2C0C
    HOST_FRED_RSP3 = 0x2C0E
    HOST_FRED_STKLVLS = 0x2C10
    HOST_FRED_SSP1 = 0x2C12
    HOST_FRED_SSP2 = 0x2C14
    HOST_FRED_SSP3 = 0x2C16
    HOST_SPEC_CTRL = 0x2C1A

    # 32-bit control fields
    PIN_BASED_CONTROLS = 0x4000
    PRIMARY_CONTROLS = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    EXIT_CONTROLS = 0x400C
    EXIT_MSR_STORE_COUNT = 0x400E
    EXIT_MSR_LOAD_COUNT = 0x4010
    ENTRY_CONTROLS = 0x4012
    ENTRY_MSR_LOAD_COUNT = 0x4014
    ENTRY_INTERRUPTION_INFORMATION = 0x4016
    ENTRY_EXCEPTION_ERROR_CODE = 0x4018
    ENTRY_INSTRUCTION_LENGTH = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_CONTROLS = 0x401E
    PLE_GAP = 0x4020
    PLE_WINDOW = 0x4022
    INSTRUCTION_TIMEOUT_CONTROL = 0x4024

    # 32-bit read-only data fields
    VM_INSTRUCTION_ERROR = 0x4400
    EXIT_REASON = 0x4402
    EXIT_INTERRUPTION_INFORMATION = 0x4404
    EXIT_INTERRUPTION_ERROR_CODE = 0x4406
    IDT_VECTORING_INFORMATION = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    EXIT_INSTRUCTION_LENGTH = 0x440C
    EXIT_INSTRUCTION_INFORMATION = 0x440E

    # 32-bit guest-state fields
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_ACCESS_RIGHTS = 0x4814
    GUEST_CS_ACCESS_RIGHTS = 0x4816
    GUEST_SS_ACCESS_RIGHTS = 0x4818
    GUEST_DS_ACCESS_RIGHTS = 0x481A
    GUEST_FS_ACCESS_RIGHTS = 0x481C
    GUEST_GS_ACCESS_RIGHTS = 0x481E
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820
    GUEST_TR_ACCESS_RIGHTS = 0x4822
    GUEST_INTERRUPTIBILITY_STATE = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SMBASE = 0x4828
    GUEST_SYSENTER_CS = 0x482A
    PREEMPTION_TIMER_VALUE = 0x482E

    # 32-bit host-state field
    HOST_SYSENTER_CS = 0x4C00

    # Natural-width control fields
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    CR3_TARGET_VALUE_0 = 0x6008
    CR3_TARGET_VALUE_1 = 0x600A
    CR3_TARGET_VALUE_2 = 0x600C
    CR3_TARGET_VALUE_3 = 0x600E

    # Natural-width read-only data fields
    EXIT_QUALIFICATION = 0x6400
    IO_RCX = 0x6402
    IO_RSI = 0x6404
    IO_RDI = 0x6406
    IO_RIP = 0x6408
    GUEST_LINEAR_ADDRESS = 0x640A

    # Natural-width guest-state fields
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DEBUG_EXCEPTIONS = 0x6822
    GUEST_SYSENTER_ESP = 0x6824
    GUEST_SYSENTER_EIP = 0x6826
    GUEST_S_CET = 0x6828
    GUEST_SSP = 0x682A
    GUEST_INTERRUPT_SSP_TABLE_ADDR = 0x682C

    # Natural-width host-state fields
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_SYSENTER_ESP = 0x6C10
    HOST_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16
    HOST_S_CET = 0x6C18
    HOST_SSP = 0x6C1A
    HOST_INTERRUPT_SSP_TABLE_ADDR = 0x6C1C

    @property
    def width(self) -> FieldWidth:
        """The field's width as the encoding has it."""
        return FieldWidth(self >> 13 & 3)

    @property
    def bits(self) -> int:
        """How many bits the field holds on a processor with Intel 64."""
        return BITS[self.width]

    @property
    def area(self) -> FieldArea:
        """Whether the field controls, informs, or holds guest or host state."""
        return FieldArea(self >> 10 & 3)

    @property
    def index(self) -> int:
        """Bits 9:1 of the encoding: the field's number among those of its width and area."""
        return self >> 1 & 0x1FF

    @property
    def high(self) -> int:
        """The encoding for access to bits 63:32; ValueError unless the field has 64 bits."""
        if self.width is not FieldWidth.BITS_64:
            raise ValueError(f"{self.name} is not a 64-bit field")
        return self | HIGH

    @property
    def mask(self) -> int:
        """All bits that the field holds."""
        return (1 << self.bits) - 1


HIGHEST_INDEX = max(field.index for field in VmcsField)
"""What IA32_VMX_VMCS_ENUM reports for a processor that has every field."""


SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
"""The segment registers in the order in which their fields are encoded."""


def guest_segment(register: str, part: str) -> VmcsField:
    """The guest field for `part` (SELECTOR, BASE, LIMIT, ACCESS_RIGHTS) of a segment register."""
    return VmcsField[f"GUEST_{register}_{part}"]
