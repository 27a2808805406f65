/* Segments: the descriptor table and task state that each processor has, once for each level. */
#pragma once

#include "cpu.h"

enum { SELECTOR_CODE = 0x08, SELECTOR_DATA = 0x10, SELECTOR_TASK = 0x18 };

/* A 64-bit task state segment. */
struct PACKED task_state {
    u32 reserved0;
    u64 stacks[3];
    u64 reserved1;
    u64 interrupt_stacks[7];
    u64 reserved2;
    u16 reserved3;
    u16 io_map_base;
};
_Static_assert(sizeof(struct task_state) == 104, "as the manuals draw it");

struct ALIGNED(16) descriptors {
    u64 gdt[5];
    struct task_state task;
};

/* A segment register with its hidden part. */
struct segment {
    u16 selector;
    u16 attributes; /* bits 55:40 of the descriptor: type, S, DPL, P, limit 19:16, AVL, L, D, G */
    u32 limit;      /* in bytes */
    u64 base;
};

void build_descriptors(struct descriptors *descriptors);

/* LGDT, LIDT, LTR and all segment registers. */
void load_descriptors(struct descriptors *descriptors, const void *interrupt_table);

/* What the current GDT says of a selector; all zeros for the null selector. */
struct segment read_segment(u16 selector);
