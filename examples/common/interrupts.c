#include "interrupts.h"

#include "apic.h"
#include "console.h"
#include "hypervisor.h"
#include "machine.h"

/* As interrupts.S pushes it, from the stack's top downwards. */
struct interrupt_frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    u64 vector, error_code;
    u64 rip, cs, rflags, rsp, ss;
};

struct fixup {
    u64 from, to;
};

/* A 64-bit interrupt gate. */
struct PACKED gate {
    u16 offset_low;
    u16 selector;
    u8 stack_table;
    u8 type;
    u16 offset_middle;
    u32 offset_high;
    u32 reserved;
};
_Static_assert(sizeof(struct gate) == 16, "a gate has 16 bytes in long mode");

extern const struct fixup fixups_start[], fixups_end[];
extern const u8 interrupt_stubs[256][16];

void build_interrupt_table(void *table)
{
    struct gate *gates = table;
    for (int vector = 0; vector < 256; vector++) {
        u64 stub = physical(interrupt_stubs[vector]);
        gates[vector] = (struct gate){
            .offset_low = (u16)stub,
            .offset_middle = (u16)(stub >> 16),
            .offset_high = (u32)(stub >> 32),
            .selector = SELECTOR_CODE,
            .type = 0x8e, /* present, DPL 0, interrupt gate */
        };
    }
}

static bool fix_up(struct interrupt_frame *frame)
{
    for (const struct fixup *fixup = fixups_start; fixup < fixups_end; fixup++) {
        if (fixup->from != frame->rip)
            continue;
        frame->rip = fixup->to;
        frame->rax = FAULT(frame->vector, (u32)frame->error_code);
        return true;
    }
    return false;
}

void handle_interrupt(struct interrupt_frame *frame); /* from interrupts.S */

void handle_interrupt(struct interrupt_frame *frame)
{
    struct cpu *cpu = this_cpu();

    if (frame->vector == VECTOR_PING) {
        cpu->pings++;
        apic_end_of_interrupt();
        return;
    }
    if (frame->vector == VECTOR_SPURIOUS)
        return;
    if (fix_up(frame)) {
        cpu->faults++;
        return;
    }
    panic(FAILED_EXCEPTION,
          "cpu %u in %s: exception %u, error code 0x%x, rip 0x%lx, rsp 0x%lx, cr2 0x%lx",
          cpu->index, cpu->level == 2 ? "L2" : "L1", (u32)frame->vector, (u32)frame->error_code,
          frame->rip, frame->rsp, read_cr2());
}
