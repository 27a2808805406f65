"""#VMEXIT: the exit codes and what EXITINFO1 and EXITINFO2 mean for each.

APM 2 "SVM Intercept Exit Codes" (appendix) and the sections of the chapter "Secure Virtual
Machine" that describe each intercept.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from undervisor.arch.bits import Bits, Register, plain_members
from undervisor.arch.x86.events import Vector


@plain_members
class ExitCode(IntEnum):
    """EXITCODE values, without the manual's prefix VMEXIT_; negative ones as signed 64 bits."""

    # fmt: off
    CR0_READ = 0x00
    CR1_READ = 0x01
    CR2_READ = 0x02
    CR3_READ = 0x03
    CR4_READ = 0x04
    CR5_READ = 0x05
    CR6_READ = 0x06
    CR7_READ = 0x07
    CR8_READ = 0x08
    CR9_READ = 0x09
    CR10_READ = 0x0A
    CR11_READ = 0x0B
    CR12_READ = 0x0C
    CR13_READ = 0x0D
    CR14_READ = 0x0E
    CR15_READ = 0x0F
    CR0_WRITE = 0x10
    CR1_WRITE = 0x11
    CR2_WRITE = 0x12
    CR3_WRITE = 0x13
    CR4_WRITE = 0x14
    CR5_WRITE = 0x15
    CR6_WRITE = 0x16
    CR7_WRITE = 0x17
    CR8_WRITE = 0x18
    CR9_WRITE = 0x19
    CR10_WRITE = 0x1A
    CR11_WRITE = 0x1B
    CR12_WRITE = 0x1C
    CR13_WRITE = 0x1D
    CR14_WRITE = 0x1E
    CR15_WRITE = 0x1F
    DR0_READ = 0x20
    DR1_READ = 0x21
    DR2_READ = 0x22
    DR3_READ = 0x23
    DR4_READ = 0x24
    DR5_READ = 0x25
    DR6_READ = 0x26
    DR7_READ = 0x27
    DR8_READ = 0x28
    DR9_READ = 0x29
    DR10_READ = 0x2A
    DR11_READ = 0x2B
    DR12_READ = 0x2C
    DR13_READ = 0x2D
    DR14_READ = 0x2E
    DR15_READ = 0x2F
    DR0_WRITE = 0x30
    DR1_WRITE = 0x31
    DR2_WRITE = 0x32
    DR3_WRITE = 0x33
    DR4_WRITE = 0x34
    DR5_WRITE = 0x35
    DR6_WRITE = 0x36
    DR7_WRITE = 0x37
    DR8_WRITE = 0x38
    DR9_WRITE = 0x39
    DR10_WRITE = 0x3A
    DR11_WRITE = 0x3B
    DR12_WRITE = 0x3C
    DR13_WRITE = 0x3D
    DR14_WRITE = 0x3E
    DR15_WRITE = 0x3F
    EXCP_DE = 0x40
    EXCP_DB = 0x41
    EXCP_NMI = 0x42
    EXCP_BP = 0x43
    EXCP_OF = 0x44
    EXCP_BR = 0x45
    EXCP_UD = 0x46
    EXCP_NM = 0x47
    EXCP_DF = 0x48
    EXCP_9 = 0x49
    EXCP_TS = 0x4A
    EXCP_NP = 0x4B
    EXCP_SS = 0x4C
    EXCP_GP = 0x4D
    EXCP_PF = 0x4E
    EXCP_15 = 0x4F
    EXCP_MF = 0x50
    EXCP_AC = 0x51
    EXCP_MC = 0x52
    EXCP_XF = 0x53
    EXCP_20 = 0x54
    EXCP_CP = 0x55
    EXCP_22 = 0x56
    EXCP_23 = 0x57
    EXCP_24 = 0x58
    EXCP_25 = 0x59
    EXCP_26 = 0x5A
    EXCP_27 = 0x5B
    EXCP_HV = 0x5C
    EXCP_VC = 0x5D
    EXCP_SX = 0x5E
    EXCP_31 = 0x5F
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_CONDITIONAL = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    CR0_WRITE_TRAP = 0x90
    CR1_WRITE_TRAP = 0x91
    CR2_WRITE_TRAP = 0x92
    CR3_WRITE_TRAP = 0x93
    CR4_WRITE_TRAP = 0x94
    CR5_WRITE_TRAP = 0x95
    CR6_WRITE_TRAP = 0x96
    CR7_WRITE_TRAP = 0x97
    CR8_WRITE_TRAP = 0x98
    CR9_WRITE_TRAP = 0x99
    CR10_WRITE_TRAP = 0x9A
    CR11_WRITE_TRAP = 0x9B
    CR12_WRITE_TRAP = 0x9C
    CR13_WRITE_TRAP = 0x9D
    CR14_WRITE_TRAP = 0x9E
    CR15_WRITE_TRAP = 0x9F
    INVLPGB = 0xA0
    INVLPGB_ILLEGAL = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUSLOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMGEXIT = 0x403
    PML_FULL = 0x407
    INVALID = -1
    BUSY = -2
    IDLE_REQUIRED = -3
    INVALID_PMC = -4
    # fmt: on

    @property
    def raw(self) -> int:
        """The 64 bits that the VMCB's EXITCODE holds."""
        return self & 0xFFFF_FFFF_FFFF_FFFF


def signed_exit_code(raw: int) -> int:
    """EXITCODE's 64 bits as the signed number that `ExitCode` uses.

    Software that keeps only 32 bits stores -1 as FFFF_FFFFH: that reads as -1 too.
    """
    if raw >> 63:
        return raw - (1 << 64)
    return raw - (1 << 32) if 0xFFFF_FFF0 <= raw <= 0xFFFF_FFFF else raw


_BY_RAW: Final[dict[int, ExitCode]] = {code.raw: code for code in ExitCode}


def exit_code_of(raw: int) -> ExitCode | int:
    """The named exit code for EXITCODE's bits, or the signed number where it has no name."""
    known = _BY_RAW.get(raw)
    if known is not None:
        return known
    code = signed_exit_code(raw)
    return _BY_RAW.get(code & 0xFFFF_FFFF_FFFF_FFFF, code)


def exception_exit(vector: int) -> ExitCode:
    """VMEXIT_EXCP[`vector`], 0 to 31."""
    return _BY_RAW[ExitCode.EXCP_DE + vector]


def exception_vector(code: int) -> int | None:
    """The vector of an exception exit, None for every other exit."""
    return code - 0x40 if 0x40 <= code <= 0x5F else None


class IoInfo(Register):
    """EXITINFO1 of VMEXIT_IOIO; EXITINFO2 is the next RIP. APM 2 "IOIO Intercept"."""

    WIDTH = 32

    in_ = Bits(0, about="1: IN or INS, 0: OUT or OUTS")
    string = Bits(2, about="INS or OUTS")
    rep = Bits(3, about="repeated")
    size8 = Bits(4)
    size16 = Bits(5)
    size32 = Bits(6)
    address16 = Bits(7)
    address32 = Bits(8)
    address64 = Bits(9)
    segment = Bits(12, 10, about="effective segment of a string instruction, with decode assists")
    port = Bits(31, 16)

    @property
    def size(self) -> int:
        """The operand's bytes: 1, 2 or 4."""
        return self >> 4 & 7

    @property
    def address_size(self) -> int:
        """The address's bytes of a string instruction: 2, 4 or 8."""
        return (self >> 7 & 7) << 1


class SmiInfo(Register):
    """EXITINFO1 of VMEXIT_SMI. APM 2 "SMI Intercept"; from `type` on only if `val` is set."""

    smisrc = Bits(0, about="0: internal, by I/O trapping, 1: external")
    mcredir = Bits(1, about="a redirected machine check")
    segment = Bits(12, 10)
    type = Bits(32, about="1: IN or INS, 0: OUT or OUTS")
    val = Bits(33, about="detected during an I/O instruction")
    string = Bits(34, about="INS or OUTS")
    rep = Bits(35, about="repeated")
    size8 = Bits(36)
    size16 = Bits(37)
    size32 = Bits(38)
    address16 = Bits(39)
    address32 = Bits(40)
    address64 = Bits(41)
    tf = Bits(43, about="EFLAGS.TF")
    brp = Bits(47, 44, about="I/O breakpoint matches")
    port = Bits(63, 48)


class NestedPageFaultInfo(Register):
    """EXITINFO1 of VMEXIT_NPF. EXITINFO2 is the guest-physical address.

    APM "Nested versus Guest Page Faults, Fault Ordering"; bits 31 and above 33 for SEV-SNP.
    """

    p = Bits(0, about="the nested page was present")
    rw = Bits(1, about="the access was a write at the nested level")
    us = Bits(2, about="the access was a user access at the nested level")
    rsv = Bits(3, about="a reserved bit was set in a nested entry")
    id = Bits(4, about="the access was a code fetch at the nested level")
    ss = Bits(6, about="the access was a shadow-stack access")
    rmp = Bits(31, about="a violation of the reverse map table")
    final_address = Bits(32, about="translating the guest's final physical address")
    guest_tables = Bits(33, about="translating the guest's page tables")
    enc = Bits(34, about="the guest's effective C-bit was 1")
    sizem = Bits(35, about="size mismatch between PVALIDATE or RMPADJUST and the RMP")
    vmpl = Bits(36, about="refused by the VM permission level")
    sss = Bits(37, about="the nested page's supervisor shadow-stack bit")


class CrAccessInfo(Register):
    """EXITINFO1 of a CR or DR access with decode assists. APM "MOV CRx/DRx Intercepts"."""

    gpr = Bits(3, 0, about="the general-purpose register's number")
    mov = Bits(63, about="MOV CRx; 0 for LMSW, SMSW, CLTS and for debug registers")


class TaskSwitchInfo(Register):
    """EXITINFO2 of VMEXIT_TASK_SWITCH; EXITINFO1 is the new TSS selector."""

    error_code = Bits(31, 0)
    iret = Bits(36, about="caused by IRET")
    far_jump = Bits(38, about="caused by a far jump")
    has_error_code = Bits(44, about="an error code would be pushed")
    rf = Bits(48, about="EFLAGS.RF as it would be saved")


class AvicIpiInfo(Register):
    """EXITINFO2 of AVIC_INCOMPLETE_IPI; EXITINFO1 is ICR, high half above low."""

    index = Bits(11, 0, about="index into the AVIC table")
    cause = Bits(63, 32)


class AvicIpiFailure(IntEnum):
    """`AvicIpiInfo.cause`. APM 2 "AVIC IPI Delivery Not Completed"."""

    INVALID_INTERRUPT_TYPE = 0
    TARGET_NOT_RUNNING = 1
    INVALID_TARGET = 2
    INVALID_BACKING_PAGE = 3
    INVALID_VECTOR = 4


class AvicNoAccelInfo(Register):
    """EXITINFO1 of AVIC_NOACCEL; EXITINFO2 bits 7:0 are the vector of an EOI."""

    offset = Bits(11, 4, about="APIC register offset, bits 11:4")
    write = Bits(32)


MSR_READ: Final = 0
MSR_WRITE: Final = 1
"""EXITINFO1 of VMEXIT_MSR."""

# What EXITINFO1 and EXITINFO2 hold, per exit code; an exit that is not here leaves both undefined
# or zero.  Those marked "decode assists" need CPUID Fn8000_000A_EDX[DecodeAssists].
EXIT_INFO: Final[dict[ExitCode, tuple[str, str]]] = {
    **{
        ExitCode(code): ("CrAccessInfo (decode assists)", "")
        for code in range(ExitCode.CR0_READ, ExitCode.CR15_WRITE + 1)
    },
    **{
        ExitCode(code): ("CrAccessInfo: the GPR's number (decode assists)", "")
        for code in range(ExitCode.DR0_READ, ExitCode.DR15_WRITE + 1)
    },
    **{
        exception_exit(vector): ("error code", "")
        for vector in (Vector.NP, Vector.SS, Vector.GP, Vector.AC, Vector.CP, Vector.SX)
    },
    ExitCode.SMI: ("SmiInfo", "RIP of the I/O instruction, if SmiInfo.val"),
    ExitCode.EXCP_PF: ("error code", "faulting linear address"),
    ExitCode.SWINT: ("interrupt number (decode assists)", ""),
    ExitCode.INVLPG: ("linear address (decode assists)", ""),
    ExitCode.IOIO: ("IoInfo", "RIP of the next instruction"),
    ExitCode.MSR: ("0: RDMSR, 1: WRMSR", ""),
    ExitCode.TASK_SWITCH: ("selector of the new TSS", "TaskSwitchInfo"),
    ExitCode.NPF: ("NestedPageFaultInfo", "guest-physical address"),
    ExitCode.AVIC_INCOMPLETE_IPI: ("ICR", "AvicIpiInfo"),
    ExitCode.AVIC_NOACCEL: ("AvicNoAccelInfo", "vector of the EOI"),
}

# Exits of instruction intercepts, and of the permission maps: these save nRIP, all others clear
# it.  #BP, #OF and #BR save it as well when INT3, INTO or BOUND raised them.
# APM 2 "State Saved on Exit".
SAVES_NEXT_RIP: Final = frozenset(
    ExitCode(code)
    for start, end in (
        (ExitCode.CR0_READ, ExitCode.DR15_WRITE),
        (ExitCode.CR0_SEL_WRITE, ExitCode.MSR),
        (ExitCode.VMRUN, ExitCode.RDPRU),
        (ExitCode.INVLPGB, ExitCode.TLBSYNC),
        (ExitCode.IDLE_HLT, ExitCode.IDLE_HLT),
    )
    for code in range(start, end + 1)
)
