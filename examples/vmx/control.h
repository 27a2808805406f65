/* Intel SDM volume 3, appendix "Field Encoding in VMCS", and the bits that this hypervisor uses. */
#pragma once

#include "cpu.h"
#include "hypervisor.h"

enum field {
    VPID = 0x0000,

    GUEST_SELECTORS = 0x0800, /* ES, CS, SS, DS, FS, GS, LDTR, TR: 2 apart, as the next three */
    GUEST_CS_SELECTOR = 0x0802,
    GUEST_SS_SELECTOR = 0x0804,
    GUEST_LIMITS = 0x4800,
    GUEST_ACCESS_RIGHTS = 0x4814,
    GUEST_BASES = 0x6806,
    GUEST_FS_BASE = 0x680e,
    GUEST_GS_BASE = 0x6810,

    HOST_ES_SELECTOR = 0x0c00,
    HOST_CS_SELECTOR = 0x0c02,
    HOST_SS_SELECTOR = 0x0c04,
    HOST_DS_SELECTOR = 0x0c06,
    HOST_FS_SELECTOR = 0x0c08,
    HOST_GS_SELECTOR = 0x0c0a,
    HOST_TR_SELECTOR = 0x0c0c,

    IO_BITMAP_A = 0x2000,
    IO_BITMAP_B = 0x2002,
    MSR_BITMAP = 0x2004,
    EPT_POINTER = 0x201a,
    GUEST_PHYSICAL_ADDRESS = 0x2400,
    VMCS_LINK_POINTER = 0x2800,
    GUEST_DEBUGCTL = 0x2802,
    GUEST_EFER = 0x2806,
    HOST_EFER = 0x2c02,

    PIN_CONTROLS = 0x4000,
    PROCESSOR_CONTROLS = 0x4002,
    EXCEPTION_BITMAP = 0x4004,
    CR3_TARGET_COUNT = 0x400a,
    EXIT_CONTROLS = 0x400c,
    EXIT_MSR_STORE_COUNT = 0x400e,
    EXIT_MSR_LOAD_COUNT = 0x4010,
    ENTRY_CONTROLS = 0x4012,
    ENTRY_MSR_LOAD_COUNT = 0x4014,
    ENTRY_INTERRUPTION = 0x4016,
    ENTRY_ERROR_CODE = 0x4018,
    ENTRY_INSTRUCTION_LENGTH = 0x401a,
    SECONDARY_CONTROLS = 0x401e,

    INSTRUCTION_ERROR = 0x4400,
    EXIT_REASON = 0x4402,
    IDT_VECTORING = 0x4408,
    IDT_VECTORING_ERROR_CODE = 0x440a,
    INSTRUCTION_LENGTH = 0x440c,

    GUEST_GDTR_LIMIT = 0x4810,
    GUEST_IDTR_LIMIT = 0x4812,
    GUEST_INTERRUPTIBILITY = 0x4824,
    GUEST_ACTIVITY = 0x4826,
    GUEST_SYSENTER_CS = 0x482a,
    HOST_SYSENTER_CS = 0x4c00,

    CR0_MASK = 0x6000,
    CR4_MASK = 0x6002,
    CR0_SHADOW = 0x6004,
    CR4_SHADOW = 0x6006,
    EXIT_QUALIFICATION = 0x6400,

    GUEST_CR0 = 0x6800,
    GUEST_CR3 = 0x6802,
    GUEST_CR4 = 0x6804,
    GUEST_GDTR_BASE = 0x6816,
    GUEST_IDTR_BASE = 0x6818,
    GUEST_DR7 = 0x681a,
    GUEST_RSP = 0x681c,
    GUEST_RIP = 0x681e,
    GUEST_RFLAGS = 0x6820,
    GUEST_PENDING_DEBUG = 0x6822,
    GUEST_SYSENTER_ESP = 0x6824,
    GUEST_SYSENTER_EIP = 0x6826,

    HOST_CR0 = 0x6c00,
    HOST_CR3 = 0x6c02,
    HOST_CR4 = 0x6c04,
    HOST_FS_BASE = 0x6c06,
    HOST_GS_BASE = 0x6c08,
    HOST_TR_BASE = 0x6c0a,
    HOST_GDTR_BASE = 0x6c0c,
    HOST_IDTR_BASE = 0x6c0e,
    HOST_SYSENTER_ESP = 0x6c10,
    HOST_SYSENTER_EIP = 0x6c12,
    HOST_RSP = 0x6c14,
    HOST_RIP = 0x6c16,
};

/* "VM-Execution Control Fields". */
enum processor_control {
    HLT_EXITING = 1 << 7,
    USE_IO_BITMAPS = 1 << 25,
    USE_MSR_BITMAPS = 1 << 28,
    USE_SECONDARY = 1U << 31,
};
enum secondary_control {
    ENABLE_EPT = 1 << 1,
    ENABLE_RDTSCP = 1 << 3,
    ENABLE_VPID = 1 << 5,
    UNRESTRICTED_GUEST = 1 << 7,
    ENABLE_INVPCID = 1 << 12,
    ENABLE_XSAVES = 1 << 20,
};

/* "VM-Exit Control Fields" and "VM-Entry Control Fields". */
enum exit_control { EXIT_TO_64_BIT = 1 << 9, EXIT_SAVES_EFER = 1 << 20, EXIT_LOADS_EFER = 1 << 21 };
enum entry_control { ENTRY_TO_64_BIT = 1 << 9, ENTRY_LOADS_EFER = 1 << 15 };

/* "Guest Segment Registers": the access rights of a segment that cannot be used. */
enum { SEGMENT_UNUSABLE = 1 << 16 };

/* "VM-Entry Controls for Event Injection". */
#define EVENT_VALID BIT(31)
#define EVENT_HAS_ERROR_CODE BIT(11)
#define EVENT_EXCEPTION (3 << 8)
#define EVENT_PARTS 0xfff /* vector, type and whether there is an error code */

/* "Guest Non-Register State": blocking by STI and by MOV SS. */
enum { BLOCKING_SHADOW = 3 };

/* Appendix "VMX Basic Exit Reasons". */
enum exit_code {
    EXIT_TRIPLE_FAULT = 2,
    EXIT_INIT = 3,
    EXIT_CPUID = 10,
    EXIT_HLT = 12,
    EXIT_VMCALL = 18,
    EXIT_VMCLEAR = 19,
    EXIT_VMLAUNCH = 20,
    EXIT_VMPTRLD = 21,
    EXIT_VMPTRST = 22,
    EXIT_VMREAD = 23,
    EXIT_VMRESUME = 24,
    EXIT_VMWRITE = 25,
    EXIT_VMXOFF = 26,
    EXIT_VMXON = 27,
    EXIT_IO = 30,
    EXIT_RDMSR = 31,
    EXIT_WRMSR = 32,
    EXIT_EPT_VIOLATION = 48,
    EXIT_INVEPT = 50,
    EXIT_INVVPID = 53,
};
enum { EXIT_ENTRY_FAILURE = 1U << 31 };

/* "Exit Qualification for I/O Instructions" and "... for EPT Violations". */
enum { IO_SIZE = 7, IO_INPUT = 1 << 3, IO_STRING = 1 << 4, IO_PORT_SHIFT = 16 };
enum { EPT_WRITE = 1 << 1, EPT_WAS_MAPPED = 7 << 3 };

/* Both panic when the instruction fails. */
u64 vmread(enum field field);
void vmwrite(enum field field, u64 value);

/* Appendix "VMX Capability Reporting Facility". */
enum vmx_msr {
    MSR_FEATURE_CONTROL = 0x3a,
    MSR_VMX_BASIC = 0x480,
    MSR_VMX_PIN = 0x481,
    MSR_VMX_PROCESSOR = 0x482,
    MSR_VMX_EXIT = 0x483,
    MSR_VMX_ENTRY = 0x484,
    MSR_VMX_CR0_FIXED0 = 0x486,
    MSR_VMX_CR0_FIXED1 = 0x487,
    MSR_VMX_CR4_FIXED0 = 0x488,
    MSR_VMX_CR4_FIXED1 = 0x489,
    MSR_VMX_SECONDARY = 0x48b,
    MSR_VMX_EPT_VPID = 0x48c,
    MSR_VMX_TRUE_PIN = 0x48d,
    MSR_VMX_TRUE_PROCESSOR = 0x48e,
    MSR_VMX_TRUE_EXIT = 0x48f,
    MSR_VMX_TRUE_ENTRY = 0x490,
};
enum { FEATURE_CONTROL_LOCKED = 1 << 0, FEATURE_CONTROL_VMX = 1 << 2 };
#define BASIC_REVISION 0x7fffffffU
#define BASIC_TRUE_CONTROLS BIT(55)

/* The L2 of every processor has the same number: the processors have translations of their own. */
enum { L2_VPID = 1 };

/* CR0 and CR4 as VMX operation wants them (appendix "VMX-Fixed Bits in CR0", "... in CR4"). */
static inline u64 fix_bits(u64 value, u32 fixed0, u32 fixed1)
{
    return (value | rdmsr(fixed0)) & rdmsr(fixed1);
}

/* controls.c */
void set_controls(void);

/* state.c */
void capture_state(u64 rip, u64 rsp);
void set_startup_state(struct cpu *cpu);
void set_host_state(struct cpu *cpu);

/* nested_paging.c: forget all translations that came from the tables. */
void invalidate_nested_translations(void);

/* exits.c: returns whether L2 goes on as L2. */
bool handle_exit(struct cpu *cpu);
