/* Just enough of the instruction set to emulate an access to a device's 32-bit register. */
#pragma once

#include "hypervisor.h"

/* A MOV between memory and a 32-bit register or an immediate. */
struct memory_access {
    u8 length;
    bool is_store;
    bool has_immediate;
    u32 immediate;
    u64 *reg;       /* where there is no immediate */
};

/* Decodes 64-bit code.  False for any other instruction, and for ESP, which is kept elsewhere. */
bool decode_memory_access(const u8 *code, struct registers *registers,
                          struct memory_access *access);
