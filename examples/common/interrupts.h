/* Exceptions and interrupts, on either level, and how a fault becomes a value. */
#pragma once

#include "cpu.h"

/* A vector of ours: the interprocessor interrupt that each L2 gets. */
#define VECTOR_PING 0x40
#define VECTOR_SPURIOUS 0xff

/* What a faulting instruction gave: 0 if it did not fault. */
typedef u64 fault_t;
#define FAULT(vector, error_code) (BIT(63) | (u64)(error_code) << 32 | (vector))

/*
 * Lets the instruction at local label 1 fault: execution goes on at 2 with a fault_t in RAX.
 * The three lines that every such asm statement shares.
 */
#define FIXUP                                                                   \
    ".pushsection .fixups, \"a\"\n"                                             \
    ".quad 1b, 2f\n"                                                            \
    ".popsection\n"                                                             \
    "2:\n"

/* Fills the one interrupt descriptor table that every processor uses, on both levels. */
void build_interrupt_table(void *table);

static inline fault_t try_rdmsr(u32 msr, u64 *value)
{
    fault_t fault = 0;
    u32 low = 0, high = 0;
    asm volatile("1: rdmsr\n"
                 "mov %%eax, %1\n"
                 "xor %%eax, %%eax\n" FIXUP
                 : "=&a"(fault), "+r"(low), "+d"(high)
                 : "c"(msr));
    *value = (u64)high << 32 | low;
    return fault;
}

static inline fault_t try_undefined_instruction(void)
{
    fault_t fault = 0;
    asm volatile("1: ud2\n" FIXUP : "+a"(fault));
    return fault;
}
