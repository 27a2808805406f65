"""The virtual machine control block: every field with its offset and width, and a fast view.

APM 2 "Layout of VMCB" (appendix): the control area at 000h, the state save area at 400h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from undervisor.arch.bits import Bits, Register, plain_members
from undervisor.arch.x86.segments import Segment, SegmentRegister

SIZE: Final = 0x1000
SAVE_AREA: Final = 0x400


@plain_members
class VmcbField(IntEnum):
    """A field of the VMCB: its value is the byte offset, `width` its size in bytes."""

    width: int

    def __new__(cls, offset: int, width: int) -> VmcbField:
        """A member that is the integer `offset`."""
        member = int.__new__(cls, offset)
        member._value_ = offset
        member.width = width
        return member

    # fmt: off
    # The control area, table "VMCB Layout, Control Area"
    INTERCEPT_CR_READ       = 0x000, 2
    INTERCEPT_CR_WRITE      = 0x002, 2
    INTERCEPT_DR_READ       = 0x004, 2
    INTERCEPT_DR_WRITE      = 0x006, 2
    INTERCEPT_EXCEPTIONS    = 0x008, 4
    INTERCEPT_WORD3         = 0x00C, 4
    INTERCEPT_WORD4         = 0x010, 4
    INTERCEPT_WORD5         = 0x014, 4
    PAUSE_FILTER_THRESHOLD  = 0x03C, 2
    PAUSE_FILTER_COUNT      = 0x03E, 2
    IOPM_BASE_PA            = 0x040, 8
    MSRPM_BASE_PA           = 0x048, 8
    TSC_OFFSET              = 0x050, 8
    GUEST_ASID              = 0x058, 4
    TLB_CONTROL             = 0x05C, 1
    ERAP_CONTROL            = 0x05D, 1
    V_INTR_CONTROL          = 0x060, 4
    V_INTR_VECTOR           = 0x064, 4
    INTERRUPT_SHADOW        = 0x068, 8
    EXITCODE                = 0x070, 8
    EXITINFO1               = 0x078, 8
    EXITINFO2               = 0x080, 8
    EXITINTINFO             = 0x088, 8
    NESTED_CONTROL          = 0x090, 8
    AVIC_APIC_BAR           = 0x098, 8
    GHCB_GPA                = 0x0A0, 8
    EVENTINJ                = 0x0A8, 8
    N_CR3                   = 0x0B0, 8
    LBR_CONTROL             = 0x0B8, 8
    CLEAN_BITS              = 0x0C0, 4
    NRIP                    = 0x0C8, 8
    FETCHED_BYTES           = 0x0D0, 1
    GUEST_INSTRUCTION_BYTES = 0x0D1, 15
    AVIC_BACKING_PAGE       = 0x0E0, 8
    AVIC_LOGICAL_TABLE      = 0x0F0, 8
    AVIC_PHYSICAL_TABLE     = 0x0F8, 8
    VMSA_POINTER            = 0x108, 8
    VMGEXIT_RAX             = 0x110, 8
    VMGEXIT_CPL             = 0x118, 1
    BUS_LOCK_THRESHOLD      = 0x120, 2
    UPDATE_IRR              = 0x134, 4
    ALLOWED_SEV_FEATURES    = 0x138, 8
    GUEST_SEV_FEATURES      = 0x140, 8
    REQUESTED_IRR           = 0x150, 32
    PML_BASE                = 0x1C8, 8
    PML_INDEX               = 0x1D0, 2
    RESERVED_FOR_HOST       = 0x3E0, 32

    # The state save area, table "VMCB Layout, State Save Area"
    ES_SELECTOR             = 0x400, 2
    ES_ATTRIBUTES           = 0x402, 2
    ES_LIMIT                = 0x404, 4
    ES_BASE                 = 0x408, 8
    CS_SELECTOR             = 0x410, 2
    CS_ATTRIBUTES           = 0x412, 2
    CS_LIMIT                = 0x414, 4
    CS_BASE                 = 0x418, 8
    SS_SELECTOR             = 0x420, 2
    SS_ATTRIBUTES           = 0x422, 2
    SS_LIMIT                = 0x424, 4
    SS_BASE                 = 0x428, 8
    DS_SELECTOR             = 0x430, 2
    DS_ATTRIBUTES           = 0x432, 2
    DS_LIMIT                = 0x434, 4
    DS_BASE                 = 0x438, 8
    FS_SELECTOR             = 0x440, 2
    FS_ATTRIBUTES           = 0x442, 2
    FS_LIMIT                = 0x444, 4
    FS_BASE                 = 0x448, 8
    GS_SELECTOR             = 0x450, 2
    GS_ATTRIBUTES           = 0x452, 2
    GS_LIMIT                = 0x454, 4
    GS_BASE                 = 0x458, 8
    GDTR_SELECTOR           = 0x460, 2
    GDTR_ATTRIBUTES         = 0x462, 2
    GDTR_LIMIT              = 0x464, 4
    GDTR_BASE               = 0x468, 8
    LDTR_SELECTOR           = 0x470, 2
    LDTR_ATTRIBUTES         = 0x472, 2
    LDTR_LIMIT              = 0x474, 4
    LDTR_BASE               = 0x478, 8
    IDTR_SELECTOR           = 0x480, 2
    IDTR_ATTRIBUTES         = 0x482, 2
    IDTR_LIMIT              = 0x484, 4
    IDTR_BASE               = 0x488, 8
    TR_SELECTOR             = 0x490, 2
    TR_ATTRIBUTES           = 0x492, 2
    TR_LIMIT                = 0x494, 4
    TR_BASE                 = 0x498, 8
    CPL                     = 0x4CB, 1
    EFER                    = 0x4D0, 8
    PERF_CTL0               = 0x4E0, 8
    PERF_CTR0               = 0x4E8, 8
    PERF_CTL1               = 0x4F0, 8
    PERF_CTR1               = 0x4F8, 8
    PERF_CTL2               = 0x500, 8
    PERF_CTR2               = 0x508, 8
    PERF_CTL3               = 0x510, 8
    PERF_CTR3               = 0x518, 8
    PERF_CTL4               = 0x520, 8
    PERF_CTR4               = 0x528, 8
    PERF_CTL5               = 0x530, 8
    PERF_CTR5               = 0x538, 8
    CR4                     = 0x548, 8
    CR3                     = 0x550, 8
    CR0                     = 0x558, 8
    DR7                     = 0x560, 8
    DR6                     = 0x568, 8
    RFLAGS                  = 0x570, 8
    RIP                     = 0x578, 8
    INSTR_RETIRED_CTR       = 0x5C0, 8
    PERF_CTR_GLOBAL_STS     = 0x5C8, 8
    PERF_CTR_GLOBAL_CTL     = 0x5D0, 8
    RSP                     = 0x5D8, 8
    S_CET                   = 0x5E0, 8
    SSP                     = 0x5E8, 8
    ISST_ADDR               = 0x5F0, 8
    RAX                     = 0x5F8, 8
    STAR                    = 0x600, 8
    LSTAR                   = 0x608, 8
    CSTAR                   = 0x610, 8
    SFMASK                  = 0x618, 8
    KERNEL_GS_BASE          = 0x620, 8
    SYSENTER_CS             = 0x628, 8
    SYSENTER_ESP            = 0x630, 8
    SYSENTER_EIP            = 0x638, 8
    CR2                     = 0x640, 8
    G_PAT                   = 0x668, 8
    DBGCTL                  = 0x670, 8
    BR_FROM                 = 0x678, 8
    BR_TO                   = 0x680, 8
    LAST_EXCP_FROM          = 0x688, 8
    LAST_EXCP_TO            = 0x690, 8
    DBGEXTNCTL              = 0x698, 8
    SPEC_CTRL               = 0x6E0, 8
    LBR_STACK               = 0xA70, 256
    LBR_SELECT              = 0xB70, 8
    IBS_FETCH_CTL           = 0xB78, 8
    IBS_FETCH_LINADDR       = 0xB80, 8
    IBS_OP_CTL              = 0xB88, 8
    IBS_OP_RIP              = 0xB90, 8
    IBS_OP_DATA             = 0xB98, 8
    IBS_OP_DATA2            = 0xBA0, 8
    IBS_OP_DATA3            = 0xBA8, 8
    IBS_DC_LINADDR          = 0xBB0, 8
    BP_IBSTGT_RIP           = 0xBB8, 8
    IC_IBS_EXTD_CTL         = 0xBC0, 8
    # fmt: on

    @property
    def in_save_area(self) -> bool:
        """Whether this field is in the state save area."""
        return self >= SAVE_AREA

    @property
    def in_table(self) -> int:
        """The offset as the manual's table of its area gives it."""
        return self - SAVE_AREA if self >= SAVE_AREA else int(self)


# Fields of the save area (the VMSA) that only SEV-ES guests have: offset in it, and width.
# APM 2 "VMSA Layout, State Save Area for SEV-ES".
# fmt: off
SEV_ES_FIELDS: Final[dict[str, tuple[int, int]]] = {
    "PL0_SSP": (0x0A0, 8), "PL1_SSP": (0x0A8, 8), "PL2_SSP": (0x0B0, 8), "PL3_SSP": (0x0B8, 8),
    "U_CET": (0x0C0, 8), "VMPL": (0x0CA, 1), "XSS": (0x140, 8),
    "DR0": (0x180, 8), "DR1": (0x188, 8), "DR2": (0x190, 8), "DR3": (0x198, 8),
    "DR0_ADDR_MASK": (0x1A0, 8), "DR1_ADDR_MASK": (0x1A8, 8),
    "DR2_ADDR_MASK": (0x1B0, 8), "DR3_ADDR_MASK": (0x1B8, 8),
    "PKRU": (0x2E8, 4), "TSC_AUX": (0x2EC, 4),
    "GUEST_TSC_SCALE": (0x2F0, 8), "GUEST_TSC_OFFSET": (0x2F8, 8), "REG_PROT_NONCE": (0x300, 8),
    "RCX": (0x308, 8), "RDX": (0x310, 8), "RBX": (0x318, 8), "SECURE_AVIC_CTL": (0x320, 8),
    "RBP": (0x328, 8), "RSI": (0x330, 8), "RDI": (0x338, 8),
    "R8": (0x340, 8), "R9": (0x348, 8), "R10": (0x350, 8), "R11": (0x358, 8),
    "R12": (0x360, 8), "R13": (0x368, 8), "R14": (0x370, 8), "R15": (0x378, 8),
    "GUEST_EXITINFO1": (0x390, 8), "GUEST_EXITINFO2": (0x398, 8),
    "GUEST_EXITINTINFO": (0x3A0, 8), "GUEST_NRIP": (0x3A8, 8), "SEV_FEATURES": (0x3B0, 8),
    "VINTR_CTRL": (0x3B8, 8), "GUEST_EXITCODE": (0x3C0, 8), "VIRTUAL_TOM": (0x3C8, 8),
    "TLB_ID": (0x3D0, 8), "PCPU_ID": (0x3D8, 8), "EVENTINJ": (0x3E0, 8), "XCR0": (0x3E8, 8),
    "X87_DP": (0x400, 8), "MXCSR": (0x408, 4), "X87_FTW": (0x40C, 2), "X87_FSW": (0x40E, 2),
    "X87_FCW": (0x410, 2), "X87_FOP": (0x412, 2), "X87_DS": (0x414, 2), "X87_CS": (0x416, 2),
    "X87_RIP": (0x418, 8), "FPREG_X87": (0x420, 80), "FPREG_XMM": (0x470, 256),
    "FPREG_YMM": (0x570, 256),
    "INTERCEPT_VEC_0": (0x900, 4), "INTERCEPT_VEC_1": (0x904, 4), "INTERCEPT_VEC_2": (0x908, 4),
    "INTERCEPT_VEC_3": (0x90C, 4), "INTERCEPT_VEC_4": (0x910, 4), "INTERCEPT_VEC_5": (0x914, 4),
    "INTERCEPT_VEC_6": (0x918, 4), "INTERCEPT_VEC_7": (0x91C, 4),
    "INTERCEPT_MSR_VEC_0": (0x920, 8), "INTERCEPT_MSR_VEC_1": (0x928, 8),
    "INTERCEPT_MSR_VEC_2": (0x930, 8), "INTERCEPT_MSR_VEC_3": (0x938, 8),
    "FPREG_K": (0x980, 64), "FPREG_ZMMHI": (0x9C0, 512), "FPREG_HIZMM": (0xBC0, 1024),
}
# fmt: on


class VirtualInterrupt(Register):
    """V_INTR_CONTROL, 060h. APM 2 "Virtualizing the Local APIC and Interrupts"."""

    WIDTH = 32

    v_tpr = Bits(7, 0, about="virtual task priority")
    v_irq = Bits(8, about="a virtual interrupt is pending")
    v_gif = Bits(9, about="virtual global interrupt flag")
    v_nmi_pending = Bits(11)
    v_nmi_mask = Bits(12)
    v_intr_prio = Bits(19, 16, about="priority of the virtual interrupt")
    v_ign_tpr = Bits(20, about="the virtual interrupt ignores V_TPR")
    v_intr_masking = Bits(24, about="EFLAGS.IF masks virtual interrupts only")
    v_gif_enable = Bits(25)
    v_nmi_enable = Bits(26)
    x2avic_enable = Bits(30)
    avic_enable = Bits(31)


class InterruptShadow(Register):
    """068h: interrupts held off for one instruction; the guest's own interrupt flag."""

    interrupt_shadow = Bits(0)
    guest_interrupt_mask = Bits(1, about="RFLAGS.IF of an SEV-ES guest")


class TlbControl(IntEnum):
    """TLB_CONTROL, 05Ch. APM 2 "TLB Control"."""

    DO_NOTHING = 0
    FLUSH_ALL = 1
    FLUSH_ASID = 3
    FLUSH_ASID_NON_GLOBAL = 7


class NestedControl(Register):
    """090h: nested paging and memory encryption."""

    np_enable = Bits(0, about="nested paging")
    sev_enable = Bits(1, about="Secure Encrypted Virtualization")
    sev_es_enable = Bits(2, about="encrypted state for SEV")
    gmet_enable = Bits(3, about="Guest Mode Execution Trap")
    sss_check_enable = Bits(4, about="supervisor shadow-stack restrictions in nested paging")
    vte_enable = Bits(5, about="Virtual Transparent Encryption")
    ro_gpt_enable = Bits(6, about="read-only guest page tables")
    invlpgb_enable = Bits(7, about="INVLPGB and TLBSYNC in the guest")
    pml_enable = Bits(11, about="Page Modification Logging")


class LbrControl(Register):
    """0B8h: what else is virtualized by hardware."""

    lbr_virtualization_enable = Bits(0)
    virtualized_vmload_vmsave_enable = Bits(1)
    ibs_virtualization_enable = Bits(2)
    pmc_virtualization_enable = Bits(3)


class EventInfo(Register):
    """EVENTINJ and EXITINTINFO. APM 2 "Event Injection" and "EXITINTINFO Pseudo-Code"."""

    vector = Bits(7, 0)
    type = Bits(10, 8)
    ev = Bits(11, about="error code valid")
    v = Bits(31, about="valid")
    error_code = Bits(63, 32)


class CleanBits(Register):
    """VMCB clean bits, 0C0h. APM 2 "VMCB Clean Bits": 1 means unchanged since the last exit."""

    WIDTH = 32

    intercepts = Bits(0, about="I: intercepts, TSC offset, pause filter")
    iopm = Bits(1, about="IOPM: IOPM_BASE_PA, MSRPM_BASE_PA")
    asid = Bits(2, about="ASID")
    tpr = Bits(3, about="V_TPR, V_IRQ, V_INTR_PRIO, V_IGN_TPR, V_INTR_MASKING, V_INTR_VECTOR")
    np = Bits(4, about="nested paging: N_CR3, G_PAT, the nested controls")
    crx = Bits(5, about="CR0, CR3, CR4, EFER")
    drx = Bits(6, about="DR6, DR7")
    dt = Bits(7, about="GDTR and IDTR: limit and base")
    seg = Bits(8, about="CS, DS, SS, ES and CPL")
    cr2 = Bits(9)
    lbr = Bits(10, about="DBGCTL, BR_FROM, BR_TO, LAST_EXCP_FROM, LAST_EXCP_TO")
    avic = Bits(11, about="the AVIC pointers")
    cet = Bits(12, about="S_CET, SSP, ISST_ADDR")


# What VMLOAD reads and VMSAVE writes, as byte ranges of the VMCB. APM 3 "VMLOAD".
VMLOAD_RANGES: Final = (
    (VmcbField.FS_SELECTOR, VmcbField.GDTR_SELECTOR),
    (VmcbField.LDTR_SELECTOR, VmcbField.IDTR_SELECTOR),
    (VmcbField.TR_SELECTOR, VmcbField.TR_BASE + 8),
    (VmcbField.STAR, VmcbField.CR2),
)

SEGMENT_FIELDS: Final = {
    SegmentRegister.ES: VmcbField.ES_SELECTOR,
    SegmentRegister.CS: VmcbField.CS_SELECTOR,
    SegmentRegister.SS: VmcbField.SS_SELECTOR,
    SegmentRegister.DS: VmcbField.DS_SELECTOR,
    SegmentRegister.FS: VmcbField.FS_SELECTOR,
    SegmentRegister.GS: VmcbField.GS_SELECTOR,
}


class Vmcb(Mapping[VmcbField, int]):
    """A view of the 4096 bytes of a VMCB in place.

    Every field is an attribute of its lower-case name, read and written in the memory given:
    `vmcb.rip += 3`.  It is also a mapping from `VmcbField`, as the checks want it.  `b`, `w`, `d`
    and `q` are the same bytes as items of 1, 2, 4 and 8: `vmcb.q[VmcbField.RIP >> 3]`.
    A value that is too wide for its field raises ValueError; mask first.
    """

    __slots__ = ("b", "d", "q", "w")

    def __init__(self, memory: bytearray | memoryview | bytes) -> None:
        self.b = memoryview(memory).cast("B")
        if len(self.b) != SIZE:
            raise ValueError(f"a VMCB has {SIZE} bytes, not {len(self.b)}")
        self.w, self.d, self.q = self.b.cast("H"), self.b.cast("I"), self.b.cast("Q")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...
        def __setattr__(self, name: str, value: int | memoryview) -> None: ...

    def __getitem__(self, field: VmcbField) -> int:
        if field.width == 8:
            return self.q[field >> 3]
        return int.from_bytes(self.b[field : field + field.width], "little")

    def __setitem__(self, field: VmcbField, value: int) -> None:
        self.b[field : field + field.width] = value.to_bytes(field.width, "little")

    def __iter__(self) -> Iterator[VmcbField]:
        return iter(VmcbField)

    def __len__(self) -> int:
        return len(VmcbField)

    def segment(self, first: VmcbField) -> Segment:
        """The segment register whose selector is field `first` (`VmcbField.CS_SELECTOR`)."""
        word, double = first >> 1, first >> 2
        return Segment(
            self.w[word], self.q[(first >> 3) + 1], self.d[double + 1], self.w[word + 1] & 0xFFF
        )

    def set_segment(self, first: VmcbField, segment: Segment) -> None:
        """Write all four parts of the segment register whose selector is field `first`."""
        self.w[first >> 1] = segment.selector
        self.w[(first >> 1) + 1] = segment.attributes
        self.d[(first >> 2) + 1] = segment.limit
        self.q[(first >> 3) + 1] = segment.base

    def copy_vmload_state(self, source: Vmcb) -> None:
        """Take from `source` the state that VMLOAD and VMSAVE move, and nothing else."""
        for start, end in VMLOAD_RANGES:
            self.b[start:end] = source.b[start:end]


Getter = Callable[[Vmcb], int]
Setter = Callable[[Vmcb, int], None]


def _item_access(field: VmcbField) -> tuple[Getter, Setter]:
    """A getter and a setter of a field that is one machine word."""
    index = field // field.width

    def set_word(vmcb: Vmcb, value: int) -> None:
        vmcb.w[index] = value

    def set_double(vmcb: Vmcb, value: int) -> None:
        vmcb.d[index] = value

    def set_quad(vmcb: Vmcb, value: int) -> None:
        vmcb.q[index] = value

    def set_byte(vmcb: Vmcb, value: int) -> None:
        vmcb.b[index] = value

    # A function per width: choosing the view at each access would cost as much as the access.
    return {
        1: (lambda vmcb: vmcb.b[index], set_byte),
        2: (lambda vmcb: vmcb.w[index], set_word),
        4: (lambda vmcb: vmcb.d[index], set_double),
        8: (lambda vmcb: vmcb.q[index], set_quad),
    }[field.width]


def _wide_access(field: VmcbField) -> tuple[Getter, Setter]:
    """A getter and a setter of a field that is no machine word."""
    return lambda vmcb: vmcb[field], lambda vmcb, value: vmcb.__setitem__(field, value)


for _field in VmcbField:
    _get, _set = (_item_access if _field.width <= 8 else _wide_access)(_field)
    setattr(Vmcb, _field.name.lower(), property(_get, _set, doc=f"{_field.name}, {_field:03X}h"))
