#include "descriptors.h"

enum { LIMIT_HIGH = 0x0f00, GRANULARITY = 0x8000, SYSTEM = 0x10, TASK_AVAILABLE = 0x89 };

void build_descriptors(struct descriptors *descriptors)
{
    u64 base = physical(&descriptors->task);
    u64 limit = sizeof descriptors->task - 1;

    descriptors->task.io_map_base = sizeof descriptors->task; /* no map */
    descriptors->gdt[0] = 0;
    descriptors->gdt[SELECTOR_CODE / 8] = 0x00af9b000000ffff;
    descriptors->gdt[SELECTOR_DATA / 8] = 0x00cf93000000ffff;
    descriptors->gdt[SELECTOR_TASK / 8] = limit | (base & 0xffffff) << 16 |
                                          (u64)TASK_AVAILABLE << 40 | (base >> 24 & 0xff) << 56;
    descriptors->gdt[SELECTOR_TASK / 8 + 1] = base >> 32;
}

void load_descriptors(struct descriptors *descriptors, const void *interrupt_table)
{
    struct table_register gdtr = {sizeof descriptors->gdt - 1, physical(descriptors->gdt)};
    struct table_register idtr = {256 * 16 - 1, physical(interrupt_table)};

    descriptors->gdt[SELECTOR_TASK / 8] &= ~(2ULL << 40); /* LTR wants a task that is not busy */
    asm volatile("lgdt %0\n"
                 "lidt %1\n"
                 "pushq %2\n"
                 "leaq 1f(%%rip), %%rax\n"
                 "pushq %%rax\n"
                 "lretq\n"
                 "1: movl %3, %%eax\n"
                 "movl %%eax, %%ds\n"
                 "movl %%eax, %%es\n"
                 "movl %%eax, %%ss\n"
                 "xorl %%eax, %%eax\n"
                 "movl %%eax, %%fs\n"
                 "movl %%eax, %%gs\n"
                 "lldt %%ax\n"
                 "ltr %4\n"
                 :
                 : "m"(gdtr), "m"(idtr), "i"(SELECTOR_CODE), "i"(SELECTOR_DATA),
                   "r"((u16)SELECTOR_TASK)
                 : "rax", "memory");
}

struct segment read_segment(u16 selector)
{
    struct table_register gdtr = read_gdtr();
    if ((selector & ~7) == 0)
        return (struct segment){.selector = selector};

    const u64 *descriptor = pointer(gdtr.base + (selector & ~7U));
    u64 low = descriptor[0];
    u16 attributes = (u16)(low >> 40);
    u32 limit = (u32)(low & 0xffff) | (u32)(attributes & LIMIT_HIGH) << 8;
    u64 base = (low >> 16 & 0xffffff) | (low >> 56) << 24;
    if (attributes & GRANULARITY)
        limit = limit << 12 | 0xfff;
    if (!(attributes & SYSTEM))
        base |= descriptor[1] << 32;
    return (struct segment){selector, attributes, limit, base};
}
