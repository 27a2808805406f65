"""The intercept words of the VMCB: each bit, its place, and the exit that it produces.

APM 2 "VMCB Layout, Control Area" (000h to 017h) and "Intercept Operation".
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from undervisor.arch.bits import plain_members
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import Vmcb, VmcbField

WORDS: Final = 6
"""The intercept words are 32 bits each, at 000h, 004h ... 014h."""


@plain_members
class Intercept(IntEnum):
    """An intercept; its value is its bit number, counted from the VMCB's first bit.

    The manual numbers the exits in the same order: the value is the exit's code as well.
    """

    # fmt: off
    # Word 0, 000h
    CR0_READ, CR1_READ, CR2_READ, CR3_READ = 0, 1, 2, 3
    CR4_READ, CR5_READ, CR6_READ, CR7_READ = 4, 5, 6, 7
    CR8_READ, CR9_READ, CR10_READ, CR11_READ = 8, 9, 10, 11
    CR12_READ, CR13_READ, CR14_READ, CR15_READ = 12, 13, 14, 15
    CR0_WRITE, CR1_WRITE, CR2_WRITE, CR3_WRITE = 16, 17, 18, 19
    CR4_WRITE, CR5_WRITE, CR6_WRITE, CR7_WRITE = 20, 21, 22, 23
    CR8_WRITE, CR9_WRITE, CR10_WRITE, CR11_WRITE = 24, 25, 26, 27
    CR12_WRITE, CR13_WRITE, CR14_WRITE, CR15_WRITE = 28, 29, 30, 31
    # Word 1, 004h
    DR0_READ, DR1_READ, DR2_READ, DR3_READ = 32, 33, 34, 35
    DR4_READ, DR5_READ, DR6_READ, DR7_READ = 36, 37, 38, 39
    DR8_READ, DR9_READ, DR10_READ, DR11_READ = 40, 41, 42, 43
    DR12_READ, DR13_READ, DR14_READ, DR15_READ = 44, 45, 46, 47
    DR0_WRITE, DR1_WRITE, DR2_WRITE, DR3_WRITE = 48, 49, 50, 51
    DR4_WRITE, DR5_WRITE, DR6_WRITE, DR7_WRITE = 52, 53, 54, 55
    DR8_WRITE, DR9_WRITE, DR10_WRITE, DR11_WRITE = 56, 57, 58, 59
    DR12_WRITE, DR13_WRITE, DR14_WRITE, DR15_WRITE = 60, 61, 62, 63
    # Word 2, 008h
    EXCP_DE, EXCP_DB, EXCP_NMI, EXCP_BP = 64, 65, 66, 67
    EXCP_OF, EXCP_BR, EXCP_UD, EXCP_NM = 68, 69, 70, 71
    EXCP_DF, EXCP_9, EXCP_TS, EXCP_NP = 72, 73, 74, 75
    EXCP_SS, EXCP_GP, EXCP_PF, EXCP_15 = 76, 77, 78, 79
    EXCP_MF, EXCP_AC, EXCP_MC, EXCP_XF = 80, 81, 82, 83
    EXCP_20, EXCP_CP, EXCP_22, EXCP_23 = 84, 85, 86, 87
    EXCP_24, EXCP_25, EXCP_26, EXCP_27 = 88, 89, 90, 91
    EXCP_HV, EXCP_VC, EXCP_SX, EXCP_31 = 92, 93, 94, 95
    # Word 3, 00Ch
    INTR, NMI, SMI, INIT = 96, 97, 98, 99
    VINTR, CR0_SEL_WRITE, IDTR_READ, GDTR_READ = 100, 101, 102, 103
    LDTR_READ, TR_READ, IDTR_WRITE, GDTR_WRITE = 104, 105, 106, 107
    LDTR_WRITE, TR_WRITE, RDTSC, RDPMC = 108, 109, 110, 111
    PUSHF, POPF, CPUID, RSM = 112, 113, 114, 115
    IRET, INTN, INVD, PAUSE = 116, 117, 118, 119
    HLT, INVLPG, INVLPGA, IOIO_PROT = 120, 121, 122, 123
    MSR_PROT, TASK_SWITCH, FERR_FREEZE, SHUTDOWN = 124, 125, 126, 127
    # Word 4, 010h
    VMRUN, VMMCALL, VMLOAD, VMSAVE = 128, 129, 130, 131
    STGI, CLGI, SKINIT, RDTSCP = 132, 133, 134, 135
    ICEBP, WBINVD, MONITOR, MWAIT = 136, 137, 138, 139
    MWAIT_CONDITIONAL, XSETBV, RDPRU, EFER_WRITE_TRAP = 140, 141, 142, 143
    CR0_WRITE_TRAP, CR1_WRITE_TRAP, CR2_WRITE_TRAP, CR3_WRITE_TRAP = 144, 145, 146, 147
    CR4_WRITE_TRAP, CR5_WRITE_TRAP, CR6_WRITE_TRAP, CR7_WRITE_TRAP = 148, 149, 150, 151
    CR8_WRITE_TRAP, CR9_WRITE_TRAP, CR10_WRITE_TRAP, CR11_WRITE_TRAP = 152, 153, 154, 155
    CR12_WRITE_TRAP, CR13_WRITE_TRAP, CR14_WRITE_TRAP, CR15_WRITE_TRAP = 156, 157, 158, 159
    # Word 5, 014h
    INVLPGB, INVLPGB_ILLEGAL, INVPCID, MCOMMIT = 160, 161, 162, 163
    TLBSYNC, BUSLOCK, IDLE_HLT = 164, 165, 166
    # fmt: on

    @property
    def word(self) -> int:
        """The index of the 32-bit word that holds this bit."""
        return self >> 5

    @property
    def mask(self) -> int:
        """The bit within its 32-bit word."""
        return 1 << (self & 31)

    @property
    def field(self) -> VmcbField:
        """The VMCB field that holds this bit: 16 bits wide in words 0 and 1."""
        return _FIELDS[self >> 4]

    @property
    def field_mask(self) -> int:
        """The bit within `field`."""
        return 1 << (self & (15 if self < 64 else 31))

    @property
    def exit_code(self) -> ExitCode:
        """The exit that this intercept produces."""
        return EXITS[self]


_FIELDS: Final = (
    VmcbField.INTERCEPT_CR_READ,
    VmcbField.INTERCEPT_CR_WRITE,
    VmcbField.INTERCEPT_DR_READ,
    VmcbField.INTERCEPT_DR_WRITE,
    VmcbField.INTERCEPT_EXCEPTIONS,
    VmcbField.INTERCEPT_EXCEPTIONS,
    VmcbField.INTERCEPT_WORD3,
    VmcbField.INTERCEPT_WORD3,
    VmcbField.INTERCEPT_WORD4,
    VmcbField.INTERCEPT_WORD4,
    VmcbField.INTERCEPT_WORD5,
    VmcbField.INTERCEPT_WORD5,
)

EXITS: Final[dict[Intercept, ExitCode]] = {bit: ExitCode(bit) for bit in Intercept}

INTERCEPT_OF: Final[dict[ExitCode, Intercept]] = {
    code: intercept for intercept, code in EXITS.items()
}


class Priority(Enum):
    """When an instruction looks at its intercept, relative to its own exceptions."""

    BEFORE_ALL = "before all exceptions"
    BEFORE_ALL_BUT_CPL = "before all exceptions except #GP for CPL > 0"
    BEFORE_MEMORY = "after the exceptions that need no memory access, before those that do"
    AFTER_ALL = "after all exceptions"


_PRIORITIES: Final[dict[Intercept, Priority]] = {
    **dict.fromkeys(
        (
            Intercept.PUSHF,
            Intercept.POPF,
            Intercept.RSM,
            Intercept.IRET,
            Intercept.INTN,
            Intercept.VMMCALL,
            Intercept.XSETBV,
        ),
        Priority.BEFORE_ALL,
    ),
    **dict.fromkeys(
        (Intercept.INVLPGB, Intercept.INVLPGB_ILLEGAL, Intercept.INVPCID),
        Priority.BEFORE_ALL_BUT_CPL,
    ),
    **dict.fromkeys(
        (
            Intercept.CR0_READ,
            Intercept.CR0_WRITE,
            Intercept.CR0_SEL_WRITE,
            Intercept.CR3_READ,
            Intercept.CR3_WRITE,
            Intercept.IDTR_READ,
            Intercept.GDTR_READ,
            Intercept.LDTR_READ,
            Intercept.TR_READ,
            Intercept.IDTR_WRITE,
            Intercept.GDTR_WRITE,
            Intercept.LDTR_WRITE,
            Intercept.TR_WRITE,
            # Virtual-8086 mode, IOPL and the TSS's bitmap first ("IN and OUT Behavior").
            Intercept.IOIO_PROT,
            # CPL first; what a given MSR refuses comes after ("RDMSR and WRMSR Behavior").
            Intercept.MSR_PROT,
        ),
        Priority.BEFORE_MEMORY,
    ),
}


def priority_of(intercept: Intercept) -> Priority:
    """How an instruction's intercept ranks against its exceptions. APM 2 "Instruction Intercepts".

    Only for the intercepts of instructions; the others have no instruction to rank against.
    """
    return _PRIORITIES.get(intercept, Priority.AFTER_ALL)


# Exits that no single intercept bit asks for, and what makes them happen.
UNCONDITIONAL: Final[dict[ExitCode, str]] = {
    ExitCode.NPF: "NP_ENABLE in NESTED_CONTROL",
    ExitCode.AVIC_INCOMPLETE_IPI: "AVIC enable in V_INTR_CONTROL",
    ExitCode.AVIC_NOACCEL: "AVIC enable in V_INTR_CONTROL",
    ExitCode.VMGEXIT: "SEV_ES_ENABLE in NESTED_CONTROL",
    ExitCode.PML_FULL: "PML enable in NESTED_CONTROL",
    ExitCode.INVALID: "VMRUN with an illegal state",
    ExitCode.BUSY: "VMRUN of a VMSA that is in use",
    ExitCode.IDLE_REQUIRED: "VMRUN of an SNP guest while the sibling thread is not idle",
    ExitCode.INVALID_PMC: "VMRUN with an illegal virtual PMC state",
}


def intercept_mask(*intercepts: Intercept) -> tuple[int, ...]:
    """The six intercept words with the bits of `intercepts` set."""
    words = [0] * WORDS
    for intercept in intercepts:
        words[intercept.word] |= intercept.mask
    return tuple(words)


def is_intercepted(vmcb: Vmcb, intercept: Intercept) -> bool:
    """Whether `vmcb` has this intercept's bit set."""
    return bool(vmcb.d[intercept >> 5] >> (intercept & 31) & 1)


def intercepts_of(vmcb: Vmcb) -> list[Intercept]:
    """All intercepts whose bit is set in `vmcb`, in order of their bits."""
    return [intercept for intercept in Intercept if is_intercepted(vmcb, intercept)]
