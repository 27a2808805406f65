/* The instructions that C has no words for, and the register bits that both vendors share. */
#pragma once

#include "types.h"

enum {
    CR0_PE = 1 << 0,
    CR0_ET = 1 << 4,
    CR0_NE = 1 << 5,
    CR4_VMXE = 1 << 13,
};

enum {
    EFER_LME = 1 << 8,
    EFER_LMA = 1 << 10,
    EFER_SVME = 1 << 12,
};

enum msr {
    MSR_APIC_BASE = 0x1b,
    MSR_SYSENTER_CS = 0x174,
    MSR_SYSENTER_ESP = 0x175,
    MSR_SYSENTER_EIP = 0x176,
    MSR_DEBUGCTL = 0x1d9,
    MSR_PAT = 0x277,
};
#define MSR_EFER 0xc0000080U
#define MSR_FS_BASE 0xc0000100U
#define MSR_GS_BASE 0xc0000101U

enum vector {
    VECTOR_UD = 6,
    VECTOR_GP = 13,
    VECTOR_SX = 30,
};

/* CPUID: the bits of ECX about virtualization, in leaf 1 and in the extended leaf. */
#define CPUID_EXTENDED 0x80000001U
#define CPUID_VMX BIT(5)
#define CPUID_HYPERVISOR_PRESENT BIT(31)
#define CPUID_SVM BIT(2)

struct cpuid {
    u32 eax, ebx, ecx, edx;
};

/* The operand of LGDT, LIDT, SGDT and SIDT. */
struct PACKED table_register {
    u16 limit;
    u64 base;
};

static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid r;
    asm volatile("cpuid"
                 : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx)
                 : "a"(leaf), "c"(subleaf));
    return r;
}

static inline u64 rdmsr(u32 msr)
{
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 msr, u64 value)
{
    asm volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

#define CONTROL_REGISTER(name)                                                  \
    static inline u64 read_##name(void)                                         \
    {                                                                           \
        u64 value;                                                              \
        asm volatile("mov %%" #name ", %0" : "=r"(value));                      \
        return value;                                                           \
    }                                                                           \
    static inline void write_##name(u64 value)                                  \
    {                                                                           \
        asm volatile("mov %0, %%" #name : : "r"(value) : "memory");             \
    }
CONTROL_REGISTER(cr0)
CONTROL_REGISTER(cr2)
CONTROL_REGISTER(cr3)
CONTROL_REGISTER(cr4)
CONTROL_REGISTER(dr6)
CONTROL_REGISTER(dr7)
#undef CONTROL_REGISTER

#define SELECTOR(name)                                                          \
    static inline u16 read_##name(void)                                         \
    {                                                                           \
        u16 value;                                                              \
        asm volatile("mov %%" #name ", %0" : "=r"(value));                      \
        return value;                                                           \
    }
SELECTOR(es)
SELECTOR(cs)
SELECTOR(ss)
SELECTOR(ds)
SELECTOR(fs)
SELECTOR(gs)
#undef SELECTOR

static inline u16 read_ldtr(void)
{
    u16 value;
    asm volatile("sldt %0" : "=r"(value));
    return value;
}

static inline u16 read_tr(void)
{
    u16 value;
    asm volatile("str %0" : "=r"(value));
    return value;
}

static inline struct table_register read_gdtr(void)
{
    struct table_register r;
    asm volatile("sgdt %0" : "=m"(r));
    return r;
}

static inline struct table_register read_idtr(void)
{
    struct table_register r;
    asm volatile("sidt %0" : "=m"(r));
    return r;
}

#define PORT(suffix, type)                                                      \
    static inline void out##suffix(u16 port, type value)                        \
    {                                                                           \
        asm volatile("out" #suffix " %0, %1" : : "a"(value), "Nd"(port));       \
    }                                                                           \
    static inline type in##suffix(u16 port)                                     \
    {                                                                           \
        type value;                                                             \
        asm volatile("in" #suffix " %1, %0" : "=a"(value) : "Nd"(port));        \
        return value;                                                           \
    }
PORT(b, u8)
PORT(w, u16)
PORT(l, u32)
#undef PORT

static inline void pause(void) { asm volatile("pause" : : : "memory"); }
static inline void halt(void) { asm volatile("hlt" : : : "memory"); }
static inline void interrupts_on(void) { asm volatile("sti" : : : "memory"); }
static inline void interrupts_off(void) { asm volatile("cli" : : : "memory"); }

struct lock {
    u32 taken;
};

static inline void lock(struct lock *lock)
{
    while (__atomic_exchange_n(&lock->taken, 1, __ATOMIC_ACQUIRE))
        pause();
}

static inline void unlock(struct lock *lock)
{
    __atomic_store_n(&lock->taken, 0, __ATOMIC_RELEASE);
}
