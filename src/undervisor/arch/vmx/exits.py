"""Why a VM exit happened: basic exit reasons, exit qualifications, instruction information.

SDM, appendix "VMX Basic Exit Reasons"; chapter "VM Exits", sections "Basic VM-Exit Information"
and "Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from enum import IntEnum

from undervisor.arch.bits import Bits, Register, plain_members


@plain_members
class ExitReason(IntEnum):
    """Basic exit reasons (bits 15:0 of the exit-reason field)."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    STARTUP_IPI = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CONTROL_REGISTER_ACCESSES = 28
    MOV_DR = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    ENTRY_FAILURE_INVALID_GUEST_STATE = 33
    ENTRY_FAILURE_MSR_LOADING = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    ENTRY_FAILURE_MACHINE_CHECK = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    ACCESS_TO_GDTR_OR_IDTR = 46
    ACCESS_TO_LDTR_OR_TR = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER_EXPIRED = 52
    INVVPID = 53
    WBINVD_OR_WBNOINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PAGE_MODIFICATION_LOG_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SPP_RELATED_EVENT = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID_TRANSLATION_FAILURE = 72
    ENQCMDS_PASID_TRANSLATION_FAILURE = 73
    BUS_LOCK = 74
    INSTRUCTION_TIMEOUT = 75
    SEAMCALL = 76
    TDCALL = 77
    RDMSRLIST = 78
    WRMSRLIST = 79
    URDMSR = 80
    UWRMSR = 81
    RDMSR_IMMEDIATE = 84
    WRMSR_IMMEDIATE = 85


ENTRY_FAILURES = frozenset(
    {
        ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE,
        ExitReason.ENTRY_FAILURE_MSR_LOADING,
        ExitReason.ENTRY_FAILURE_MACHINE_CHECK,
    }
)
"""The reasons that come with bit 31 of the exit-reason field set."""


class EntryFailureQualification(IntEnum):
    """Exit qualification of a VM-entry failure due to invalid guest state ("VM-Entry Failures")."""

    OTHER = 0
    PDPTE_LOADING = 2
    NMI_INTO_BLOCKING_BY_STI = 3
    VMCS_LINK_POINTER = 4


class DebugExceptionQualification(Register):
    """Exit qualification for debug exceptions."""

    b0 = Bits(0)
    b1 = Bits(1)
    b2 = Bits(2)
    b3 = Bits(3)
    bld = Bits(11, about="Bus lock detected")
    bd = Bits(13, about="Debug-register access detected")
    bs = Bits(14, about="Single step")
    rtm = Bits(16, about="Debug exception or breakpoint in an RTM region")


class TaskSwitchSource(IntEnum):
    """What started a task switch."""

    CALL = 0
    IRET = 1
    JMP = 2
    TASK_GATE = 3


class TaskSwitchQualification(Register):
    """Exit qualification for task switches."""

    selector = Bits(15, 0, "Selector of the task-state segment")
    source = Bits(31, 30, "Source of the task switch")


class CrAccessType(IntEnum):
    """How a control register was accessed."""

    MOV_TO_CR = 0
    MOV_FROM_CR = 1
    CLTS = 2
    LMSW = 3


class CrAccessQualification(Register):
    """Exit qualification for control-register accesses."""

    control_register = Bits(3, 0, "Number of the control register; 0 for CLTS and LMSW")
    access_type = Bits(5, 4, "Access type")
    lmsw_memory_operand = Bits(6, about="LMSW operand is in memory")
    register = Bits(11, 8, "General-purpose register of MOV CR")
    lmsw_source = Bits(31, 16, "LMSW source data")


class MovDrQualification(Register):
    """Exit qualification for MOV DR."""

    debug_register = Bits(2, 0, "Number of the debug register")
    direction = Bits(4, about="0: MOV to DR, 1: MOV from DR")
    register = Bits(11, 8, "General-purpose register")


class IoQualification(Register):
    """Exit qualification for I/O instructions."""

    size = Bits(2, 0, "Size of access minus 1: 0, 1 or 3")
    input = Bits(3, about="0: OUT, 1: IN")
    string = Bits(4, about="String instruction")
    rep = Bits(5, about="REP prefixed")
    immediate = Bits(6, about="Operand encoding: 0 DX, 1 immediate")
    port = Bits(31, 16, "Port number")


class ApicAccessType(IntEnum):
    """Bits 15:12 of the qualification of an APIC-access VM exit."""

    LINEAR_READ = 0
    LINEAR_WRITE = 1
    LINEAR_FETCH = 2
    LINEAR_EVENT_DELIVERY = 3
    PT_WRITE = 4
    PHYSICAL_EVENT_DELIVERY = 10
    PHYSICAL_FETCH_OR_EXECUTION = 15


class ApicAccessQualification(Register):
    """Exit qualification for APIC-access VM exits from linear accesses."""

    offset = Bits(11, 0, "Offset of the access in the APIC page")
    access_type = Bits(15, 12, "Access type")
    asynchronous = Bits(16, about="Access asynchronous to instruction execution, by PT")


class EptViolationQualification(Register):
    """Exit qualification for EPT violations."""

    read = Bits(0, about="Data read")
    write = Bits(1, about="Data write")
    fetch = Bits(2, about="Instruction fetch")
    readable = Bits(3, about="AND of bit 0 of the EPT entries used")
    writable = Bits(4, about="AND of bit 1 of the EPT entries used")
    executable = Bits(5, about="AND of bit 2 of the EPT entries used (supervisor-mode execute)")
    user_executable = Bits(6, about="AND of bit 10 of the EPT entries used (mode-based execute)")
    linear_address_valid = Bits(7, about="Guest linear-address field is valid")
    translation = Bits(8, about="1: access to the translated address; 0: to a paging structure")
    user_mode = Bits(9, about="Linear address is user-mode (advanced information)")
    writable_page = Bits(10, about="Linear address is read/write (advanced information)")
    no_execute = Bits(11, about="Linear address is execute-disable (advanced information)")
    nmi_unblocking = Bits(12, about="NMI unblocking due to IRET")
    shadow_stack = Bits(13, about="Shadow-stack access")
    supervisor_shadow_stack = Bits(14, about="Bit 60 of the EPT entry that maps the page")
    guest_paging_verification = Bits(15, about="Guest-paging verification")
    asynchronous = Bits(16, about="Asynchronous to instruction execution, by PT")


class PmlFullQualification(Register):
    """Exit qualification for page-modification log full."""

    nmi_unblocking = Bits(12, about="NMI unblocking due to IRET")


class SppQualification(Register):
    """Exit qualification for SPP-related events."""

    misconfiguration = Bits(11, about="0: SPP miss, 1: SPP misconfiguration")
    nmi_unblocking = Bits(12, about="NMI unblocking due to IRET")
    linear_address_valid = Bits(7, about="Guest linear-address field is valid")
    asynchronous = Bits(16, about="Asynchronous to instruction execution")


class AddressSize(IntEnum):
    """Address size in instruction information."""

    BITS_16 = 0
    BITS_32 = 1
    BITS_64 = 2


class SegmentRegister(IntEnum):
    """Segment register in instruction information."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5


class MemoryOperandInformation(Register):
    """Instruction information of VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS and XSAVES."""

    WIDTH = 32
    scaling = Bits(1, 0, "Scaling: 2 to this power")
    address_size = Bits(9, 7, "Address size")
    segment = Bits(17, 15, "Segment register")
    index = Bits(21, 18, "Index register")
    index_invalid = Bits(22)
    base = Bits(26, 23, "Base register")
    base_invalid = Bits(27)


class InvalidationInformation(MemoryOperandInformation):
    """Instruction information of INVEPT, INVPCID and INVVPID."""

    WIDTH = 32
    register2 = Bits(31, 28, "Register that holds the type")


class VmreadInformation(MemoryOperandInformation):
    """Instruction information of VMREAD and VMWRITE."""

    WIDTH = 32
    register1 = Bits(6, 3, "Register operand that is read or written, if `is_register`")
    is_register = Bits(10, about="0: memory operand, 1: register operand")
    register2 = Bits(31, 28, "Register that holds the field's encoding")


class GdtrIdtrInstruction(IntEnum):
    """Instruction identity for exit reason 46."""

    SGDT = 0
    SIDT = 1
    LGDT = 2
    LIDT = 3


class GdtrIdtrInformation(MemoryOperandInformation):
    """Instruction information of LGDT, LIDT, SGDT and SIDT."""

    WIDTH = 32
    operand_size = Bits(11, about="0: 16-bit, 1: 32-bit; undefined in 64-bit mode")
    instruction = Bits(29, 28, "Instruction identity")


class LdtrTrInstruction(IntEnum):
    """Instruction identity for exit reason 47."""

    SLDT = 0
    STR = 1
    LLDT = 2
    LTR = 3


class LdtrTrInformation(MemoryOperandInformation):
    """Instruction information of LLDT, LTR, SLDT and STR."""

    WIDTH = 32
    register1 = Bits(6, 3, "Register operand, if `is_register`")
    is_register = Bits(10, about="0: memory operand, 1: register operand")
    instruction = Bits(29, 28, "Instruction identity")


class InsOutsInformation(Register):
    """Instruction information of INS and OUTS (IA32_VMX_BASIC bit 54)."""

    WIDTH = 32
    address_size = Bits(9, 7, "Address size")
    segment = Bits(17, 15, "Segment register; undefined for INS")


class OperandSize(IntEnum):
    """Operand size in the instruction information of RDRAND and RDSEED."""

    BITS_16 = 0
    BITS_32 = 1
    BITS_64 = 2


class RandomInformation(Register):
    """Instruction information of RDRAND, RDSEED, TPAUSE and UMWAIT."""

    WIDTH = 32
    register1 = Bits(6, 3, "Operand register")
    operand_size = Bits(12, 11, "Operand size")


class LoadiwkeyInformation(Register):
    """Instruction information of LOADIWKEY."""

    WIDTH = 32
    register1 = Bits(6, 3, "First XMM operand")
    register2 = Bits(31, 28, "Second XMM operand")


class MsrImmediateInformation(Register):
    """Instruction information of the immediate forms of RDMSR and WRMSRNS."""

    WIDTH = 32
    register1 = Bits(6, 3, "Operand register")
