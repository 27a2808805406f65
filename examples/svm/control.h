/* AMD APM volume 2, appendix "Layout of VMCB", and the bits that this hypervisor uses. */
#pragma once

#include "hypervisor.h"

/* "VMCB Control Area": intercepts, words 3 and 4. */
enum intercept_word3 {
    INTERCEPT_CPUID = 1 << 18,
    INTERCEPT_HLT = 1 << 24,
    INTERCEPT_INVLPGA = 1 << 26,
    INTERCEPT_IOIO = 1 << 27,
    INTERCEPT_MSR = 1 << 28,
    INTERCEPT_SHUTDOWN = 1U << 31,
};
enum intercept_word4 {
    INTERCEPT_VMRUN = 1 << 0,
    INTERCEPT_VMMCALL = 1 << 1,
    INTERCEPT_VMLOAD = 1 << 2,
    INTERCEPT_VMSAVE = 1 << 3,
    INTERCEPT_STGI = 1 << 4,
    INTERCEPT_CLGI = 1 << 5,
    INTERCEPT_SKINIT = 1 << 6,
};

enum { NESTED_PAGING = 1 << 0 };

/* "TLB Flush": what VMRUN does to the translations of guests. */
enum { TLB_KEEP = 0, TLB_FLUSH_ALL = 1, TLB_FLUSH_GUEST = 3 };

/* "Event Injection". */
#define EVENT_VALID BIT(31)
#define EVENT_HAS_ERROR_CODE BIT(11)
#define EVENT_EXCEPTION (3 << 8)

/* "#SX Security Exception": the error code of an INIT that was redirected. */
enum { SX_INIT = 1 };

/* Appendix "SVM Intercept Exit Codes". */
enum exit_code {
    EXIT_EXCEPTION = 0x40, /* plus the vector */
    EXIT_CPUID = 0x72,
    EXIT_HLT = 0x78,
    EXIT_INVLPGA = 0x7a,
    EXIT_IOIO = 0x7b,
    EXIT_MSR = 0x7c,
    EXIT_SHUTDOWN = 0x7f,
    EXIT_VMRUN = 0x80,
    EXIT_VMMCALL = 0x81,
    EXIT_VMLOAD = 0x82,
    EXIT_VMSAVE = 0x83,
    EXIT_STGI = 0x84,
    EXIT_CLGI = 0x85,
    EXIT_SKINIT = 0x86,
    EXIT_NPF = 0x400,
};
#define EXIT_INVALID (~0ULL)

/* EXITINFO1 of an IOIO exit ("IOIO Intercept Information") and of a nested page fault. */
enum { IOIO_INPUT = 1 << 0, IOIO_STRING = 1 << 2, IOIO_SIZE_SHIFT = 4, IOIO_PORT_SHIFT = 16 };
enum { NPF_PRESENT = 1 << 0, NPF_WRITE = 1 << 1, NPF_RESERVED = 1 << 3 };

struct PACKED vmcb_segment {
    u16 selector;
    u16 attributes; /* bits 7:0 are the descriptor's 47:40, bits 11:8 its 55:52 */
    u32 limit;
    u64 base;
};

struct PACKED vmcb {
    u16 cr_reads, cr_writes, dr_reads, dr_writes;
    u32 exceptions;
    u32 word3, word4, word5;
    u8 reserved_018[0x03c - 0x018];
    u16 pause_threshold, pause_count;
    u64 io_map, msr_map;
    u64 tsc_offset;
    u32 asid;
    u8 tlb_control, reserved_05d[3];
    u64 virtual_interrupt;
    u64 interrupt_shadow;
    u64 exit_code, exit_info1, exit_info2;
    u64 exit_interrupt_info;
    u64 nested_control;
    u8 reserved_098[0x0a8 - 0x098];
    u64 event;
    u64 nested_cr3;
    u64 lbr_control;
    u32 clean, reserved_0c4;
    u64 next_rip;
    u8 reserved_0d0[0x400 - 0x0d0];

    /* "VMCB State Save Area". */
    struct vmcb_segment es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr;
    u8 reserved_4a0[0x4cb - 0x4a0];
    u8 cpl;
    u32 reserved_4cc;
    u64 efer;
    u8 reserved_4d8[0x548 - 0x4d8];
    u64 cr4, cr3, cr0, dr7, dr6, rflags, rip;
    u8 reserved_580[0x5d8 - 0x580];
    u64 rsp;
    u8 reserved_5e0[0x5f8 - 0x5e0];
    u64 rax;
    u64 star, lstar, cstar, sfmask, kernel_gs_base;
    u64 sysenter_cs, sysenter_esp, sysenter_eip;
    u64 cr2;
    u8 reserved_648[0x668 - 0x648];
    u64 pat, debugctl;
    u8 reserved_678[0x1000 - 0x678];
};

#define AT(member, offset) \
    _Static_assert(offsetof(struct vmcb, member) == (offset), "VMCB: " #member)
AT(io_map, 0x040);
AT(asid, 0x058);
AT(exit_code, 0x070);
AT(nested_control, 0x090);
AT(event, 0x0a8);
AT(nested_cr3, 0x0b0);
AT(next_rip, 0x0c8);
AT(es, 0x400);
AT(tr, 0x490);
AT(cpl, 0x4cb);
AT(efer, 0x4d0);
AT(cr4, 0x548);
AT(rip, 0x578);
AT(rsp, 0x5d8);
AT(rax, 0x5f8);
AT(sysenter_esp, 0x630);
AT(pat, 0x668);
#undef AT
_Static_assert(sizeof(struct vmcb) == PAGE_SIZE, "the VMCB is one page");

#define MSR_VM_CR 0xc0010114U
#define MSR_VM_HSAVE_PA 0xc0010117U
enum { VM_CR_R_INIT = 1 << 1, VM_CR_SVM_DISABLED = 1 << 4 };

static inline void vmsave(void *vmcb) { asm volatile("vmsave %0" : : "a"(vmcb) : "memory"); }

/* controls.c */
void set_controls(struct vmcb *vmcb);

/* state.c */
void capture_state(struct vmcb *vmcb, u64 rip, u64 rsp);
void set_startup_state(struct cpu *cpu);

/* exits.c: returns whether L2 goes on as L2. */
bool handle_exit(struct cpu *cpu);
